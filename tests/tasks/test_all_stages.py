"""All stages in one process: they run in order, each is recorded for DVC, and what is up to date does not run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tasks import all_stages
from tasks.__main__ import print_if_not_run
from tasks.all_stages import bring_up_to_date
from tav.runtime.events import EventStream
from tav_model.errors import TavError
from tests.support.dvc_project import STAGES, dvc, environment, make_project, run_stage, take_runs
from tests.support.projects import QUICK, change_params, fresh_clone, run

NAMES = [f"{stage}@ball" for stage in STAGES]


class RecordedStages:
    """Stages that only record their inputs, in place of those that compute."""

    fails_in: str | None = None

    def __init__(self, root: Path, clip: str, events: EventStream) -> None:
        self.root, self.clip = root, clip

    def run(self, stage: str) -> None:
        if stage == self.fails_in:
            raise TavError(f"{stage}: no")
        run_stage(self.root, stage, self.clip)

    def report(self) -> None:
        write_page(self.root, self.clip)


def write_page(root: Path, clip: str) -> None:
    """Write a page that shows nothing but the scores."""
    shutil.copy(root / f"results/{clip}/scores/metrics.json", root / "report.html")


@pytest.fixture
def project(tmp_path, monkeypatch):
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    root = make_project(tmp_path / "project")
    monkeypatch.chdir(root)
    monkeypatch.setattr(all_stages, "ClipStages", RecordedStages)
    monkeypatch.setattr(all_stages, "refresh_reports", write_page)
    return root


@pytest.mark.slow
def test_each_stage_is_recorded_and_runs_only_if_it_must(project, monkeypatch, capsys):
    monkeypatch.setattr(RecordedStages, "fails_in", "invert")
    with pytest.raises(TavError, match="invert: no"):
        bring_up_to_date(project, "ball", EventStream())
    done = STAGES.index("invert")
    assert take_runs(project) == NAMES[:done]

    monkeypatch.setattr(RecordedStages, "fails_in", None)
    bring_up_to_date(project, "ball", EventStream(print_if_not_run))
    assert take_runs(project) == NAMES[done:]
    assert capsys.readouterr().err.splitlines() == [f"{stage} ball: up to date" for stage in STAGES[:done]]
    assert (project / "report.html").exists()

    dvc(project, "repro", "-q", "score@ball")
    assert take_runs(project) == []
    (project / "results/ball/tuned/tuned.json").unlink()
    bring_up_to_date(project, "ball", EventStream(print_if_not_run))
    assert take_runs(project) == []
    assert "tune ball: restored from DVC's cache" in capsys.readouterr().err


@pytest.mark.slow
def test_the_report_shows_restored_results(project):
    bring_up_to_date(project, "ball", EventStream())
    params, page = (project / "params.yaml").read_text(), (project / "report.html").read_text()
    (project / "params.yaml").write_text(params.replace("guidance_scale: 7.5", "guidance_scale: 5"))
    bring_up_to_date(project, "ball", EventStream())
    assert (project / "report.html").read_text() != page
    take_runs(project)
    (project / "params.yaml").write_text(params)
    bring_up_to_date(project, "ball", EventStream())
    assert take_runs(project) == []
    assert (project / "report.html").read_text() == page


@pytest.mark.long
@pytest.mark.slow
def test_the_command_does_what_repro_does(tmp_path):
    project = fresh_clone(tmp_path / "project")
    change_params(project, QUICK)
    assert "contact-sheet.png" in run(project, "python", "-m", "tasks", "all", "--clip", "ball").stdout
    assert "up to date" in run(project, "dvc", "status", "score@ball").stdout
    assert "Running stage" not in run(project, "dvc", "repro", "score@ball").stdout
