"""The scores and heat maps of a clip, read from its results."""

from __future__ import annotations

from pathlib import Path

from tav.config.metrics import METRICS
from tav.reports.scores import read_clip_scores, read_heat_maps
from tests.support.reported import CLIP, PROMPTS, SCORES, SOURCE


def test_scores_by_edit_and_prompt(project: Path) -> None:
    scores = read_clip_scores(project / "results" / CLIP / "scores")
    assert scores is not None
    assert scores.source == SOURCE
    assert scores.of("cube", PROMPTS["cube"]) == SCORES["cube"]
    assert scores.of("cube", "another prompt") == {}
    names = [metric.key for metric in scores.columns]
    assert names == [name for name in METRICS if name in SCORES["cube"]]
    assert [metric.key for metric in scores.headlines] == ["textual_alignment", "frame_consistency", "track_error"]
    assert scores.best()["track_error"] == METRICS["track_error"].text(0.01)


def test_unknown_metrics_are_left_out(project: Path) -> None:
    path = project / "results" / CLIP / "scores/scores.csv"
    path.write_text(path.read_text().replace("flicker", "novelty"))
    scores = read_clip_scores(path.parent)
    assert scores is not None
    assert set(scores.of("cube", PROMPTS["cube"])) == set(SCORES["cube"]) - {"flicker"}


def test_nothing_where_nothing_was_scored(tmp_path: Path) -> None:
    assert read_clip_scores(tmp_path) is None
    assert read_heat_maps(tmp_path, []) is None


def test_heat_maps_share_a_scale_and_belong_to_the_named_edits(project: Path) -> None:
    maps = read_heat_maps(project / "results" / CLIP / "scores", ["cube", "gone"])
    assert maps is not None
    assert maps.source is not None
    assert list(maps.edits) == ["cube"]
    assert maps.scale.ticks[0][1] == "0.85"  # below the least similar pair, 0.86
