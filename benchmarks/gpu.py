"""Measure a GPU in at most nine minutes: parity, speed and memory at the size of Stable Diffusion 1.5, the embedded model.

python -m benchmarks.gpu                                 24 frames of 512x512 on the GPU; without one, small sizes on the CPU
python -m benchmarks.gpu --parts forward tuning          these parts only
python -m benchmarks.gpu --out $OUT --wheels .whl        where diffusers is not installed: unpacked from a folder of wheels

Each part runs in a process of its own and has a limited time. Whatever a part has measured before it fails, or before its
time is over, is in the results. Weights are random, except those of the embedded model and of the golden tensors.

Exits with code 1 if a part has failed, an error is larger than parity allows, or, on an H100 or H200, a goal is missed: half
of the rate of matrix products in a forward pass, 500 steps of tuning in 60 s, an edit of 50 steps in 6 s.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measures import ROOT, Measure, markdown, table
from benchmarks.speed import TEXT_SHAPES, VAE_FACTOR, Setting
from tav_model.errors import TavError
from tav_model.files import write_json

# The parts of `benchmarks.gpu_parts` in the order in which they run, and the seconds that each may take of nine minutes. What
# is compiled comes last: if the device is slow, it is what can be done without.
BUDGETS = {
    "device": 20,
    "parity": 50,
    "forward": 50,
    "edits": 60,
    "default-edits": 45,
    "tuning": 50,
    "toyworld": 40,
    "cuda-graph": 30,
    "compiled-forward": 130,
    "compiled-tuning": 170,
}
MINUTES = 9.0
RESERVE = 5.0  # Seconds at the end for the tables and files.
# Parts are forked from a process that has imported the libraries once, which takes long where the disk is slow, and has not
# touched the GPU.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    ["benchmarks.gpu_parts", "tav_model.pipeline", "tav_model.tuning", "transformers.models.clip.modeling_clip"]
)
# What the parts import, by name of the module.
PACKAGES = ("diffusers", "einops", "numpy", "PIL", "safetensors", "torch", "transformers", "cv2")
GOLDEN = ROOT / "tests" / "golden" / "sd1-tiny"


@dataclass
class PartResult:
    """What a part has recorded.

    Attributes:
        name: name of the part.
        seconds: how long it took.
        failure: why it did not complete; None if it did.
        measures: its figures.
        timings: the timings that the figures of speed are taken from.
        machine: description of the machine, from the part that records it.
    """

    name: str
    seconds: float = 0.0
    failure: str | None = None
    measures: list[Measure] = field(default_factory=list)
    timings: list[dict[str, Any]] = field(default_factory=list)
    machine: dict[str, Any] | None = None


def run_part(name: str, seconds: float, work: Callable[[Path], int]) -> PartResult:
    """Run a part in a process of its own, and end it if it takes too long, with all processes that it has started.

    Args:
        name: name of the part.
        seconds: how long it may take.
        work: a function that can be pickled; appends figures to the file that it is given, and returns 0 if it is completed.
    """
    result = PartResult(name)
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.jsonl"
        started = time.monotonic()
        process = _PROCESSES.Process(target=_in_own_session, args=(work, record))
        process.start()
        try:
            process.join(seconds)
            if process.is_alive():
                result.failure = f"not finished in {seconds:.0f} s"
            elif code := process.exitcode:
                result.failure = f"ended by signal {-code}" if code < 0 else f"ended with code {code}"
        finally:
            process.kill()
            with contextlib.suppress(ProcessLookupError):  # The processes that compile outlive the part.
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
        result.seconds = time.monotonic() - started
        _read(record, result)
    return result


def _in_own_session(work: Callable[[Path], int], record: Path) -> None:
    os.setsid()
    os.dup2(2, 1)  # The tables alone are the output.
    sys.exit(work(record))


def _measure(name: str, setting: Setting, golden: Path, full: bool, record: Path) -> int:
    from benchmarks.gpu_parts import Run, measure_part

    return measure_part(name, Run(setting, golden, full, record))


def _read(record: Path, result: PartResult) -> None:
    """Read the lines of a record. The last one may be torn."""
    lines = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if "measure" in entry:
            value = entry["measure"]["value"]
            measure = entry["measure"] | {"value": float("inf") if value is None else value}
            result.measures.append(Measure(**measure))
        elif "timing" in entry:
            result.timings.append(entry["timing"])
        elif "machine" in entry:
            result.machine = entry["machine"]
        elif "failure" in entry:
            result.failure = entry["failure"]


@contextlib.contextmanager
def packages(wheels: Path | None) -> Iterator[None]:
    """Let the processes that are started within the context find their packages: those not installed come from wheels.

    Wheels of pure Python, such as that of diffusers, work as they are unpacked.

    Raises:
        TavError: packages that are neither installed nor in the folder of wheels.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    with tempfile.TemporaryDirectory() as folder:
        found = []
        if missing and wheels is not None and wheels.is_dir():
            for wheel in sorted(wheels.glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(folder)
            missing = [name for name in missing if not _is_in(Path(folder), name)]
            found.append(folder)
        if missing:
            raise TavError(
                f"not installed: {', '.join(missing)}; install them, or name a folder with their wheels (--wheels), "
                f"made by `pip download --no-deps --dest FOLDER {' '.join(missing)}`"
            )
        path, variable = list(sys.path), os.environ.get("PYTHONPATH")
        sys.path[:0] = found
        # For processes that parts start, such as those that compile.
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *found, *([variable] if variable else [])])
        try:
            yield
        finally:
            sys.path[:] = path
            if variable is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = variable


def _is_in(folder: Path, module: str) -> bool:
    return (folder / module).is_dir() or (folder / f"{module}.py").is_file()


def has_gpu() -> bool:
    """Return whether torch finds a GPU of CUDA. Asked in another process: this one starts no CUDA."""
    question = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 3)"
    return subprocess.run([sys.executable, "-c", question], cwd=ROOT, check=False).returncode == 0


def run_parts(
    chosen: Sequence[str],
    setting: Setting,
    golden: Path,
    full: bool,
    minutes: float,
    started: float,
) -> list[PartResult]:
    """Run the chosen parts one after the other, each in its share of `minutes`, or of what the parts before it have left."""
    end = started + 60 * minutes - RESERVE
    results = []
    for place, name in enumerate(chosen):
        left = end - time.monotonic()
        share = BUDGETS[name] / sum(BUDGETS[part] for part in chosen[place:])
        seconds = min(left, max(BUDGETS[name] * minutes / MINUTES, left * share))
        if seconds < 1:
            results.append(PartResult(name, failure="no time left"))
            continue
        print(f"{name}: at most {seconds:.0f} s", file=sys.stderr, flush=True)
        results.append(run_part(name, seconds, partial(_measure, name, setting, golden, full)))
    return results


def report(results: Sequence[PartResult]) -> str:
    """Return the tables of all figures, and of the parts with what became of them."""
    measures = [measure for result in results for measure in result.measures]
    rows = [["part", "outcome", "seconds"]]
    rows += [[result.name, result.failure or "completed", f"{result.seconds:.0f}"] for result in results]
    return f"{table(measures)}\n\n{markdown(rows)}" if measures else markdown(rows)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 if nothing has failed or missed its goal, 1 if something has, 2 after invalid arguments."""
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=summary,
        epilog=rest.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", help="cuda, cuda:N or cpu (default: cuda if there is a GPU)")
    parser.add_argument("--config", choices=sorted(TEXT_SHAPES), help="model (default: sd15; on the CPU toyworld)")
    parser.add_argument("--frames", type=int, metavar="N", help="frames (default: 24; on the CPU 2)")
    parser.add_argument(
        "--size", type=int, metavar="N", help="width and height in pixels (default: 512; on the CPU 32)"
    )
    parser.add_argument(
        "--parts", nargs="+", choices=list(BUDGETS), default=list(BUDGETS), metavar="PART", help=", ".join(BUDGETS)
    )
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, metavar="N", help="time for everything (default: %(default)s)"
    )
    parser.add_argument(
        "--golden", type=Path, default=GOLDEN, metavar="DIR", help="folder of the golden tensors (default: the tests')"
    )
    parser.add_argument(
        "--wheels",
        type=Path,
        default=ROOT / ".whl",
        metavar="DIR",
        help="wheels of packages that are not installed (default: the folder .whl of the checkout)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results/benchmarks/gpu"),
        metavar="DIR",
        help="folder for results (default: %(default)s)",
    )
    chosen = parser.parse_args(arguments)
    started = time.monotonic()
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # A library that looks for a GPU must not start CUDA.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # The part that is running ends, too.
    try:
        with packages(chosen.wheels):
            setting = _setting(chosen)
            results = run_parts(
                chosen.parts,
                setting,
                chosen.golden.resolve(),
                setting.device != "cpu",
                chosen.minutes,
                started,
            )
    except TavError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    machine = next((result.machine for result in results if result.machine), None)
    print(json.dumps((machine or {}) | dataclasses.asdict(setting)))
    print(report(results))
    path = _write(chosen.out, setting, machine, results)
    print(path)
    reached = all(measure.reached for result in results for measure in result.measures)
    return 0 if reached and not any(result.failure for result in results) else 1


def _setting(chosen: argparse.Namespace) -> Setting:
    """Return the setting that was chosen.

    Raises:
        TavError: numbers that are not allowed, a device that does not exist, no golden tensors.
    """
    device = chosen.device
    if device is None or device.startswith("cuda"):
        gpu = has_gpu()
        if device is not None and not gpu:
            raise TavError(f"--device: {device!r}: torch finds no GPU; leave the option out for small sizes on the CPU")
        device = device or ("cuda" if gpu else "cpu")
    elif device != "cpu":
        raise TavError(f"--device: {device!r} must be cuda, cuda:N or cpu")
    small = device == "cpu"
    frames = chosen.frames if chosen.frames is not None else 2 if small else 24
    size = chosen.size if chosen.size is not None else 32 if small else 512
    if frames < 1 or size < VAE_FACTOR or size % VAE_FACTOR or not chosen.minutes > 0:
        raise TavError(f"--frames must be at least 1, --size a multiple of {VAE_FACTOR}, and --minutes more than 0")
    if not (chosen.golden / "tensors.safetensors").is_file():
        raise TavError(f"--golden: {chosen.golden}: no tensors.safetensors there")
    return Setting(chosen.config or ("toyworld" if small else "sd15"), frames, size, device, "bfloat16")


def _write(folder: Path, setting: Setting, machine: dict[str, Any] | None, results: Sequence[PartResult]) -> Path:
    """Write all results as JSON, and the tables as Markdown; return the path of the JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    device = setting.device.replace(":", "-")
    path = folder / f"{setting.config}-{setting.frames}x{setting.size}-{device}.json"
    parts = []
    for result in results:
        part = dataclasses.asdict(result)
        for entry, measure in zip(part["measures"], result.measures, strict=True):
            entry["reached"] = measure.reached
            if entry["value"] == float("inf"):
                entry["value"] = None
        del part["machine"]
        parts.append(part)
    write_json(
        path,
        {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "machine": machine,
            "setting": dataclasses.asdict(setting),
            "parts": parts,
        },
    )
    path.with_suffix(".md").write_text(f"{report(results)}\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
