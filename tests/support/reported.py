"""A project with the results of one clip as the stages leave them, made without a model, for tests of the report."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from tav_model.digests import digest
from tav_model.tensors import save_tensors
from tav_model.video import write_video
from tests.support.projects import ROOT, change_params
from toyworld.renderer import render
from toyworld.scenes import Scene, load_truth

CLIP = "ball"
REPORT = f"results/{CLIP}/report.html"
HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)> {{ 7 * 7 }}"
FRAMES, FPS = 8, Fraction(84, 23)
CAPTION = "a red ball is bouncing on the grass"
PROMPTS = {
    "blue-ball": "a blue ball is bouncing on the grass",
    "cube": "a red cube is bouncing on the grass",
    "on-sand": "a red ball is bouncing on the sand",
}
SCORES = {
    "blue-ball": {"flicker": 0.05, "textual_alignment": 0.58, "frame_consistency": 0.99, "track_error": 0.06},
    "cube": {"flicker": 0.06, "textual_alignment": 0.61, "frame_consistency": 0.97, "track_error": 0.01},
    "on-sand": {"flicker": 0.04, "textual_alignment": 0.6, "frame_consistency": 0.98},
}
SOURCE = {"flicker": 0.041, "textual_alignment": 0.59, "frame_consistency": 0.98}
TUNED = {
    "trainable_modules": ["attn1.to_q", "attn2.to_q", "attn_temp"],
    "attention": {"spatial": ["first", "former"], "temporal": True},
    "parameters": 172992,
    "base_model": "toyworld",
    "steps": 40,
    "seed": 33,
    "sha256": "0" * 64,
}


def make_results(root: Path) -> Path:
    """Fill the project in `root` with everything that a report shows, and return it. The edits are the truth, darkened."""
    shutil.copyfile(ROOT / "params.yaml", root / "params.yaml")
    (root / "data/scenes").mkdir(parents=True)
    shutil.copyfile(ROOT / "data/scenes/ball.json", root / "data/scenes/ball.json")
    results = root / "results" / CLIP
    truth = load_truth(root / "data/scenes/ball.json")
    times = np.linspace(0, 1, FRAMES)
    for part in ("frames", "edits", "tuned", "scores"):
        (results / part).mkdir(parents=True)
    source = np.stack([render(truth.scene, time) for time in times])
    write_video(results / "frames/source.mp4", source, FPS)
    save_tensors(
        results / "frames/frames.safetensors",
        {"frames": torch.from_numpy(source)},
        {"stage": "decode", "fps": str(FPS)},
    )
    for name in PROMPTS:
        frames = np.stack([render(truth.edits[name], time) for time in times])
        write_video(results / f"edits/{name}.mp4", (0.8 * frames).astype(np.uint8), FPS)
        write_edit(root, name)
    write_scores(root)
    (results / "tuned/tuned.json").write_text(json.dumps(TUNED))
    rng = np.random.default_rng(0)
    rows = [f"{s},{rng.uniform(0.002, 0.2)},{1e-3 * (1 - s / 100)},0.1,{rng.integers(1000)}" for s in range(1, 101)]
    (results / "tuned/loss.csv").write_text("\n".join(["step,loss,learning_rate,gradient_norm,timestep", *rows, ""]))
    (root / ".tav/timings").mkdir(parents=True)
    timings = {"decode": 2.1, "encode": 3.5, "annotate": 0.1, "tune": 112.8, "invert": 5.9, "edit": 27.6, "score": 17.0}
    (root / f".tav/timings/{CLIP}.json").write_text(json.dumps(timings))
    return root


def write_edit(root: Path, name: str, **changes: object) -> None:
    """Write the JSON beside an edit's video."""
    record = {"name": name, "prompt": PROMPTS[name], "category": "object", "negative_prompt": "", "guidance_scale": 3.5}
    record |= {"steps": 20, "seed": 33, "identity": "0" * 32, **changes}
    (root / "results" / CLIP / f"edits/{name}.json").write_text(json.dumps(record))


def write_quick_edit(
    root: Path, name: str, prompt: str, identity: str = "1" * 32, frames: np.ndarray | None = None, **scores: float
) -> None:
    """Write a quick edit and its scores; a still of the truth's first frame where no frames are given."""
    quick = root / "results" / CLIP / "quick"
    (quick / "scores").mkdir(parents=True, exist_ok=True)
    if frames is None:
        frames = np.repeat(render(Scene(), 0)[None], FRAMES, axis=0)
    write_video(quick / f"{name}.mp4", frames, FPS)
    record = {"name": name, "prompt": prompt, "category": None, "negative_prompt": "", "guidance_scale": 3.5}
    (quick / f"{name}.json").write_text(json.dumps(record | {"steps": 20, "seed": 33, "identity": identity}))
    similarities = np.ones((FRAMES, FRAMES)).tolist()
    of_video = {"video": digest(quick / f"{name}.mp4"), "inputs": "", "source": SOURCE}
    record = of_video | {"scores": scores, "consistency": similarities}
    (quick / f"scores/{name}.json").write_text(json.dumps(record))


def write_scores(root: Path, prompts: dict[str, str] = PROMPTS) -> None:
    folder = root / "results" / CLIP / "scores"
    metrics = list(SCORES["cube"])
    lines = [",".join(["name", "prompt", "category", *metrics])]
    for name, values in SCORES.items():
        prompt = prompts[name].replace('"', '""')
        lines.append(",".join([name, f'"{prompt}"', "object", *(str(values.get(metric, "")) for metric in metrics)]))
    (folder / "scores.csv").write_text("\n".join([*lines, ""]))
    mean = {metric: float(np.mean([v[metric] for v in SCORES.values() if metric in v])) for metric in metrics}
    (folder / "metrics.json").write_text(json.dumps({"source": SOURCE, "mean": mean}))
    gaps = np.abs(np.arange(FRAMES)[:, None] - np.arange(FRAMES))
    similarities = {name: (1 - 0.01 * (n + 1) * gaps).round(4).tolist() for n, name in enumerate(SCORES)}
    record = {"source": (1 - 0.02 * gaps).round(4).tolist(), "edits": similarities}
    (folder / "consistency.json").write_text(json.dumps(record))


def set_caption(root: Path, caption: str) -> None:
    entry = {"video": "data/ball.mp4", "caption": caption, "prompts": "data/ball.csv", "decode": {}}
    change_params(root, {}, {CLIP: entry})
