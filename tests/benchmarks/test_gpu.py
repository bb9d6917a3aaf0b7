"""The GPU benchmark at small sizes on the CPU: its parts, and how it keeps what a part measured before it failed."""

import json
import os
import subprocess
import sys
import time
import zipfile
from functools import partial

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import GOLDEN, PartResult, main, packages, report, run_part, run_parts
from benchmarks.gpu_parts import (
    DEFAULT_ARGUMENTS,
    GUIDANCE_SCALE,
    INVERSION_STEPS,
    PARTS,
    SAMPLING_STEPS,
    Run,
    measure_part,
)
from benchmarks.measures import ROOT, Measure
from benchmarks.speed import Setting
from tasks.source_settings import source_arguments
from tav.config import load_params
from tav.config.prompts import CATEGORIES, PromptRow
from tav_model.errors import TavError

SMALL = Setting("toyworld", 2, 32, "cpu", "bfloat16")


FIGURE = json.dumps({"measure": {"part": "forward", "name": "seconds", "value": 2.0, "percent": False}}) + "\n"


def fail(record):
    failure = json.dumps({"failure": "RuntimeError: CUDA error"})
    record.write_text(f"{FIGURE}{failure}\n")
    return 1


def abort(record):
    os.abort()


def tear(record):
    record.write_text('{"mea')
    return 0


def wait_for_a_child(marker, record):
    record.write_text(FIGURE)
    child = subprocess.Popen(["sleep", "300"])
    marker.write_text(str(child.pid))
    return child.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=[pytest.mark.long] if part.startswith("compiled") else []) for part in PARTS]
)
def test_a_part_at_small_size(part, tmp_path):
    record = tmp_path / "record"
    code = measure_part(part, Run(SMALL, GOLDEN, False, record))
    result = PartResult(part)
    gpu._read(record, result)
    assert (code, result.failure) == (0, None)
    assert result.measures
    assert [measure for measure in result.measures if not measure.reached] == []
    torch._dynamo.reset()


@pytest.mark.slow
def test_tables_and_json(tmp_path, capsys):
    assert main(["--device", "cpu", "--parts", "device", "--minutes", "60", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "| device | matrix products in bfloat16, TFLOP/s" in out and "completed" in out
    record = json.loads((tmp_path / "toyworld-2x32-cpu.json").read_text())
    assert record["machine"]["torch"] == torch.__version__
    (part,) = record["parts"]
    assert part["failure"] is None and part["measures"][0]["value"] > 0
    assert "| device |" in (tmp_path / "toyworld-2x32-cpu.md").read_text()


def test_budgets_are_for_the_parts_and_fit():
    assert list(gpu.BUDGETS) == sorted(PARTS, key=list(gpu.BUDGETS).index)
    assert sum(gpu.BUDGETS.values()) <= 1.25 * 60 * gpu.MINUTES  # Most parts end before their time is over.


@pytest.mark.parametrize("category", CATEGORIES)
def test_default_edits_are_those_of_the_pipeline(category):
    params = load_params(ROOT / "params.yaml")
    row = PromptRow(line=1, prompt="a blue ball", name="blue", category=category)
    _, arguments = source_arguments(row, params.edit)
    assert arguments.pop("sampler") == params.edit.sampler == "dpm-solver++"
    assert {"mask_end", "mask_feather"} <= arguments.keys() or "mask" not in arguments
    for default in ("mask_end", "mask_feather"):
        arguments.pop(default, None)
    assert arguments == DEFAULT_ARGUMENTS[category]
    assert (params.edit.guidance_scale, params.edit.steps) == (GUIDANCE_SCALE, SAMPLING_STEPS)
    assert params.invert.steps == INVERSION_STEPS


def test_what_was_measured_before_a_failure_is_kept():
    result = run_part("forward", 60, fail)
    assert [measure.value for measure in result.measures] == [2.0]
    assert result.failure == "RuntimeError: CUDA error"
    assert run_part("forward", 60, abort).failure == "ended by signal 6"
    assert run_part("forward", 60, tear).measures == []


def test_a_part_and_its_processes_end_when_its_time_is_over(tmp_path):
    marker = tmp_path / "pid"
    run_part("forward", 60, tear)  # The libraries are imported before.
    started = time.monotonic()
    result = run_part("forward", 3, partial(wait_for_a_child, marker))
    assert time.monotonic() - started < 60
    assert result.failure == "not finished in 3 s" and len(result.measures) == 1
    pid = int(marker.read_text())
    for _ in range(100):
        if not _is_running(pid):
            return
        time.sleep(0.1)
    pytest.fail("the process that the part has started is still running")


def _is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_no_part_starts_when_all_time_is_over():
    results = run_parts(["device"], SMALL, GOLDEN, False, minutes=9, started=time.monotonic() - 600)
    assert [result.failure for result in results] == ["no time left"]


@pytest.mark.parametrize(
    ("result", "code"),
    [
        (PartResult("forward", measures=[Measure("forward", "share", 0.6, 0.5)]), 0),
        (PartResult("forward", measures=[Measure("forward", "share", 0.4, 0.5)]), 1),
        (PartResult("forward", measures=[Measure("edit", "error", float("inf"), 0.5, at_most=True)]), 1),
        (PartResult("forward", failure="not finished in 3 s"), 1),
    ],
)
def test_a_missed_goal_and_a_failure_are_the_exit_code(result, code, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "run_part", lambda *_: result)
    assert main(["--device", "cpu", "--parts", "forward", "--out", str(tmp_path)]) == code
    assert report([result]) in capsys.readouterr().out
    assert json.loads((tmp_path / "toyworld-2x32-cpu.json").read_text())["parts"][0]["name"] == "forward"


def test_goals_are_for_the_gpus_and_the_size_that_they_were_set_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    full = Setting("sd15", 24, 512, "cuda", "bfloat16")
    assert Run(full, GOLDEN, True, GOLDEN).goal(6.0) == 6.0
    assert Run(Setting("sd15", 8, 512, "cuda", "bfloat16"), GOLDEN, True, GOLDEN).goal(6.0) is None
    assert Run(SMALL, GOLDEN, False, GOLDEN).goal(6.0) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A10G")
    assert Run(full, GOLDEN, True, GOLDEN).goal(6.0) is None


def test_missing_packages_come_from_wheels(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "PACKAGES", ("torch", "some_package_of_a_wheel"))
    with pytest.raises(TavError, match="some_package_of_a_wheel"), packages(tmp_path):
        pass
    with zipfile.ZipFile(tmp_path / "some_package_of_a_wheel-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("some_package_of_a_wheel/__init__.py", "")
    before = list(sys.path), dict(os.environ)
    with packages(tmp_path):
        __import__("some_package_of_a_wheel")
        subprocess.run([sys.executable, "-c", "import some_package_of_a_wheel"], check=True)
    assert (sys.path, dict(os.environ)) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["--device", "cpu", "--size", "60"],
        ["--device", "cpu", "--frames", "0"],
        ["--device", "cpu", "--minutes", "0"],
        ["--device", "cpu", "--golden", "nowhere"],
        ["--device", "mps"],
    ],
)
def test_bad_arguments_are_one_line(arguments, capsys):
    assert main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
