"""The speed benchmark: what it prints and writes on the smallest sizes, and its arithmetic."""

import json

import pytest
import torch

from benchmarks import speed
from benchmarks.measures import Measure
from benchmarks.speed import PARTS, Setting, Timing, count_flop, exponent, main, stated_figures, timing_table

EPYC = "AMD EPYC 7B13"


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch):
    monkeypatch.setattr(speed, "matrix_rate", lambda *_: 1e11)


@pytest.mark.slow
def test_table_and_json_of_every_part(tmp_path, capsys):
    assert main(["--frames", "2", "--size", "32", "--device", "cpu", "--repeats", "2", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(f"| {part} " in out for part in PARTS)
    record = json.loads((tmp_path / "toyworld-2x32-cpu-float32.json").read_text())
    assert [timing["part"] for timing in record["timings"]] == list(PARTS)
    for timing in record["timings"]:
        assert 0 < timing["fastest"] <= timing["seconds"] <= timing["slowest"]
        assert timing["flop"] > 1e6 and timing["peak_gib"] > 0.1
    forward, tuning, inversion, edit, edits = (timing["flop"] for timing in record["timings"])
    assert inversion == forward and edit == pytest.approx(2 * forward, rel=0.01)  # Guidance: two videos.
    assert edits == pytest.approx(4 * edit, rel=0.01)
    assert 1.7 * forward < tuning < 3 * forward  # There and back, and few weights' gradients.


def test_sparse_against_full_attention(tmp_path, capsys):
    arguments = ["--size", "64", "--device", "cpu", "--repeats", "1", "--attention", "--out", str(tmp_path)]
    assert main(arguments) == 0
    name = "toyworld-8x64-cpu-float32-attention"
    found = json.loads((tmp_path / f"{name}.json").read_text())["attention"]
    assert [one["attention"] for one in found] == [["first", "former"], ["all"]]
    assert (tmp_path / f"{name}.png").stat().st_size > 1000
    assert "| all " in capsys.readouterr().out


@pytest.mark.long
def test_growth(tmp_path, capsys):
    assert main(["--size", "32", "--device", "cpu", "--repeats", "1", "--fit", "--out", str(tmp_path)]) == 0
    growth = json.loads((tmp_path / "toyworld-8x32-cpu-float32-growth.json").read_text())["growth"]
    assert [one["of"] for one in growth] == ["frames", "size", "prompts"]
    assert all(len(one["seconds"]) == len(one["values"]) for one in growth)


def test_attention_on_a_cpu_is_counted():
    query = torch.randn(1, 2, 64, 8)
    count = count_flop(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query))
    assert count == 2 * 2 * 2 * 64 * 64 * 8


def test_power_law():
    assert exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)


def test_speed_against_the_original_is_in_units_of_the_machines_matrix_products():
    setting = Setting("sd15", 8, 256, "cpu", "float32")
    # A machine of half the rate, twice the original's seconds: as fast.
    timing = Timing("forward", 23.4, 23.4, 23.4, 1.6e12, 87e9, 0.8, 4.0)
    assert "| 1.00x" in timing_table([timing], setting)
    other = Setting("sd15", 16, 256, "cpu", "float32")
    assert "x |" not in timing_table([timing], other).splitlines()[-1]


@pytest.mark.parametrize(
    "arguments", [["--size", "60"], ["--frames", "0"], ["--repeats", "0"], ["--device", "cuda:77"]]
)
def test_bad_arguments_are_one_line(arguments, capsys):
    assert main([*arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_figures_of_the_readme_are_compared_where_it_states_them():
    setting = Setting("sd15", 8, 256, "cpu", "bfloat16")
    timing = Timing("tuning step", 14.0, 14.0, 14.0, 1.6e12, 365e9, 0.7, 5.1)
    assert [measure.reached for measure in stated_figures([timing], setting, EPYC)] == [True, True]
    assert [measure.name for measure in stated_figures([timing], setting, "Xeon")] == ["peak, GiB"]
    slower = Timing("tuning step", 16.0, 16.0, 16.0, 1.6e12, 365e9, 0.7, 5.6)
    assert [measure.reached for measure in stated_figures([slower], setting, EPYC)] == [False, False]
    assert stated_figures([slower], Setting("sd15", 16, 256, "cpu", "bfloat16"), EPYC) == []
    checkpointed = Setting("sd15", 8, 256, "cpu", "bfloat16", checkpointing=True)
    assert [measure.reached for measure in stated_figures([slower], checkpointed, EPYC)] == [False]


def test_a_missed_figure_is_an_exit_code(tmp_path, capsys, monkeypatch):
    arguments = ["--frames", "2", "--size", "32", "--parts", "forward", "--repeats", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(speed, "stated_figures", lambda *_: [Measure("forward", "peak, GiB", 9.0, 4.0, at_most=True)])
    assert main(arguments) == 1
    assert "NO" in capsys.readouterr().out
