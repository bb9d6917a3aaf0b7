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
import signal
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


def measure_sample_run(project: Path) -> tuple[list[Measure], str]:
    """`make demo` after the installation, and a table of where its time goes."""
    wall = run(project, "dvc", "repro", "score@ball", OMP_WAIT_POLICY="ACTIVE")
    inside = read_json(project / ".tav" / "timings" / "ball.json")
    computing = {stage: _loop_seconds(project / "logs" / "ball" / f"{stage}.log") for stage in STAGES}
    rows = [["", "seconds", "share"]]
    parts = {f"{stage}: computing": computing[stage] for stage in STAGES[1:]}
    parts["loading models, reading and writing files, MLflow"] = sum(inside.values()) - sum(computing.values())
    parts["DVC, and the start and the imports of six processes"] = wall - sum(inside.values())
    rows += [[name, f"{seconds:.1f}", f"{100 * seconds / wall:.0f} %"] for name, seconds in parts.items()]
    rows.append(["all", f"{wall:.1f}", "100 %"])
    share = 1 - sum(computing.values()) / wall
    return [
        Measure("sample run", "seconds, by dvc repro", wall, percent=False),
        Measure("sample run", "not computing", share, 0.2, at_most=True),
    ], markdown(rows)


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
        command = ("prefect", "deployment", "run", "tav/edit-batch", "--watch")
        run(project, *command, **environment)
        wall = run(project, *command, **environment)
        measures.append(
            Measure("nothing to do", "seconds, the flow's run", _flow_seconds(project, environment), 5, True, False)
        )
        measures.append(Measure("nothing to do", "seconds, prefect deployment run --watch", wall, percent=False))
    return measures


@contextlib.contextmanager
def _served(project: Path) -> Iterator[dict[str, str]]:
    environment = {
        "PREFECT_HOME": str(project / ".tav" / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{_free_port()}/api",
        "TAV_MLFLOW_PORT": str(_free_port()),
    }
    log = project / ".tav" / "serve.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.serve"],
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
            process.send_signal(signal.SIGINT)
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
        sample, where = measure_sample_run(clone(out / "sample"))
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
