"""What Prefect, DVC and MLflow add to the computing: a run with nothing to do, and where the sample run's time goes.

python -m benchmarks.orchestration [--out FOLDER]

Works in fresh clones of the last commit, with this Python, on free ports.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
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

from benchmarks.toyworld import ROOT, Measure, markdown, table
from tav_model.errors import TavError
from tav_model.files import read_json, write_json

STAGES = ("decode", "encode", "tune", "invert", "edit", "score")
DEPLOYMENT = ("prefect", "deployment", "run", "tav/edit-batch", "--watch")
QUICK = {
    "decode": {"frames": 4, "width": 64, "height": 64},
    "tune": {"steps": 4},
    "invert": {"steps": 3},
    "edit": {"steps": 3},
}


def clone(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    return folder


def run(project: Path, *command: str, **environment: str) -> float:
    """Seconds that a command takes in the project.

    Raises:
        TavError: it fails.
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
    """The sample clip from end to end in two fresh clones, and a table of where the time goes."""
    wall = run(by_dvc, "dvc", "repro", "score@ball", OMP_WAIT_POLICY="ACTIVE")
    first = _parts(by_dvc, wall, "DVC, and the start and the imports of six processes")
    with _served(by_prefect, OMP_WAIT_POLICY="ACTIVE") as environment:
        run(by_prefect, *DEPLOYMENT, "--param", 'clips=["ball"]', **environment)
        flow = _flow_seconds(by_prefect, environment)
    second = _parts(by_prefect, flow, "Prefect, DVC's bookkeeping, imports")
    rows = [["", "dvc repro, s", "share", "Prefect flow, s", "share"]]
    for name in {**first, **second}:
        cells = [
            (f"{parts[name]:.1f}", f"{100 * parts[name] / whole:.0f} %") if name in parts else ("", "")
            for parts, whole in ((first, wall), (second, flow))
        ]
        rows.append([name, *(cell for pair in cells for cell in pair)])
    rows.append(["all", f"{wall:.1f}", "100 %", f"{flow:.1f}", "100 %"])
    measures = []
    for door, parts, whole in (("dvc repro", first, wall), ("the flow", second, flow)):
        computing = sum(seconds for name, seconds in parts.items() if name.endswith("computing"))
        measures.append(Measure("sample run", f"seconds, {door}", whole, percent=False))
        measures.append(Measure("sample run", f"not computing, {door}", 1 - computing / whole, 0.2, at_most=True))
    return measures, markdown(rows)


def _parts(project: Path, wall: float, rest: str) -> dict[str, float]:
    """Where the seconds went; `rest` is what the time outside of the stages is called."""
    inside = read_json(project / ".tav" / "timings" / "ball.json")
    computing = {stage: _loop_seconds(project / "logs" / "ball" / f"{stage}.log") for stage in STAGES}
    parts = {f"{stage}: computing": computing[stage] for stage in STAGES[1:]}
    parts["loading models, reading and writing files, MLflow"] = sum(inside.values()) - sum(computing.values())
    parts[rest] = wall - sum(inside.values())
    return parts


def _loop_seconds(log: Path) -> float:
    """From the log's time stamps: of the loop over frames, steps or videos."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    stamps = [line.partition(" ")[0] for line in lines if re.search(r": (starts|done), ", line)]
    if len(stamps) < 2:
        return 0.0
    first, last = map(datetime.fromisoformat, stamps[-2:])
    return (last - first).total_seconds()


def measure_nothing_to_do(project: Path) -> list[Measure]:
    """All four sample clips, at small settings, up to date: by DVC, and by the deployment with a server running."""
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
            Measure("nothing to do", "seconds, the flow's run", _flow_seconds(project, environment), 5, True, False)
        )
        measures.append(Measure("nothing to do", "seconds, prefect deployment run --watch", wall, percent=False))
    return measures


@contextlib.contextmanager
def _served(project: Path, **environment: str) -> Iterator[dict[str, str]]:
    environment |= {
        "PREFECT_HOME": str(project / ".tav" / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{_free_port()}/api",
        "TAV_MLFLOW_PORT": str(_free_port()),
    }
    log = project / ".tav" / "serve.log"
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
    """From the start of the latest flow run to its end, as Prefect has it."""
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.orchestration", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=ROOT / "results" / "benchmarks" / "orchestration", help="(default: %(default)s)"
    )
    out = parser.parse_args(arguments).out.resolve()
    try:
        sample, where = measure_sample_run(clone(out / "by-dvc"), clone(out / "by-prefect"))
        print(f"{where}\n", flush=True)
        measures = [*sample, *measure_nothing_to_do(clone(out / "nothing"))]
    except TavError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(measures))
    write_json(out / "measures.json", [dataclasses.asdict(m) | {"reached": m.reached} for m in measures])
    return 0 if all(measure.reached for measure in measures) else 1


if __name__ == "__main__":
    sys.exit(main())
