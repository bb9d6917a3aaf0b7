"""`tav doctor`: check what works on this machine and in this project, what does not, and what to do about it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Literal
from urllib.parse import quote, urlsplit

from rich.table import Table
from rich.text import Text

from flows.services import (
    answers,
    api_url,
    is_free,
    mlflow_port_setting,
    running,
    served_project,
    serving_api,
)
from tav.config import DecodeParams, Params, load_params
from tav.config.paths import model_folders, resolve_model
from tav.runtime.exit_status import ExitStatus
from tav.runtime.progress_display import is_quiet
from tav.runtime.redaction import redact
from tav.tracking.store import project_root, resolve_uri
from tav_cli.terminal import ProgressBars, output_console, print_json
from tav_model.base_models import PARTS
from tav_model.errors import TavError, first_line
from tav_model.files import read_json
from tav_model.tensors import read_shapes

GIB = 2**30
# GiB below which nothing runs, and below which a model of Stable Diffusion's size does not.
MEMORY_GIB, DISK_GIB = (1, 8), (0.5, 5)
STYLES = {"ok": "green", "warning": "yellow", "problem": "bold red"}
MAX_PACKAGES = 4


@dataclass(frozen=True)
class Check:
    """The result of a check, and what to do where it is not ok."""

    name: str
    state: Literal["ok", "warning", "problem"]
    found: str
    advice: str = ""


def doctor(root: Path, as_json: bool) -> ExitStatus:
    """Run all checks and print them; FAILED: there is a problem."""
    with ProgressBars() as bars, bars.activity("checking"):
        checks = list(_checks(root))
    problems = sum(check.state == "problem" for check in checks)
    if as_json:
        print_json({"problems": problems, "checks": [asdict(check) for check in checks]})
        return ExitStatus.FAILED if problems else ExitStatus.SUCCESS
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        if check.state == "ok" and is_quiet():
            continue
        text = Text(check.found)
        if check.advice:
            text.append(f"\n→ {check.advice}")
        table.add_row(Text(check.state, style=STYLES[check.state]), check.name, text)
    output_console().print(table)
    return ExitStatus.FAILED if problems else ExitStatus.SUCCESS


def _checks(root: Path) -> Iterator[Check]:
    yield _python()
    yield from _guarded("packages", lambda: _packages(root))
    yield from _guarded("torch", _torch)
    yield from _guarded("GPU", _gpus)
    yield from _guarded("threads", _threads)
    yield from _guarded("memory", _memory)
    yield from _guarded("disk", lambda: _disk(root))
    yield from _guarded("codecs", _codecs)
    yield from _guarded("git", lambda: _git(root))
    yield from _guarded("DVC", lambda: _dvc(root))
    for folder in model_folders():
        yield from _guarded("TAV_MODELS", partial(_models, folder))
    try:
        params = load_params(root / "params.yaml")
    except TavError as error:
        yield Check("params.yaml", "problem", str(error), "correct the file")
        return
    yield Check("params.yaml", "ok", f"{len(params.clips)} clips: {', '.join(params.clips)}")
    yield from _guarded("clips", lambda: _clips(root, params))
    yield from _guarded("device", lambda: _device(params))
    clips = [params.for_clip(clip) for clip in params.clips]
    for name in dict.fromkeys(clip.base_model for clip in clips):
        yield from _guarded("base model", partial(_model, root, "base model", name, "base_model", PARTS))
    control = [one for clip in clips for one in clip.control]
    for key in ("model", "annotator", "detector"):
        for network in dict.fromkeys(getattr(one, key) for one in control):
            if network:
                yield from _guarded(f"control {key}", partial(_model, root, f"control {key}", network, "control", ()))
    for key in ("clip_model", "pickscore_model"):
        for scorer in dict.fromkeys(getattr(clip.score, key) for clip in clips):
            if scorer:
                yield from _guarded(key, partial(_model, root, key, scorer, f"score.{key}", ()))
    if all(clip.score.clip_model is None for clip in clips):
        yield Check("clip_model", "ok", "none: scores that need a CLIP model are not computed")
    yield from _guarded("Prefect", lambda: _prefect(root))
    yield from _guarded("MLflow", lambda: _mlflow(root, params))


def _guarded(name: str, check: Callable[[], Check]) -> Iterator[Check]:
    """Yield the check, or a problem where it raises, so that the other checks still run."""
    try:
        yield check()
    except TavError as error:
        yield Check(name, "problem", str(error))
    except Exception as error:
        yield Check(name, "problem", f"the check failed ({type(error).__name__}: {first_line(error)})")


# The machine


def _python() -> Check:
    found = f"{sys.version.split()[0]} in {sys.prefix}"
    if (3, 11) <= sys.version_info < (3, 13):
        return Check("Python", "ok", found)
    return Check("Python", "problem", found, "Python 3.11 or 3.12 is required; make install PYTHON=python3.11")


def _packages(root: Path) -> Check:
    """Compare the installed packages with the versions that the project was tested with."""
    path = root / "constraints.txt"
    if not path.is_file():
        return Check("packages", "warning", "no constraints.txt to compare with", "git checkout constraints.txt")
    tested = re.findall(r"^([\w.-]+)==([^\s;#]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    different = []
    for name, version in tested:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed = importlib.metadata.version(name)
            if installed.partition("+")[0] != version:
                different.append(f"{name} {installed} (tested: {version})")
    if not different:
        return Check("packages", "ok", f"{len(tested)} versions as tested")
    more = f" and {len(different) - MAX_PACKAGES} more" if len(different) > MAX_PACKAGES else ""
    advice = "pip install -c constraints.txt -e . installs the tested ones"
    return Check("packages", "warning", f"{', '.join(different[:MAX_PACKAGES])}{more}", advice)


def _torch() -> Check:
    import torch

    from tav.runtime.devices import multiplies_in_bfloat16

    bfloat16 = "bf16" if multiplies_in_bfloat16("cpu") else "no bf16"
    capability = torch.backends.cpu.get_cpu_capability()
    found = f"{torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} CPUs, {capability}, {bfloat16}"
    if capability == "DEFAULT":
        return Check(
            "torch", "warning", found, "this processor has no AVX2; expect everything to take many times longer"
        )
    return Check("torch", "ok", found)


def _gpus() -> Check:
    import torch

    from tav.runtime.devices import multiplies_in_bfloat16

    if torch.cuda.is_available():
        parts = []
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            bfloat16 = "bf16" if multiplies_in_bfloat16(f"cuda:{number}") else "no bf16"
            name = torch.cuda.get_device_name(number)
            parts.append(f"cuda:{number} {name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, {bfloat16}")
        return Check("GPU", "ok", "; ".join(parts))
    if torch.backends.mps.is_available():
        return Check("GPU", "ok", "Apple GPU (mps)")
    if shutil.which("nvidia-smi"):
        build = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        advice = f"this torch {build}; install the build that matches the driver"
        return Check("GPU", "warning", "a driver is installed, but torch finds no GPU", advice)
    return Check("GPU", "ok", "none: everything runs on the CPU, where toyworld is fast and Stable Diffusion slow")


def _threads() -> Check:
    policy = os.environ.get("OMP_WAIT_POLICY", "unset")
    load, cpus = os.getloadavg()[0], os.cpu_count() or 1
    found = f"OMP_WAIT_POLICY {policy}, load {load:.1f} on {cpus} CPUs"
    if policy.upper() == "ACTIVE" and load > cpus / 2:
        advice = "unset OMP_WAIT_POLICY: threads that spin while they wait slow down a busy machine many times"
        return Check("threads", "warning", found, advice)
    return Check("threads", "ok", found)


def _memory() -> Check:
    import psutil

    free = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")  # of the container, which may have less than the machine
    with contextlib.suppress(OSError, ValueError):
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = min(free, int(limit.read_text()) - used)
    return _amount("memory", free, MEMORY_GIB, "stop other programs; Stable Diffusion needs 8 GiB, or less on a GPU")


def _disk(root: Path) -> Check:
    free = shutil.disk_usage(root).free
    return _amount("disk", free, DISK_GIB, "dvc gc -w removes versions that the workspace does not use")


def _amount(name: str, free: float, bounds: tuple[float, float], advice: str) -> Check:
    minimum, recommended = bounds
    found = f"{free / GIB:.1f} GiB free"
    if free < minimum * GIB:
        return Check(name, "problem", found, advice)
    return Check(name, "warning", found, advice) if free < recommended * GIB else Check(name, "ok", found)


def _codecs() -> Check:
    """Write a clip with PyAV's libx264, and read it as users' clips are read."""
    import decord  # noqa: F401 (the reader falls back to PyAV without it)
    import numpy as np

    from tav.media.decoding import read_frames
    from tav_model.video import write_video

    with tempfile.TemporaryDirectory(prefix="tav-") as folder:
        path = Path(folder) / "grey.mp4"
        write_video(path, np.full((2, 64, 64, 3), 128, np.uint8), Fraction(8))
        decode = DecodeParams(frames=2, width=64, height=64)
        frames, _ = read_frames(path, decode, seconds=60)
    if frames.shape != (2, 64, 64, 3) or abs(float(frames.mean()) - 128) > 8:
        return Check(
            "codecs", "problem", "a video that was written and read again differs", "pip install --force-reinstall av"
        )
    return Check("codecs", "ok", "H.264 can be written (PyAV) and read (decord)")


# The project


def _git(root: Path) -> Check:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        return Check("git", "problem", "git is not installed", "install it; DVC needs it")
    if done.returncode:
        return Check("git", "problem", first_line(done.stderr), "git init && git add -A && git commit -m start")
    return Check("git", "ok", f"at {done.stdout.strip()}")


def _dvc(root: Path) -> Check:
    if not (root / ".dvc" / "config").is_file():
        return Check("DVC", "problem", "no .dvc folder here", "dvc init")
    if not (root / "dvc.yaml").is_file():
        return Check("DVC", "problem", "no dvc.yaml here", "git checkout dvc.yaml")
    first = shutil.which("python")
    if first is None or Path(first).parent.resolve() != Path(sys.executable).parent.resolve():
        advice = "activate this environment before dvc repro: source .venv/bin/activate"
        return Check("DVC", "warning", f"its stages would run {first or 'no Python'}, not this one", advice)
    return Check("DVC", "ok", f"{importlib.metadata.version('dvc')}, initialised")


def _clips(root: Path, params: Params) -> Check:
    from tav.config.prompts import read_prompts

    problems = []
    for name, clip in params.clips.items():
        if not (root / clip.video).exists():
            problems.append(f"{name}: {clip.video}: no such file")
        try:
            read_prompts(root / clip.prompts)
        except TavError as error:
            problems.append(f"{name}: {str(error).replace(f'{root}/', '')}")
    if problems:
        advice = "correct or restore the files, or remove the clip from params.yaml"
        return Check("clips", "problem", "; ".join(problems), advice)
    return Check("clips", "ok", "videos and prompts exist and can be read")


def _device(params: Params) -> Check:
    from tav.runtime.devices import choose_device

    device = choose_device(params.runtime.device)
    clips = [params.for_clip(clip) for clip in params.clips]
    precisions = {part.precision for clip in clips for part in (clip.tune, clip.invert, clip.edit)}
    if device == "cpu" and "float16" in precisions:
        return Check("device", "warning", "cpu, with float16 in params.yaml", "use float32 or bfloat16 on a CPU")
    return Check("device", "ok", device)


def _models(folder: Path) -> Check:
    """List the models in a folder of TAV_MODELS."""
    if not folder.is_dir():
        return Check(
            "TAV_MODELS", "problem", f"{folder}: no such folder", "correct the environment variable TAV_MODELS"
        )
    found = [
        path.name for path in sorted(folder.iterdir()) if (path / "unet").is_dir() or (path / "config.json").is_file()
    ]
    if not found:
        advice = "put a base model there, in diffusers' layout"
        return Check("TAV_MODELS", "warning", f"{folder}: no models", advice)
    return Check("TAV_MODELS", "ok", f"{folder}: {', '.join(found)}")


def _model(root: Path, what: str, name: str, key: str, parts: tuple[str, ...]) -> Check:
    """Check that a model's files exist, its configurations can be read, and its weights are complete."""
    folder = Path(resolve_model(root, name))
    if not folder.is_dir():
        return _hub_model(what, name, key)
    for part in parts or (".",):
        configs = [path for path in sorted((folder / part).glob("*config.json")) if read_json(path) is not None]
        if not configs:
            return Check(what, "problem", f"{folder / part}: no configuration", f"choose another {key} in params.yaml")
    weights = sorted(folder.rglob("*.safetensors")) + sorted(folder.rglob("*.bin"))
    if not weights:
        advice = f"download it again, or choose another {key} in params.yaml"
        return Check(what, "problem", f"{folder}: no weights", advice)
    for path in weights:
        if path.suffix == ".safetensors":
            _check_header(path)
    size = sum(path.stat().st_size for path in weights)
    return Check(what, "ok", f"{name}, {size / 2**20:.0f} MiB of weights")


def _check_header(path: Path) -> None:
    """Check that a safetensors file has tensors and is as long as its header declares, unlike an incomplete download.

    Raises:
        TavError: it is not.
    """
    try:
        complete = bool(read_shapes(path)[0])
    except TavError:
        complete = False
    if not complete:
        raise TavError(f"{path}: not a complete safetensors file; download it again")


def _hub_model(what: str, name: str, key: str) -> Check:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    with contextlib.suppress(CacheNotFound):
        for repository in scan_cache_dir().repos:
            if repository.repo_id == name:
                return Check(what, "ok", f"{name}, {repository.size_on_disk / GIB:.1f} GiB in the Hugging Face cache")
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    if offline:
        advice = f"unset HF_HUB_OFFLINE for the first run, or name a folder as {key} in params.yaml"
        return Check(what, "problem", f"{name}: a hub id that was never downloaded, and HF_HUB_OFFLINE is set", advice)
    advice = f"the first run downloads it; without a network, name a folder as {key} in params.yaml"
    return Check(what, "warning", f"{name}: a hub id that was never downloaded", advice)


# The services


def _prefect(root: Path) -> Check:
    url = api_url(root)
    services = running(root)
    if services:
        if answers(f"{services.prefect}/api/health"):
            return Check("Prefect", "ok", f"running: {services.prefect}")
        return Check(
            "Prefect",
            "problem",
            f"{services.prefect} does not answer",
            "tav down && tav up; see logs/prefect-server.log",
        )
    address = urlsplit(url)
    if address.hostname not in ("127.0.0.1", "localhost"):
        if answers(f"{url}/health"):
            return Check("Prefect", "ok", f"{redact(url)} answers")
        return Check("Prefect", "problem", f"{redact(url)} does not answer", "start it, or change PREFECT_API_URL")
    port, setting = address.port or 80, "api.url in prefect.toml"
    if answers(f"{url}/health") and serving_api(root) is None:
        advice = f"tav run starts its own; for tav up, choose another port ({setting})"
        return Check("Prefect", "ok", f"port {port}: the Prefect server of {served_project(url)}", advice)
    return _port("Prefect", port, f"{url}/health", setting)


def _mlflow(root: Path, params: Params) -> Check:
    uri = params.tracking.uri
    if uri is None:
        return Check("MLflow", "ok", "off: tracking.uri is null in params.yaml")
    uri = resolve_uri(uri, project_root(root))
    safe_uri = redact(uri)
    if uri.startswith("http"):
        if answers(f"{uri.rstrip('/')}/health"):
            return Check("MLflow", "ok", f"{safe_uri} answers")
        advice = "start it, or change tracking.uri; runs work without it, and send what they have logged later"
        return Check("MLflow", "problem", f"{safe_uri} does not answer", advice)
    store = _store(uri, safe_uri)
    if store.state != "ok" or running(root):
        return store
    port = _port("MLflow", mlflow_port_setting(), "", "TAV_MLFLOW_PORT")
    return Check("MLflow", port.state, f"{store.found}; {port.found}", port.advice)


def _store(uri: str, safe_uri: str) -> Check:
    if not uri.startswith("sqlite:///"):
        import sqlalchemy

        with sqlalchemy.create_engine(uri).connect():
            return Check("MLflow", "ok", f"{safe_uri} can be reached")
    path = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    if not path.exists():
        if os.access(path.parent, os.W_OK):
            return Check("MLflow", "ok", f"the first run will create {path.name}")
        return Check("MLflow", "problem", f"{path.parent}: not a writable folder", "change tracking.uri")
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as database:
            (runs,) = database.execute("select count(*) from runs").fetchone()
    except sqlite3.Error as error:
        return Check("MLflow", "problem", f"{path}: {error}", "move it away, or change tracking.uri in params.yaml")
    return Check("MLflow", "ok", f"{path.name} with {runs} runs")


def _port(name: str, port: int, health: str, setting: str) -> Check:
    """Check that `tav up` could use the port."""
    if is_free(port):
        return Check(name, "ok", f"port {port} is free for tav up")
    if health and answers(health):
        advice = f"tav run uses it; for tav up, choose another port ({setting})"
        return Check(name, "ok", f"port {port}: a Prefect server that tav up did not start", advice)
    advice = f"stop the program that uses it, or choose another port ({setting})"
    return Check(name, "warning", f"port {port} is taken by another program; tav up cannot start", advice)
