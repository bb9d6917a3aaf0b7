"""Comparisons of runs in real MLflow stores, through `tav compare`; its tables are in tests/tav_cli/test_compare.py."""

import contextlib
import json
import shutil
import socket
import sqlite3
import sys
from pathlib import Path

import pytest

from tav.tracking.comparison import compare
from tav.tracking.tracker import Tracker
from tav_cli.main import main
from tav_model.errors import TavError
from tests.support.compared_runs import BALL, SCORES, write_compared_runs
from tests.support.projects import ROOT, change_params


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_compared_runs(tmp_path_factory.mktemp("a projèct"))


@pytest.fixture
def tav(store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the command in the project: its exit code, and what it prints."""

    def run(*arguments: str, root: Path = store, columns: int = 200) -> tuple[int, str, str]:
        monkeypatch.chdir(root)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "argv", ["tav", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return run


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_rows_are_best_first_and_say_what_differs(tav, store: Path):
    code, out, err = tav("compare", "--json")
    rows = json.loads(out)
    assert (code, err) == (0, "")
    assert [(row["clip"], row["rank"], row["scores"]["textual_alignment"]) for row in rows] == [
        ("ball", 1, 0.35),
        ("ball", 2, 0.30),
        ("ball", 3, 0.20),
        ("fish", 1, 0.25),
        ("fish", 2, 0.25),
    ]
    assert rows[1]["differing"] == {"attention.spatial": "first,former", "edit.guidance_scale": "4.0"}
    assert rows[1]["parameters"] == {name: str(value) for name, value in BALL.items()}
    assert rows[1]["scores"] == SCORES
    assert rows[1]["run"] == "ball · first,former · 300 steps" and rows[1]["finished"]
    # As good as each other: the newer one is first.
    assert [row["differing"] for row in rows[3:]] == [{"tune.steps": "9"}, {"tune.steps": "300"}]


def test_control_that_only_some_runs_have_is_one_difference(tmp_path: Path):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    canny = {"control.0.kind": "canny", "control.0.scale": 1.0, "control.0.end": 1.0}
    with Tracker("sqlite:///mlflow.db", "tav", tmp_path) as tracker:
        for changes in ({}, canny, canny | {"control.0.scale": 0.5}):
            run = tracker.pipeline("ball", BALL | changes)
            run.log_metrics(SCORES)
            run.finish()
    (comparison,) = compare(tmp_path)
    assert comparison.differing == ["control.0.kind", "control.0.scale"]


def test_lower_is_better_for_some(tav):
    code, out, _ = tav("compare", "--clip", "ball", "--by", "flicker", "--json")
    assert code == 0
    assert [row["scores"].get("flicker") for row in json.loads(out)] == [0.01, 0.02, None]


def test_unfinished_runs_are_listed_where_asked_for(tav):
    rows = json.loads(tav("compare", "--clip", "ball", "--all", "--json")[1])
    assert [row["finished"] for row in rows] == [True, True, True, False]
    assert rows[3]["differing"]["tune.steps"] == "0" and rows[3]["status"] == "failed"


def test_reading_leaves_everything_as_it_was(tav, store: Path, tmp_path: Path):
    before = files(store)
    assert tav("compare")[0] == 0
    assert files(store) == before
    assert not (store / "mlruns").exists()


def test_no_store(tav, tmp_path: Path):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    code, out, err = tav("compare", root=tmp_path)
    assert (code, out) == (2, "") and err.startswith("error: no runs yet in sqlite:///") and err.count("\n") == 1
    assert files(tmp_path).keys() == {"params.yaml"}


def test_other_experiment_and_other_place(tav, store: Path, tmp_path: Path):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    change_params(tmp_path, {"tracking": {"uri": f"sqlite:///{store}/mlflow.db"}})
    assert tav("compare", root=tmp_path)[0] == 0
    change_params(tmp_path, {"tracking": {"experiment": "elsewhere"}})
    code, _, err = tav("compare", root=tmp_path)
    assert code == 2 and "no runs yet in sqlite:///" in err and "'elsewhere'" in err
    change_params(tmp_path, {"tracking": {"uri": None}})
    code, _, err = tav("compare", root=tmp_path)
    assert code == 2 and "tracking.uri is null" in err
    assert files(tmp_path).keys() == {"params.yaml"}


def test_server_that_is_away(tav, store: Path, tmp_path: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shutil.copy(ROOT / "params.yaml", tmp_path)
    change_params(tmp_path, {"tracking": {"uri": f"http://someone:secret@{address}"}})
    code, out, err = tav("compare", root=tmp_path)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith(f"error: http://{address}: the runs cannot be read (") and "secret" not in err
    assert "refused" in err


def test_older_and_broken_stores(tav, store: Path, tmp_path: Path):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    database = tmp_path / "mlflow.db"
    database.touch()
    assert "no runs yet" in tav("compare", root=tmp_path)[2]
    assert database.stat().st_size == 0
    database.write_bytes(b"not a database, but as long as one" * 100)
    code, _, err = tav("compare", root=tmp_path)
    assert code == 2 and "the runs cannot be read (file is not a database)" in err and err.count("\n") == 1
    shutil.copy(store / "mlflow.db", database)
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'of another time'")
        connection.commit()
    code, _, err = tav("compare", root=tmp_path)
    assert code == 2 and "out-of-date database schema" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["cat"], "error: no runs of 'cat'; there are runs of: ball, fish"),
        (
            ["--by", "beauty"],
            "error: --by: no metric 'beauty' to order by; allowed: textual_alignment, frame_consistency, "
            "psnr_to_truth, flicker",
        ),
        (["--by", "novelty"], "error: --by: no metric 'novelty' to order by; allowed: textual_alignment, frame_cons"),
        (["--clip", "fish", "--by", "flicker"], "allowed: textual_alignment, frame_consistency\n"),
    ],
)
def test_what_is_not_there_is_refused_in_one_line(tav, arguments: list[str], error: str):
    code, out, err = tav("compare", *arguments)
    assert (code, out) == (2, "") and error in err and err.count("\n") == 1


def test_only_unfinished_runs(tav, tmp_path: Path):
    shutil.copy(ROOT / "params.yaml", tmp_path)
    with Tracker("sqlite:///mlflow.db", "tav", tmp_path) as tracker:
        tracker.pipeline("ball", BALL)
    code, _, err = tav("compare", root=tmp_path)
    assert code == 2 and "none of the 1 runs has scores yet; --all shows them" in err
    code, out, _ = tav("compare", "--all", root=tmp_path)
    assert code == 0 and "no scores (running)" in out
    with pytest.raises(TavError, match="allowed: none, without scores"):
        compare(tmp_path, by="flicker", everything=True)
