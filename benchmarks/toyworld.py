"""Measure the quality of the embedded base model, and of the method on it, against ground truth.

python -m benchmarks.toyworld                  all parts: a table of figures and their targets
python -m benchmarks.toyworld vae scorer       some parts

Exits with code 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measures import ROOT, Measure, markdown, table, write_measures
from tav_model.digests import digest
from tav_model.errors import TavError
from tav_model.files import read_json, write_json

UNSEEN = 256  # frames or captions of held-out scenes
GUIDANCE_SCALE, STEPS = 5.0, 30
# The paper's ablations: the project's parameters, changed by these overrides.
VARIANTS: dict[str, dict[str, Any]] = {
    "full method": {},
    "without tuning": {"tune.steps": 0},
    "without inversion": {"edit.start": "random"},
    "attention to itself only": {"attention.spatial": ["self"]},
    "without temporal attention": {"attention.temporal": False},
}
PICTURED_EDIT = ("ball", "yellow-star-at-night")


# The base model


def measure_vae(base: Path) -> Iterator[Measure]:
    """Encode and decode pictures of held-out scenes, and compare."""
    from diffusers import AutoencoderKL

    from toyworld.training.vae import psnr, reconstruct, unseen_pictures

    vae = AutoencoderKL.from_pretrained(base / "vae", local_files_only=True)
    pictures, masks = unseen_pictures(UNSEEN)
    decoded = reconstruct(vae, pictures)
    yield Measure("VAE", "PSNR of 256 unseen frames, dB", float(psnr(pictures, decoded).mean()), 30, percent=False)
    error = np.square((pictures.astype(np.float64) - decoded) / 255).mean(-1)
    on_object = float(-10 * np.log10((error * masks).sum() / masks.sum()))
    yield Measure("VAE", "PSNR on the object, dB", on_object, percent=False)


def measure_scorer(base: Path) -> Iterator[Measure]:
    """Let the scorer choose the caption of a held-out scene among 64, and name its attributes."""
    from tav_model.metrics.clip import ClipScorer
    from toyworld.captions import described, random_caption
    from toyworld.judge import Judge
    from toyworld.renderer import render
    from toyworld.samples import random_scene

    scorer = ClipScorer(base / "scorer")
    rng = np.random.default_rng(1)
    scenes = [random_scene(rng, unseen=True) for _ in range(UNSEEN)]
    frames = np.stack([render(scene, float(rng.random())) for scene in scenes])
    images, texts = scorer.embed_frames(frames), scorer.embed_texts([random_caption(scene, rng) for scene in scenes])
    correct = []
    for i, scene in enumerate(scenes):
        others = [j for j in range(UNSEEN) if described(scenes[j]) != described(scene)]
        rivals = rng.choice(others, 63, replace=False)
        correct.append(images[i] @ texts[i] > (texts[rivals] @ images[i]).max())
    yield Measure("scorer", "correct caption among 64, unseen frames", float(np.mean(correct)), 0.90)
    for name, share in Judge(scorer).shares(frames, scenes).items():
        yield Measure("scorer", f"{name} recognised, unseen frames", share)


def measure_images(base: Path, out: Path) -> Iterator[Measure]:
    """Generate pictures from captions whose object, colour and ground never occurred together in training."""
    from PIL import Image

    from tav_model.metrics.clip import ClipScorer
    from toyworld.captions import random_caption
    from toyworld.judge import Judge
    from toyworld.samples import random_scene
    from toyworld.truth import look

    rng = np.random.default_rng(2)
    scenes = [random_scene(rng, unseen=True) for _ in range(UNSEEN)]
    pictures = text_to_image(base, [random_caption(scene, rng) for scene in scenes])
    out.mkdir(parents=True, exist_ok=True)
    Image.fromarray(
        np.concatenate([np.concatenate(list(row), 1) for row in pictures.reshape(16, 16, 128, 128, 3)[:6]])
    ).save(out / "images.png")
    for name, share in Judge(ClipScorer(base / "scorer")).shares(pictures, scenes).items():
        yield Measure("text to image", f"{name}, by the scorer", share, 0.95)
    observed = [look(picture) for picture in pictures]
    for name in ("colour", "ground", "sky"):
        share = np.mean([getattr(a, name) == getattr(b, name) for a, b in zip(observed, scenes, strict=True)])
        yield Measure("text to image", f"{name}, by the palette", float(share), 0.90)


def text_to_image(base: Path, captions: list[str], chunk: int = 32) -> np.ndarray:
    """Generate a picture for each caption with diffusers' own pipeline: `b h w c` uint8."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(base, local_files_only=True, torch_dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for start in range(0, len(captions), chunk):
        generator = torch.Generator().manual_seed(start)
        pictures.append(
            pipeline(
                captions[start : start + chunk],
                height=128,
                width=128,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE_SCALE,
                generator=generator,
                output_type="np",
            ).images
        )
        print(f"  {min(start + chunk, len(captions))} of {len(captions)} pictures", file=sys.stderr, flush=True)
    return np.rint(255 * np.concatenate(pictures)).astype(np.uint8)


# The method


def run_method(variant: str, out: Path, overrides: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Run a variant of the method on the sample clips with the pipeline's own stages, and return the scores of the edits.

    Clips that were run before with the same inputs are not run again.

    Returns:
        ``{CLIP: {EDIT: {"track_error": ..., ...}}}``
    """
    from tasks.clip_stages import ClipStages
    from tav.config import RESULT_SECTIONS, load_params
    from tav.config.paths import Project
    from tav.config.results import read_scores
    from tav.config.stages import STAGES
    from tav_model.base_models import base_digest
    from toyworld import WEIGHTS
    from toyworld.clips import CLIPS

    root = out / variant.replace(" ", "-")
    _write_project(root, overrides | VARIANTS[variant])
    inputs = load_params(root / "params.yaml").model_dump_json(include={*RESULT_SECTIONS, "clips"})
    scores = {}
    for clip in CLIPS:
        done = root / "done" / f"{clip}.json"
        identity = digest(base_digest(str(WEIGHTS)), WEIGHTS / "scorer", inputs, root / "data")
        if not done.exists() or read_json(done) != identity:
            print(f"  {variant}: {clip}", file=sys.stderr, flush=True)
            for stage in STAGES:
                ClipStages(root, clip).run(stage)
            write_json(done, identity)
        scores[clip] = read_scores(Project(root).scores(clip))
    return scores


def _write_project(project: Path, changes: dict[str, Any]) -> None:
    """Write a project with the sample clips and this project's parameters, changed by ``changes``."""
    import yaml

    from toyworld.captions import caption
    from toyworld.clips import CLIPS, write_clip

    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params |= {"base_model": "toyworld", "clips": {}}
    for name, clip in CLIPS.items():
        params["clips"][name] = {
            "video": f"data/{name}.mp4",
            "caption": caption(clip.scene),
            "prompts": f"data/{name}.csv",
        }
    for key, value in changes.items():
        section, _, entry = key.partition(".")
        params[section][entry] = value
    (project / "data").mkdir(parents=True, exist_ok=True)
    (project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    for name in CLIPS:
        if not (project / "data" / f"{name}.mp4").exists():
            write_clip(project / "data", name)


def means(scores: dict[str, dict[str, dict[str, float]]]) -> dict[str, float]:
    """Return the mean of each score over all edits of all clips."""
    rows = [row for edits in scores.values() for row in edits.values()]
    return {name: statistics.fmean(row[name] for row in rows) for name in rows[0]}


def measure_method(out: Path, overrides: dict[str, Any]) -> Iterator[Measure]:
    """Run the method on the sample clips, and compare the edits with the truth."""
    mean = means(run_method("full method", out, overrides))
    yield Measure("method", "track error, share of the width", mean["track_error"], 0.08, at_most=True)
    yield Measure("method", "edited attributes correct, share of frames", mean["attributes_edited"], 0.90)
    yield Measure("method", "other attributes preserved, share of frames", mean["attributes_kept"], 0.85)
    consistency = mean["consistency_to_truth"]
    yield Measure("method", "frame consistency minus that of the true video", consistency, -0.02, percent=False)
    yield Measure("method", "PSNR against the true video, dB", mean["psnr_to_truth"], percent=False)


def measure_ablations(out: Path, overrides: dict[str, Any]) -> str:
    """Return the ablations as a Markdown table, and write a picture of one edit with all variants."""
    rows = [["", "track error", "edited", "kept", "consistency vs. truth", "PSNR, dB"]]
    for variant in VARIANTS:
        mean = means(run_method(variant, out, overrides))
        shares = [f"{100 * mean[name]:.1f} %" for name in ("track_error", "attributes_edited", "attributes_kept")]
        rows.append([variant, *shares, f"{mean['consistency_to_truth']:+.3f}", f"{mean['psnr_to_truth']:.1f}"])
    _picture(out)
    return markdown(rows)


def _picture(out: Path) -> None:
    from tav.media.contact_sheet import write_contact_sheet
    from tav_model.video import read_video
    from toyworld.captions import caption
    from toyworld.clips import CLIPS, FRAMES
    from toyworld.renderer import render

    clip, name = PICTURED_EDIT
    scene = CLIPS[clip].scene
    (edit,) = [edit for edit in CLIPS[clip].edits if edit.name == name]
    truth = scene.edited(**edit.changes)
    folder = out / "full-method" / "results" / clip
    source, _ = read_video(folder / "frames" / "source.mp4")
    times = np.array([round(i * (FRAMES - 1) / (len(source) - 1)) for i in range(len(source))]) / (FRAMES - 1)
    rows = [
        (f"source: {caption(scene)}", source),
        (f"truth: {caption(truth)}", np.stack([render(truth, time) for time in times])),
    ]
    for variant in VARIANTS:
        video = out / variant.replace(" ", "-") / "results" / clip / "edits" / f"{name}.mp4"
        rows.append((variant, read_video(video)[0]))
    write_contact_sheet(out / "ablations.png", rows)


PARTS: dict[str, Callable[[Path, dict[str, Any]], Iterator[Measure]]] = {
    "vae": lambda out, overrides: measure_vae(_weights()),
    "scorer": lambda out, overrides: measure_scorer(_weights()),
    "images": lambda out, overrides: measure_images(_weights(), out),
    "method": measure_method,
}


def _weights() -> Path:
    from toyworld import WEIGHTS

    return WEIGHTS


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 if all targets are reached, 1 if not, 2 after invalid arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.toyworld",
        description=__doc__.partition("\n")[0],
        epilog="Exits with code 1 if a target is missed.",
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} or ablations (default: all)")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "results" / "benchmarks" / "toyworld",
        metavar="DIR",
        help="folder for results (default: %(default)s)",
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=JSON", help="change parameters of the method")
    parser.add_argument("--fresh", action="store_true", help="discard earlier results and start over")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TAV_QUIET", "1")
    chosen = options.parts or [*PARTS, "ablations"]
    try:
        unknown = sorted(set(chosen) - {*PARTS, "ablations"})
        if unknown:
            raise TavError(f"part {unknown[0]!r}: must be one of {', '.join([*PARTS, 'ablations'])}")
        if options.fresh:
            shutil.rmtree(options.out, ignore_errors=True)
        overrides = {key: json.loads(value) for key, _, value in (text.partition("=") for text in options.set)}
        return _run(chosen, options.out, overrides)
    except (TavError, json.JSONDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(chosen: list[str], out: Path, overrides: dict[str, Any]) -> int:
    measures = []
    for part in PARTS:
        if part in chosen:
            print(part, file=sys.stderr, flush=True)
            measures += list(PARTS[part](out, overrides))
    if measures:
        print(table(measures))
        write_measures(out / "measures.json", measures)
    if "ablations" in chosen:
        print("ablations", file=sys.stderr, flush=True)
        print(f"\n{measure_ablations(out, overrides)}\n\npicture: {out / 'ablations.png'}")
    return 0 if all(measure.reached for measure in measures) else 1


if __name__ == "__main__":
    sys.exit(main())
