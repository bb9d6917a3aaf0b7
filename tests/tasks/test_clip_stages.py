"""The stages of a clip: by its own settings, and not where their results cannot be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks.clip_stages import ClipStages
from tav.config import write_overrides
from tav_model.errors import TavError
from tests.support.params import SHORT


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "params.yaml").write_text(SHORT)
    return tmp_path


def test_stages_work_with_the_settings_of_their_clip(project: Path) -> None:
    own = {"clips.ball.tune.steps": 3, "clips.ball.base_model": "models/own", "clips.ball.seed": 7}
    params = write_overrides(project / "params.yaml", own)
    (project / "models/own").mkdir(parents=True)
    ball, car = ClipStages(project, "ball"), ClipStages(project, "car")
    assert (ball.params.tune.steps, ball.params.seed) == (3, 7)
    assert ball.base == str(project / "models/own")
    assert (car.params.tune.steps, car.params.seed, car.params.base_model) == (500, 33, "models/small")
    assert car.params.decode.start == 3 and ball.params.decode == params.decode


@pytest.mark.parametrize(
    ("file", "stage"),
    [("results/ball", "edit"), ("results", "tune")],
)
def test_results_that_cannot_be_written_are_found_before_the_work(project: Path, file: str, stage: str) -> None:
    (project / file).parent.mkdir(exist_ok=True)
    (project / file).write_text("in the place of a folder")
    with pytest.raises(TavError) as refused:
        ClipStages(project, "ball").run(stage)
    message = f"{stage}: the results of the clip ball cannot be written to results/ball: Not a directory"
    assert str(refused.value) == message
