"""Measure the overhead of Prefect, DVC and MLflow: in a run with nothing to do, and in the sample run.

python -m benchmarks.orchestration [--out DIR]

Works in fresh clones of the last commit, with the current Python, on free ports. Exits with code 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import yaml

from benchmarks.measures import ROOT, Measure, markdown, table, write_measures
from tav_model.errors import TavError
from tav_model.files import read_json

STAGES = ("decode", "encode", "tune", "invert", "edit", "score")
DEPLOYMENT = ("prefect", "deployment", "run", "tav/edit-batch", "--watch")
QUICK = {
    "decode": {"frames": 4, "width": 64, "height": 64},
    "tune": {"steps": 4},
    "invert": {"steps": 3},
    "edit": {"steps": 3},
}


def clone(folder: Path) -> Path:
    """Clone the last commit into a new folder, and return the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    return folder


def run(project: Path, *command: str, **environment: str) -> float:
    """Run a command in the project, and return the seconds that it takes.

    Raises:
        TavError: if it fails.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    start = time.perf_counter()
    done = subprocess.run(
        command, cwd=project, env=os.environ | {"PATH": path} | environment, capture_output=True, text=True
    )
    if done.returncode:
        raise TavError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return time.perf_counter() - start


def measure_sample_run(by_dvc: Path, by_prefect: Path) -> tuple[list[Measure], str]:
    """Run the sample clip through DVC and through Prefect, and return the measures and a table of where the time goes."""
    wall = run(by_dvc, "dvc", "repro", "score@ball")
    dvc_parts = _parts(by_dvc, wall, "DVC, and starting six processes")
    with _served(by_prefect) as environment:
        run(by_prefect, *DEPLOYMENT, "--param", 'clips=["ball"]', **environment)
        flow = _flow_seconds(by_prefect, environment)
    flow_parts = _parts(by_prefect, flow, "Prefect, DVC, and imports")
    rows = [["", "dvc repro, s", "share", "Prefect flow, s", "share"]]
    for name in {**dvc_parts, **flow_parts}:
        cells = [
            (f"{parts[name]:.1f}", f"{100 * parts[name] / total:.0f} %") if name in parts else ("", "")
            for parts, total in ((dvc_parts, wall), (flow_parts, flow))
        ]
        rows.append([name, *(cell for pair in cells for cell in pair)])
    rows.append(["total", f"{wall:.1f}", "100 %", f"{flow:.1f}", "100 %"])
    measures = []
    for entry_point, parts, total in (("dvc repro", dvc_parts, wall), ("Prefect flow", flow_parts, flow)):
        computing = sum(seconds for name, seconds in parts.items() if name.endswith("computing"))
        measures.append(Measure("sample run", f"seconds, {entry_point}", total, percent=False))
        measures.append(Measure("sample run", f"overhead, {entry_point}", 1 - computing / total, 0.2, at_most=True))
    return measures, markdown(rows)


def _parts(project: Path, wall: float, rest: str) -> dict[str, float]:
    """Return where the seconds went; `rest` names the time outside the stages."""
    inside = read_json(project / ".tav" / "timings" / "ball.json")
    computing = {stage: _loop_seconds(project / "logs" / "ball" / f"{stage}.log") for stage in STAGES}
    parts = {f"{stage}: computing": computing[stage] for stage in STAGES[1:]}
    parts["loading models, reading and writing files, MLflow"] = sum(inside.values()) - sum(computing.values())
    parts[rest] = wall - sum(inside.values())
    return parts


def _loop_seconds(log: Path) -> float:
    """Return the seconds of a stage's loop over frames, steps or videos, by the timestamps of its log."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    stamps = [line.partition(" ")[0] for line in lines if re.search(r": (starts|done), ", line)]
    if len(stamps) < 2:
        return 0.0
    first, last = map(datetime.fromisoformat, stamps[-2:])
    return (last - first).total_seconds()


def measure_nothing_to_do(project: Path) -> list[Measure]:
    """Run all four sample clips with small settings, then again when they are up to date: by DVC and by the deployment."""
    path = project / "params.yaml"
    params = yaml.safe_load(path.read_text(encoding="utf-8"))
    for section, values in QUICK.items():
        params[section] |= values
    path.write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    run(project, "dvc", "repro")
    measures = [Measure("nothing to do", "seconds, dvc repro", run(project, "dvc", "repro"), 5, True, False)]
    with _served(project) as environment:
        run(project, *DEPLOYMENT, **environment)
        wall = run(project, *DEPLOYMENT, **environment)
        measures.append(
            Measure("nothing to do", "seconds, Prefect flow run", _flow_seconds(project, environment), 5, True, False)
        )
        measures.append(Measure("nothing to do", "seconds, prefect deployment run --watch", wall, percent=False))
    return measures


@contextlib.contextmanager
def _served(project: Path, **environment: str) -> Iterator[dict[str, str]]:
    """Run the services of `tav up` for the project, and yield the environment to reach them."""
    environment |= {
        "PREFECT_HOME": str(project / ".tav" / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{_free_port()}/api",
        "TAV_MLFLOW_PORT": str(_free_port()),
    }
    log = project / ".tav" / "services.log"
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.services"],
            cwd=project,
            env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"} | environment,
            stdout=output,
            stderr=output,
        )
        try:
            while "ready:" not in log.read_text():
                if process.poll() is not None:
                    raise TavError(log.read_text())
                time.sleep(0.2)
            yield environment
        finally:
            process.terminate()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _flow_seconds(project: Path, environment: dict[str, str]) -> float:
    """Return the duration of the latest flow run, as recorded by Prefect."""
    script = """
import asyncio, json
from prefect import get_client
async def main():
    async with get_client() as client:
        latest = max(await client.read_flow_runs(), key=lambda run: run.start_time)
        print("SECONDS", latest.total_run_time.total_seconds())
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=project,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(re.search(r"SECONDS ([\d.]+)", done.stdout)[1])


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 if all targets are reached, 1 if not, 2 if a command fails."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.orchestration",
        description=__doc__.partition("\n")[0],
        epilog="Exits with code 1 if a target is missed.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "results" / "benchmarks" / "orchestration",
        metavar="DIR",
        help="folder for results (default: %(default)s)",
    )
    out = parser.parse_args(arguments).out.resolve()
    try:
        sample, breakdown = measure_sample_run(clone(out / "by-dvc"), clone(out / "by-prefect"))
        print(f"{breakdown}\n", flush=True)
        measures = [*sample, *measure_nothing_to_do(clone(out / "nothing"))]
    except TavError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(measures))
    write_measures(out / "measures.json", measures)
    return 0 if all(measure.reached for measure in measures) else 1


if __name__ == "__main__":
    sys.exit(main())
