"""The report and the index: what the pages show for what the results contain, and that each is one harmless file."""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import re
import shutil
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.__main__ import run
from tav.config import load_params
from tav.config.metrics import METRICS
from tav.reports.report import duration, refresh_reports, write_index, write_report
from tav.reports.videos import ordered_edit_paths
from tav_model.errors import TavError
from tav_model.video import write_video
from tests.support.projects import change_params
from tests.support.reported import (
    CAPTION,
    CLIP,
    FPS,
    FRAMES,
    HOSTILE,
    PROMPTS,
    REPORT,
    set_caption,
    write_edit,
    write_quick_edit,
    write_scores,
)

X, NONE = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"


class Page(HTMLParser):
    """A parsed page: tags with their attributes, the text of scripts and styles, and the visible text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": []}
        self.texts: list[str] = []
        self._open = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag in self.inside:
            self.inside[tag].append("")
            self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = "" if tag == self._open else self._open

    def handle_data(self, data: str) -> None:
        if self._open:
            self.inside[self._open][-1] += data
        else:
            self.texts.append(data)

    def all(self, tag: str, attribute: str) -> list[str]:
        return [
            attributes[attribute] or "" for name, attributes in self.tags if name == tag and attribute in attributes
        ]


def report(project: Path) -> Page:
    path = write_report(project, CLIP)
    assert path == project / REPORT
    return Page(path)


def check_self_contained(page: Page) -> None:
    """Check that the page loads nothing, and that its policy allows only its own scripts and styles."""
    for tag, attributes in page.tags:
        for name in ("src", "poster", "data", "srcset", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
        if tag != "a" and "href" in attributes:
            assert attributes["href"].startswith("data:"), tag
        assert not {name for name in attributes if name.startswith("on") or name == "style"}
    assert not re.search(r"https?:|\bimport\b|url\(", page.source)
    (policy,) = (a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    texts = page.inside["script"] + page.inside["style"]
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
    assert sorted(re.findall(r"'sha256-([^']+)'", policy)) == sorted(hashes) and len(texts) == 3


# What the page shows


def test_one_page_contains_everything(project: Path) -> None:
    page = report(project)
    check_self_contained(page)
    videos = page.all("video", "src")
    source, *edits = (base64.b64decode(uri.removeprefix("data:video/mp4;base64,")) for uri in videos)
    results = project / "results" / CLIP
    assert source == (results / "frames/source.mp4").read_bytes()
    for name in PROMPTS:
        assert edits.count((results / f"edits/{name}.mp4").read_bytes()) == 1
    assert len(videos) == 1 + 2 * len(PROMPTS)  # each with its truth
    for text in (
        f"{CLIP} {CAPTION}",
        f"3 edits 8 frames, 128{X}128, 3.65 per second toyworld, tuned for 40 steps "
        "attention to first, former, temporal attention",
        "2 min 49 s in total",
        "a blue ball is bouncing on the grass",
        "guidance scale 3.5",
        "frame 3 attends to 1, 2",
        "Over time: on",
        "tune 1 min 53 s 67%",
        "172 992 parameters tuned: attn1.to_q, attn2.to_q, attn_temp",
        "clip model toyworld/scorer",
        "trainable attn1.to_q, attn2.to_q, attn_temp",
    ):
        assert text in page.text, text
    assert not any("missing" in (a.get("class") or "") and "hidden" not in a for _, a in page.tags)
    assert len(page.source) < 700_000


def test_conditions_of_control_networks_play_beside_the_source(project: Path) -> None:
    folder = project / "results" / CLIP / "control"
    for name, frames in (("0-canny", FRAMES), ("1-depth", FRAMES), ("2-given", FRAMES - 1)):
        write_video(folder / f"{name}.mp4", np.zeros((frames, 64, 64, 3), np.uint8), FPS)
    control = [{"kind": "canny", "model": "models/canny"}]
    change_params(project, {"control": control})
    page = write_report(project, CLIP).read_text()
    shown = re.findall(r'aria-label="Condition: (\w+)"></video>', page)
    assert shown == ["canny", "depth"]
    assert "kind: canny, model: models/canny" in page


def test_large_videos_are_linked(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded = len(report(project).source)
    monkeypatch.setattr("tav.reports.videos.LARGEST_EMBEDDED", 1000)
    write_quick_edit(project, "pink", "a pink ball is bouncing on the grass", textual_alignment=0.77, flicker=0.01)
    page = report(project)
    links = page.all("video", "src")
    assert links == ["frames/source.mp4", *(f"edits/{name}.mp4" for name in sorted(PROMPTS)), "quick/pink.mp4"]
    assert all((project / "results" / CLIP / link).is_file() for link in links)
    assert "media-src data: blob: 'self' file:;" in unescape(page.source) and "keep it in its folder" in page.text
    assert len(page.source) < embedded


def test_the_table_has_every_score_and_marks_the_best(project: Path) -> None:
    page = report(project)
    table = page.source[page.source.index('<table class="scores">') :]
    table = table[: table.index("</table>")]
    rows = {
        re.search(r'<th scope="row"[^>]*>([^<]*)', row)[1]: re.findall(r"<td([^>]*)>(?:<span[^>]*>)?([^<]*)", row)
        for row in re.findall(r"<tr>.*?</tr>", table[table.index("<tbody") :], re.DOTALL)
    }
    assert list(rows) == ["source", "blue-ball", "cube", "on-sand", "mean of the edits"]
    order = ["textual_alignment", "frame_consistency", "track_error", "flicker"]
    assert re.findall(r'data-tip="([^"]{20})', table) == [METRICS[name].explanation[:20] for name in order]
    values = {name: [text for _, text in cells] for name, cells in rows.items()}
    assert values["source"] == ["0.590", "0.980", NONE, "0.041"]
    assert values["cube"] == ["0.610", "0.970", "1.0%", "0.060"]
    assert values["on-sand"] == ["0.600", "0.980", NONE, "0.040"]
    assert values["mean of the edits"] == ["0.597", "0.980", "3.5%", "0.050"]
    best = {
        name: [i for i, (attributes, _) in enumerate(cells) if "best" in attributes] for name, cells in rows.items()
    }
    assert best == {"source": [], "blue-ball": [1], "cube": [0, 2], "on-sand": [3], "mean of the edits": []}
    assert [a for _, a in page.tags if a.get("data-value") == "0.61"] == [{"data-value": "0.61", "class": "best"}]


def test_edits_are_in_the_order_of_the_csv(project: Path) -> None:
    rows = [f"{name},{PROMPTS[name]}" for name in ("on-sand", "cube")]
    (project / "data/ball.csv").write_text("\n".join(["name,prompt", *rows, ""]))
    page = report(project)
    assert re.findall(r'<th scope="row" data-value="([^"]+)"', page.source) == ["on-sand", "cube", "blue-ball"]
    assert re.findall(r"<h3>([^<]+) <span", page.source) == ["on-sand", "cube", "blue-ball"]
    paths = ordered_edit_paths(project, CLIP, load_params(project / "params.yaml"))
    assert [path.stem for path in paths] == ["on-sand", "cube", "blue-ball"]


def test_quick_edits_are_shown_with_their_scores(project: Path) -> None:
    write_quick_edit(project, "pink", "a pink ball is bouncing on the grass", textual_alignment=0.77, flicker=0.01)
    write_quick_edit(project, "earlier", "a purple ball is bouncing on the grass")
    (project / f"results/{CLIP}/quick/scores/earlier.json").unlink()
    page = report(project)
    check_self_contained(page)
    assert "3 edits, 1 quick edit 8 frames" in page.text
    assert "Some scores of quick/pink edit source textual alignment 0.770 0.590" in page.text
    assert "1 quick edit is not shown" in page.text and "mean of the edits in the CSV 0.597" in page.text
    assert len(page.all("video", "src")) == 2 + 2 * len(PROMPTS)
    assert any("Edit quick/pink: similarity" in label for label in page.all("svg", "aria-label"))
    shutil.rmtree(project / f"results/{CLIP}/scores")  # A clip whose CSV has not been scored yet.
    assert "quick/pink 0.770" in report(project).text


def test_edits_with_something_wrong_are_marked(project: Path) -> None:
    assert not [a for _, a in report(project).tags if a.get("class") in ("remark", "flag")]
    prompts = PROMPTS | {"cube": "a red zebra is bouncing on the grass"}
    write_edit(project, "cube", prompt=prompts["cube"])
    write_scores(project, prompts)
    path = project / f"results/{CLIP}/scores/scores.csv"
    path.write_text(path.read_text().replace(",0.99,", ",0.8,"))  # the frame consistency of blue-ball
    page = report(project)
    flags = [a["title"] for _, a in page.tags if a.get("class") == "flag"]
    assert flags == [
        "the frames do not belong together: frame consistency 0.80, source 0.98",
        'toyworld does not know "zebra"',
    ]
    assert 'toyworld does not know "zebra".' in page.text
    assert "The frames do not belong together: frame consistency 0.80, source 0.98." in page.text


def test_prompts_captions_and_names_are_harmless(project: Path) -> None:
    set_caption(project, HOSTILE)
    prompts = PROMPTS | {"cube": HOSTILE}
    write_edit(project, "cube", prompt=HOSTILE, category=HOSTILE, negative_prompt=HOSTILE)
    write_scores(project, prompts)
    page = report(project)
    check_self_contained(page)
    assert len(page.all("img", "src")) == 0 and [tag for tag, _ in page.tags].count("script") == 2
    assert page.text.count(HOSTILE) >= 4  # the caption twice, and of the cube category and negative prompt
    assert {HOSTILE, f"Source: {HOSTILE}", f"Edit cube: {HOSTILE}"} & set(page.all("video", "aria-label")) != set()
    write_index(project)
    index = Page(project / "results/index.html")
    check_self_contained(index)
    assert HOSTILE in index.text and [tag for tag, _ in index.tags].count("script") == 2


@pytest.mark.parametrize(
    ("removed", "expected"),
    [
        (["tuned"], "Not tuned yet: dvc repro tune@ball"),
        (["tuned"], "The configuration in params.yaml; no model has been tuned with it yet."),
        (["scores"], "Not scored yet: dvc repro score@ball"),
        (["edits", "scores"], "No edits yet: dvc repro score@ball"),
        (["frames"], f"3 edits 8 frames, 128{X}128"),
        (["frames", "edits", "scores"], "No frames yet"),
        (["scores/consistency.json"], "No heat map: these scores are from an earlier version"),
        (["../../.tav"], "No times: DVC restored these results; they were not computed on this machine"),
        (["../../data/scenes"], "Highlighted words are not in the source's caption. This browser"),
    ],
)
def test_the_page_names_what_is_missing(project: Path, removed: list[str], expected: str) -> None:
    for name in removed:
        path = project / "results" / CLIP / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = report(project)
    assert expected in page.text
    check_self_contained(page)


def test_scores_without_a_clip_model_have_no_heat_map(project: Path) -> None:
    path = project / "results" / CLIP / "scores/consistency.json"
    path.write_text('{"source": null, "edits": {}}')
    page = report(project)
    assert "computed without a CLIP model. Set score.clip_model" in page.text
    assert not page.all("svg", "data-values")


def test_an_edit_that_was_not_scored_as_it_is_shows_no_scores(project: Path) -> None:
    write_edit(project, "cube", prompt="a red cube of glass")
    page = report(project)
    assert page.text.count("Not scored since it changed") == 1
    assert "Edit cube" not in " ".join(page.all("svg", "aria-label"))
    assert len(page.all("svg", "data-values")) == 3


def test_parameters_that_have_changed_since_the_tuning_are_named(project: Path) -> None:
    assert "params.yaml has changed since the tuning" not in report(project).text
    change_params(project, {"attention": {"spatial": ["all"], "temporal": False}, "tune": {"steps": 10}})
    page = report(project)
    assert "tune.steps : tuned with 40, now 10" in page.text
    assert (
        "attention : tuned with spatial: first, former, temporal: true, now spatial: all, temporal: false" in page.text
    )
    assert "Between frames: first, former" in page.text  # as tuned


def test_without_results_there_is_no_report(project: Path) -> None:
    with pytest.raises(TavError, match=r"results/fish: nothing to report yet; run tav run fish"):
        write_report(project, "fish")
    with pytest.raises(TavError, match="no clip named 'cat'"):
        write_report(project, "cat")
    with pytest.raises(TavError, match="results: no report of any clip yet"):
        write_index(project)
    assert not list((project / "results").rglob("*.html"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("scores/metrics.json", "{", "metrics.json: not a JSON file"),
        ("scores/metrics.json", '{"source": {}}', "scores: not the scores of a clip"),
        ("scores/metrics.json", "[]", "scores: not the scores of a clip"),
        ("scores/scores.csv", "name,prompt,flicker\na,b,c\n", "scores: not the scores of a clip"),
        ("scores/scores.csv", None, "scores.csv: no such file"),
        ("scores/consistency.json", '{"source": [["x"]], "edits": {}}', "consistency.json: not the similarities"),
        ("scores/consistency.json", '{"source": [[1, 2], [1]], "edits": {}}', "consistency.json: not the similarities"),
        ("edits/cube.json", "{}", "cube.json: no prompt"),
        ("edits/cube.mp4", "no video", "cube.mp4: not a video"),
        ("tuned/tuned.json", "[]", "tuned.json: not the description of tuned weights"),
        ("tuned/loss.csv", "step,loss\n1,x\n", "loss.csv: not a loss curve"),
    ],
)
def test_a_damaged_file_is_named(project: Path, name: str, content: str | None, message: str) -> None:
    path = project / "results" / CLIP / name
    path.write_text(content) if content is not None else path.unlink()
    with pytest.raises(TavError, match=message):
        write_report(project, CLIP)
    assert not (project / REPORT).exists()


def test_the_index_has_a_card_for_each_report(project: Path) -> None:
    write_report(project, CLIP)
    shutil.copytree(project / "results/ball", project / "results/gone")  # no clip of params.yaml
    shutil.copytree(project / "results/ball", project / "results/fish")
    (project / "results/fish/report.html").unlink()
    shutil.rmtree(project / "results/gone/edits")
    shutil.rmtree(project / "results/gone/scores")
    page = Page(write_index(project))
    check_self_contained(page)
    assert page.all("a", "href") == ["ball/report.html", "gone/report.html"]
    assert f"ball {CAPTION} 3 edits" in page.text and "textual alignment 0.597" in page.text
    assert "gone 0 edits, not scored yet" in page.text
    for uri in page.all("img", "src"):
        with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
            assert picture.size == (480, 240)


def test_pages_are_refreshed_where_they_show_other_results(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr("tav.reports.report.update_reports", lambda root, clip: written.append(clip))

    def is_refreshed() -> bool:
        refresh_reports(project, CLIP)
        return bool(written and written.pop())

    def write() -> None:
        write_report(project, CLIP)
        write_index(project)
        assert not is_refreshed()

    assert is_refreshed()
    write()
    scores = project / f"results/{CLIP}/scores/scores.csv"
    before = scores.read_text()
    scores.write_text(before.replace("0.58", "0.57"))
    assert is_refreshed()
    scores.write_text(before)
    assert not is_refreshed()
    write_edit(project, "cube", guidance_scale=4)
    assert is_refreshed()
    write()
    write_quick_edit(project, "pink", "a pink ball is bouncing on the grass", flicker=0.1)
    assert is_refreshed()
    write()
    change_params(project, {"edit": {"guidance_scale": 9}})
    assert is_refreshed()
    write()
    (project / "results/index.html").unlink()
    assert is_refreshed()


@pytest.mark.slow
def test_the_score_stage_writes_a_report_and_outlasts_its_failure(
    project: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    change_params(project, {"tracking": {"uri": None}, "runtime": {"device": "cpu"}, "score": {"clip_model": None}})
    monkeypatch.chdir(project)
    run("score", CLIP)
    page = Page(project / REPORT)
    assert re.search(r"score \d+\.\d s \d+%", page.text)  # The stage's own duration is known by then.
    assert (project / "results/index.html").exists()

    def failing(root: Path, clip: str) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr("tav.reports.report.write_report", failing)
    (project / REPORT).unlink()
    with caplog.at_level(logging.WARNING):
        run("score", CLIP)
    assert "no report of ball: disk full" in caplog.text
    assert not (project / REPORT).exists()


def test_durations_in_words() -> None:
    assert [duration(seconds) for seconds in (0, 59.9, 59.96, 61, 3599.6, 7500)] == [
        "0.0 s",
        "59.9 s",
        "1 min 0 s",
        "1 min 1 s",
        "1 h 0 min",
        "2 h 5 min",
    ]
