"""The scores as a table for a terminal."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from tav.config import write_overrides
from tav.reports.report import write_report
from tav.reports.score_table import remark_lines, score_table
from tav.reports.scores import read_clip_scores
from tav_model.errors import TavError
from tests.support.projects import change_params
from tests.support.reported import CLIP, PROMPTS, set_caption, write_scores


def printed(project: Path, *clips: str, columns: int = 80, **settings: object) -> str:
    text = io.StringIO()
    Console(file=text, width=columns, **settings).print(score_table(project, clips))
    return text.getvalue()


def lines(project: Path, *clips: str, columns: int = 80) -> list[str]:
    return [line.rstrip() for line in printed(project, *clips, columns=columns).splitlines() if line.strip()]


def first_words(project: Path, *clips: str) -> list[str]:
    return [line.split()[0] for line in lines(project, *clips)]


def write_csv(project: Path, *names: str) -> None:
    set_caption(project, "a red ball")
    rows = [f'{name},"{PROMPTS[name]}"' for name in names]
    (project / "data/ball.csv").write_text("\n".join(["name,prompt", *rows, ""]))


def test_a_table_from_the_source_to_the_mean_and_where_the_rest_is(project: Path) -> None:
    write_csv(project, *PROMPTS)
    found = lines(project, CLIP, "fish")
    assert [line.split() for line in found[:2]] == [
        ["textual", "frame", "track"],
        ["ball", "alignment", "↑", "consistency", "↑", "error", "↓"],
    ]
    assert [line.split() for line in found[3:8]] == [
        ["(source)", "0.590", "0.980"],
        ["blue-ball", "0.580", "0.990", "6.0%"],
        ["cube", "0.610", "0.970", "1.0%"],
        ["on-sand", "0.600", "0.980"],
        ["(mean)", "0.597", "0.980", "3.5%"],
    ]
    assert found[8:] == [
        "videos   results/ball/edits/",
        "picture  results/ball/contact-sheet.png",
        "report   not written yet; run tav report ball",
    ]
    write_report(project, CLIP)
    assert lines(project, CLIP)[-1] == "report   results/ball/report.html (and 1 more score)"


def test_edits_are_in_the_order_of_the_csv(project: Path) -> None:
    write_csv(project, "on-sand", "blue-ball")
    assert first_words(project, CLIP)[3:8] == ["(source)", "on-sand", "blue-ball", "cube", "(mean)"]
    (project / "data/ball.csv").write_text("no,prompts\n")
    assert first_words(project, CLIP)[3:8] == ["(source)", *PROMPTS, "(mean)"]


def test_the_best_scores_of_the_edits_are_bold(project: Path) -> None:
    text = printed(project, CLIP, force_terminal=True, color_system="standard")
    bold = [part.partition("\x1b[0m")[0].strip() for part in text.split("\x1b[1;32m")[1:]]
    assert bold == ["0.990", "0.610", "1.0%"]


def test_several_clips_share_a_table(project: Path) -> None:
    shutil.copytree(project / "results/ball", project / "results/fish")
    words = first_words(project, CLIP, "fish", "cube")
    rows = ["(source)", *PROMPTS, "(mean)"]
    assert words[3:] == ["ball", *rows, "fish", *rows, "ball", "fish"]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_long_names_are_wrapped_at_hyphens_so_that_everything_fits(project: Path, columns: int) -> None:
    name = "a-cartoon-of-a-red-boat-swinging-on-the-sea-at-sunset"
    table = project / "results/ball/scores/scores.csv"
    table.write_text(table.read_text().replace("\ncube,", f"\n{name},"))
    found = lines(project, CLIP, columns=columns)
    assert max(map(len, found)) <= columns and "…" not in "".join(found)
    start = next(number for number, line in enumerate(found) if line.split()[0].startswith("a-cartoon"))
    end = next(number for number, line in enumerate(found) if line.split()[0] == "on-sand")
    parts = [line.split()[0] for line in found[start:end]]
    assert "".join(parts) == name and len(parts) == {60: 4, 80: 2, 120: 1}[columns]
    assert all(part.endswith("-") for part in parts[:-1])


def remarks(project: Path) -> list[str]:
    scores = read_clip_scores(project / "results" / CLIP / "scores")
    assert scores is not None
    return remark_lines(project, CLIP, scores)


def test_edits_with_something_wrong_are_named_below_the_table(project: Path) -> None:
    assert remarks(project) == []
    prompts = PROMPTS | {"cube": "a red zebra on the moon"}
    write_scores(project, prompts)
    path = project / f"results/{CLIP}/scores/scores.csv"
    path.write_text(path.read_text().replace(",0.99,", ",0.8,"))
    expected = [
        "! ball blue-ball: the frames do not belong together: frame consistency 0.80, source 0.98",
        '! ball cube: toyworld does not know "zebra" or "moon"',
    ]
    assert remarks(project) == expected
    found = lines(project, CLIP, columns=120)
    assert found[-5:-3] == expected and found[-3].startswith("videos")
    change_params(project, {"base_model": "owner/another"})
    assert remarks(project) == expected[:1]
    write_overrides(project / "params.yaml", {f"clips.{CLIP}.base_model": "toyworld"})
    assert remarks(project) == expected


def test_no_scores(project: Path) -> None:
    with pytest.raises(TavError, match="no scores yet for fish; run dvc repro"):
        score_table(project, ["fish"])


def test_scores_of_earlier_prompts_are_listed_last(project: Path) -> None:
    write_csv(project, *PROMPTS)
    write_scores(project, PROMPTS | {"blue-ball": "an earlier prompt"})
    assert first_words(project, CLIP)[3:8] == ["(source)", "cube", "on-sand", "blue-ball", "(mean)"]
