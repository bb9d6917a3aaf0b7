"""Rows of a batch on a Ray cluster of two workers: bit-identical to one process, whatever moves the inputs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.loveu_tgve import quick_overrides, write_benchmark
from tests.support.projects import QUICK, change_params, fresh_clone, run
from tests.support.servers import free_port, run_deployment, serving, task_runs

CLIP = "ball"
RESULT = ("edits", "scores")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """The address of a cluster of two workers, each with a cache folder of its own."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=0, gcs_server_port=free_port(), include_dashboard=False)
        for number in (1, 2):
            cluster.add_node(
                num_cpus=1,
                env_vars={"TAV_WORKSPACES": str(tmp_path / f"worker-{number}"), "PATH": os.environ["PATH"]},
            )
        yield cluster.address
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_clips_of_a_benchmark_on_the_cluster(tmp_path: Path, cluster: str) -> None:
    clone = project(tmp_path / "project")
    folder = write_benchmark(tmp_path / "tgve")
    settings = [argument for override in quick_overrides() for argument in ("--set", override)]
    run(clone, "tav", "benchmark", str(folder), "--out", "alone", *settings, **ONE_THREAD)
    run(
        clone,
        "tav",
        "benchmark",
        str(folder),
        "--out",
        "ray",
        *settings,
        "--set",
        f"runtime.ray={cluster}",
        **ONE_THREAD,
    )

    def submission(out: str) -> dict[str, bytes]:
        root = clone / out / "submission"
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.jpg")}

    assert submission("ray") == submission("alone") and submission("ray")
    assert (clone / "ray/results.csv").read_text() == (clone / "alone/results.csv").read_text()


def project(folder: Path) -> Path:
    clone = fresh_clone(folder)
    clips = {CLIP: {"video": "data/ball.mp4", "caption": "a red ball", "prompts": "data/ball.csv", "decode": {}}}
    change_params(clone, QUICK, clips)
    return clone


def files(clone: Path) -> dict[str, bytes]:
    results = clone / "results" / CLIP
    return {
        path.relative_to(results).as_posix(): path.read_bytes()
        for name in RESULT
        for path in sorted((results / name).rglob("*"))
        if path.is_file()
    }


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "remote",
    [
        pytest.param(True, id="by a DVC remote", marks=pytest.mark.long),
        pytest.param(False, id="by a shared folder", marks=pytest.mark.long),
    ],
)
def test_same_bits_as_in_one_process(tmp_path: Path, prefect: dict[str, str], cluster: str, remote: bool) -> None:
    alone = project(tmp_path / "alone")
    run(alone, "dvc", "repro", **ONE_THREAD)

    driver = project(tmp_path / "driver")
    if remote:
        run(driver, "dvc", "remote", "add", "-d", "storage", str(tmp_path / "storage"))
    change_params(driver, {"runtime": {"ray": cluster}})
    with serving(driver, prefect | ONE_THREAD):
        run_deployment(driver, prefect)
        names = task_runs(prefect)
        assert sum(name.startswith("edit: ") for name in names) == 5 and f"score: {CLIP}" in names
    assert files(driver) == files(alone)
    assert "up to date" in run(driver, "dvc", "status").stdout

    workers = [tmp_path / f"worker-{number}" for number in (1, 2)]
    if remote:
        for worker in workers:
            (workspace,) = [path for path in worker.iterdir() if (path / "params.yaml").exists()]
            pulled = sorted(path.name for path in (workspace / "results" / CLIP).rglob("*") if path.is_file())
            assert {"inverted.safetensors", "tuned.json", "tuned.safetensors", "edit.json"} <= set(pulled)
    else:
        assert not any(worker.exists() for worker in workers)
