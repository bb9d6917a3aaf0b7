"""What Prefect's pages show of a clip: its result as one text, and the progress of its loops in the log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows import artifacts
from flows.artifacts import AWAY_SECONDS, ProgressArtifacts, ProgressLogs, mlflow_address, result_text
from tav.runtime.events import LoopProgressed
from tav.tracking.clip_runs import ClipRuns
from tests.support.projects import change_params
from tests.support.reported import CLIP, PROMPTS, SCORES, make_results, write_edit


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_results(tmp_path)


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []

    class Logger:
        info = staticmethod(lines.append)
        warning = staticmethod(lambda text, *values: lines.append(text % values))

    monkeypatch.setattr(artifacts, "get_run_logger", Logger)
    return lines


def progress(done: int, time: float, **others: Any) -> LoopProgressed:
    return LoopProgressed(
        **{"clip": "ball", "stage": "tune", "unit": "step", "total": 400} | others, done=done, time=time
    )


def test_the_log_has_percentages_the_time_left_and_values(logged: list[str]) -> None:
    show = ProgressLogs()
    for step in range(1, 401):
        show(progress(step, time=step / 20, values={"loss": 0.5}))  # 20 s
    assert logged == [
        "tune ball: 25%, 100/400 steps, 0:15 left, loss 0.5",
        "tune ball: 50%, 200/400 steps, 0:10 left, loss 0.5",
        "tune ball: 75%, 300/400 steps, 0:05 left, loss 0.5",
        "tune ball: 100%, 400/400 steps, loss 0.5",
    ]


def test_a_slow_loop_has_a_line_every_ten_seconds_and_rows_are_shown_in_place_of_their_stage(logged: list[str]) -> None:
    show = ProgressLogs()
    for step in (1, 2, 3):
        show(progress(step, time=8 * step, stage="edit", total=100))
        show(progress(step, time=8 * step, stage="edit", total=100, row="cube"))
    show(progress(3, time=99, total=None))
    assert logged == ["edit ball cube: 3%, 3/100 steps, 12:56 left"]


def test_a_server_that_does_not_answer_is_left_alone_for_a_while(
    logged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[float] = []
    is_away = True

    def create(percentage: float, *_: str) -> str:
        if is_away:
            raise ConnectionError("refused")
        shown.append(percentage)
        return "id"

    monkeypatch.setattr(artifacts, "create_progress_artifact", create)
    monkeypatch.setattr(artifacts, "update_progress_artifact", lambda _, percentage: shown.append(percentage) or "id")
    show = ProgressArtifacts()
    for step in range(1, 100):
        show(progress(step, time=step))
        show(progress(step, time=step, stage="invert", total=20))  # Its last step has no artifact either.
    assert len(logged) == 1 and "refused" in logged[0]
    is_away = False
    for step in range(100, 400, 40):
        show(progress(step, time=AWAY_SECONDS + step))
    assert shown == [25.0, 35.0, 45.0, 55.0, 65.0, 75.0, 85.0, 95.0]


def test_the_result_leads_with_the_contact_sheet_then_scores_and_links(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAV_MLFLOW_URL", "http://127.0.0.1:5000")
    monkeypatch.setattr(ClipRuns, "find", lambda self: ("7", "abc"))
    lines = result_text(CLIP, project).splitlines()
    parts = [line for line in lines if line]
    assert parts[0] == f"# {CLIP}: a red ball is bouncing on the grass"
    assert parts[1].endswith("(http://127.0.0.1:5000/get-artifact?path=contact-sheet.png&run_uuid=abc)")
    assert "(http://127.0.0.1:5000/#/experiments/7/runs/abc/artifacts/report.html?workflowType" in parts[2]
    table = [line for line in parts if line.startswith("|")]
    assert table[0] == "| edit | textual alignment ↑ | frame consistency ↑ | track error ↓ |"
    assert [row.split(" | ")[0] for row in table[2:]] == [
        "| *source*",
        *(f"| {PROMPTS[name]}" for name in SCORES),
        "| **mean**",
    ]
    assert f"| {PROMPTS['cube']} | 0.610 | 0.970 | 1.0% |" in table
    assert parts[-1].startswith(f"Files: `results/{CLIP}/report.html`")


def test_without_an_address_of_mlflow_there_are_files_and_no_links(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TAV_MLFLOW_URL", raising=False)
    change_params(project, {"tracking": {"uri": None}})
    text = result_text(CLIP, project)
    assert "](" not in text and f"`results/{CLIP}/contact-sheet.png`" in text


def test_a_prompt_cannot_add_markup(project: Path) -> None:
    change_params(project, {"tracking": {"uri": None}})
    write_edit(project, "cube", prompt="a | <img src=x> [cube](http://x) `code`")
    (row,) = [line for line in result_text(CLIP, project).splitlines() if "img" in line]
    assert not set("<>[]`") & set(row) and row.count("|") == 5


def test_a_password_is_not_part_of_mlflows_address() -> None:
    assert mlflow_address("https://user:secret@host/mlflow/") == "https://host/mlflow"
