"""A small project with our dvc.yaml, whose stages only record their inputs, for tests of versioning."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STAGES = ("decode", "encode", "annotate", "tune", "invert", "edit", "score")
CLIPS = ("ball", "man-skiing_2")

PARAMS = """\
base_model: toyworld
seed: 33
control: []
attention: {spatial: [first, former], temporal: true}
window: {context_length: null}
decode: {frames: 8, end: null}
encode: {precision: float32}
tune: {steps: 60, learning_rate: 3.0e-5}
invert: {steps: 20, prompt: ""}
edit: {steps: 20, guidance_scale: 7.5}
score: {clip_model: null}
runtime: {device: auto}
clips:
  ball:
    video: data/ball.mp4
    caption: a ball
    prompts: data/ball.csv
    decode: {}
    base_model: null
    seed: null
    control: null
    attention: {}
    window: {}
    encode: {}
    tune: {}
    invert: {}
    edit: {}
    score: {}
  man-skiing_2:
    video: data/man.mp4
    caption: a man, skiing
    prompts: data/man.csv
    decode: {start: 3}
    base_model: null
    seed: null
    control: null
    attention: {}
    window: {}
    encode: {}
    tune: {}
    invert: {}
    edit: {}
    score: {}
"""

# Replaces `python -m tasks`. Every output contains a digest of its stage's inputs, so a changed input changes it.
TASKS = """\
import argparse, hashlib, json, os, time
from pathlib import Path
import yaml

parser = argparse.ArgumentParser()
parser.add_argument("stage")
parser.add_argument("--clip")
stage, clip = vars(parser.parse_args()).values()
with open("ran.log", "a") as log:
    log.write(f"{stage}@{clip}\\n")
if os.environ.get("SLOW_STAGE") == stage:
    time.sleep(60)
params = yaml.safe_load(Path("params.yaml").read_text())
own = params["clips"][clip]
results = Path("results", clip)
inputs, sections, outputs = {
    "decode": ([own["video"]], ["decode"], ["frames/frames.safetensors", "frames/source.mp4"]),
    "encode": (["frames"], ["encode"], ["latents/latents.safetensors", "latents/text.safetensors"]),
    "annotate": ([], ["control"], ["control/tune.json", "control/invert.json", "control/edit.json"]),
    "tune": (
        ["latents", "control/tune.json"],
        ["tune", "attention", "window"],
        ["tuned/tuned.safetensors", "tuned/tuned.json", "tuned/loss.csv"],
    ),
    "invert": (["latents", "tuned/tuned.safetensors", "control/invert.json"], ["invert"], ["inverted/inverted.safetensors"]),
    "edit": ([own["prompts"], "inverted", "control/edit.json"], ["edit"], ["edits/a.mp4", "edits/b/c.json"]),
    "score": (
        ["frames", "edits"],
        ["score"],
        ["scores/consistency.json", "scores/scores.csv", "scores/metrics.json", "contact-sheet.png"],
    ),
}[stage]
if stage == "annotate":
    control = params["control"] if own.get("control") is None else own["control"]
    for name in outputs:
        acting = [one for one in control if Path(name).stem in one.get("stages", ["invert", "edit"])]
        (results / name).parent.mkdir(parents=True, exist_ok=True)
        (results / name).write_text(json.dumps(acting) + "\\n")
    raise SystemExit
sha = hashlib.sha256(json.dumps([params[name] | own.get(name, {}) for name in sections]).encode())
for name in inputs:
    path = Path(name) if name.startswith("data/") else results / name
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            sha.update(file.read_bytes())
for name in outputs:
    (results / name).parent.mkdir(parents=True, exist_ok=True)
    (results / name).write_text(json.dumps({"file": name, "inputs": sha.hexdigest()}))
"""


def environment(folder: Path) -> dict[str, str]:
    """Return variables that isolate DVC and git from the user's settings, and put this Python first on PATH."""
    return {
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(folder / "site"),
        "DVC_GLOBAL_CONFIG_DIR": str(folder / "global"),
        "DVC_SYSTEM_CONFIG_DIR": str(folder / "system"),
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }


def make_project(root: Path) -> Path:
    """Create a git repository with our DVC files, in which nothing has run."""
    for name in ("dvc.yaml", ".dvcignore", ".dvc/config", ".dvc/.gitignore"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, root / name)
    (root / "params.yaml").write_text(PARAMS)
    (root / ".gitignore").write_text("/ran.log\n__pycache__/\n")
    folders = ("conditions/.gitkeep", "masks/.gitkeep")
    for name in ("ball.mp4", "ball.csv", "man.mp4", "man.csv", "scenes/ball.json", *folders):
        (root / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "data" / name).write_text(name)
    (root / "tasks").mkdir()
    (root / "tasks/__init__.py").touch()
    (root / "tasks/__main__.py").write_text(TASKS)
    git(root, "init", "-q")
    commit_all(root)
    return root


def git(root: Path, *arguments: str) -> str:
    return _call(root, "git", "-c", "user.name=test", "-c", "user.email=test@example.org", *arguments)


def commit_all(root: Path) -> None:
    git(root, "add", "-A")
    git(root, "commit", "-qm", "state")


def dvc(root: Path, *arguments: str) -> str:
    return _call(root, sys.executable, "-m", "dvc", *arguments)


def run_stage(root: Path, stage: str, clip: str) -> None:
    _call(root, sys.executable, "-m", "tasks", stage, "--clip", clip)


def _call(root: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def take_runs(root: Path) -> list[str]:
    """Return the stages that have run since the last call."""
    log = root / "ran.log"
    runs = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return runs


def contents(root: Path) -> dict[str, bytes]:
    """Return the contents of all files that a run leaves, including DVC's cache and run cache."""
    skip = {".git", "tmp", "__pycache__", "ran.log"}
    files = (path for path in root.rglob("*") if path.is_file())
    relative = {path.relative_to(root): path for path in files}
    return {name.as_posix(): path.read_bytes() for name, path in relative.items() if not skip & set(name.parts)}
