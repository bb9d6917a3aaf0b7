"""The report: what stands on the page for what lies in the results, that it is one harmless file, and that it works."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import re
import shutil
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.clip_stages import ClipStages
from tav.config.metrics import METRICS
from tav.reports.figures import MOST_CELLS, MOST_ROWS, attention_grid, heat_map, heat_scale, loss_chart
from tav.reports.report import clock, write_index, write_report
from tav.reports.score_table import show
from tav.reports.videos import changed_words
from tav_model.errors import TavError
from tav_model.networks.attention_plan import key_frames
from tests.support.browser import Browser, browser_window
from tests.support.projects import change_params
from tests.support.reported import (
    CAPTION,
    CLIP,
    FPS,
    FRAMES,
    PROMPTS,
    TUNED,
    make_results,
    set_caption,
    write_edit,
    write_scores,
)

EVIL = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)> {{ 7 * 7 }}"
REPORT = f"results/{CLIP}/report.html"
X, NONE = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}"
SPACE, LEFT, RIGHT, DOWN, ESCAPE, TAB = " ", "\ue012", "\ue014", "\ue015", "\ue00c", "\ue004"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_results(tmp_path_factory.mktemp("project"))


@pytest.fixture
def project(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "project"))


class Page(HTMLParser):
    """What a page consists of: tags with their attributes, the text of scripts and styles, and all that people read."""

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


def check_alone(page: Page) -> None:
    """Nothing on the page comes from elsewhere, and its policy lets in its own scripts and styles alone."""
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


# What stands on the page


def test_everything_is_on_one_page_that_needs_nothing_else(project: Path) -> None:
    page = report(project)
    check_alone(page)
    videos = page.all("video", "src")
    source, *edits = (base64.b64decode(uri.removeprefix("data:video/mp4;base64,")) for uri in videos)
    results = project / "results" / CLIP
    assert source == (results / "frames/source.mp4").read_bytes()
    for name in PROMPTS:
        assert edits.count((results / f"edits/{name}.mp4").read_bytes()) == 1
    assert len(videos) == 1 + 2 * len(PROMPTS)  # each with its truth
    for text in (
        f"{CLIP} {CAPTION}",
        f"3 edits 8 frames, 128{X}128, 3.65 per second toyworld, tuned for 400 steps attention to first, former, and over time",
        "2 min 49 s in all",
        "a blue ball is bouncing on the grass",
        "guidance scale 3.5",
        "frame 3 sees 1, 2",
        "Over time: on",
        "tune 1 min 53 s 67%",
        "172 992 parameters tuned: attn1.to_q, attn2.to_q, attn_temp",
        "clip model toyworld/scorer",
        "trainable attn1.to_q, attn2.to_q, attn_temp",
    ):
        assert text in page.text, text
    assert not any("missing" in (a.get("class") or "") and "hidden" not in a for _, a in page.tags)
    assert len(page.source) < 700_000


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


def test_prompts_captions_and_names_cannot_do_anything(project: Path) -> None:
    set_caption(project, EVIL)
    prompts = PROMPTS | {"cube": EVIL}
    write_edit(project, "cube", prompt=EVIL, category=EVIL, negative_prompt=EVIL)
    write_scores(project, prompts)
    page = report(project)
    check_alone(page)
    assert len(page.all("img", "src")) == 0 and [tag for tag, _ in page.tags].count("script") == 2
    assert page.text.count(EVIL) >= 4  # the caption twice, and of the cube category and negative prompt
    assert {EVIL, f"Source: {EVIL}", f"Edit cube: {EVIL}"} & set(page.all("video", "aria-label")) != set()
    write_index(project)
    index = Page(project / "results/index.html")
    check_alone(index)
    assert EVIL in index.text and [tag for tag, _ in index.tags].count("script") == 2


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (["tuned"], "Not tuned yet: dvc repro tune@ball"),
        (["tuned"], "What params.yaml asks for; nothing is tuned with it yet."),
        (["scores"], "Not scored yet: dvc repro score@ball"),
        (["edits", "scores"], "No edits yet: dvc repro score@ball"),
        (["frames"], f"3 edits 8 frames, 128{X}128"),
        (["frames", "edits", "scores"], "No frames yet"),
        (["scores/consistency.json"], "No heat map: these scores are of an earlier version"),
        (["../../.tav"], "No times: these results were not made on this machine"),
        (["../../data/scenes"], "Marked words are not in the source's caption. This browser"),
    ],
)
def test_what_is_missing_is_said(project: Path, gone: list[str], said: str) -> None:
    for name in gone:
        path = project / "results" / CLIP / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = report(project)
    assert said in page.text
    check_alone(page)


def test_scores_without_a_clip_model_have_no_heat_map(project: Path) -> None:
    path = project / "results" / CLIP / "scores/consistency.json"
    path.write_text('{"source": null, "edits": {}}')
    page = report(project)
    assert "made without a CLIP model. Name one as score.clip_model" in page.text
    assert not page.all("svg", "data-values")


def test_an_edit_that_was_not_scored_as_it_is_shows_no_scores(project: Path) -> None:
    write_edit(project, "cube", prompt="a red cube of glass")
    page = report(project)
    assert page.text.count("Not scored as it is now") == 1
    assert "Edit cube" not in " ".join(page.all("svg", "aria-label"))
    assert len(page.all("svg", "data-values")) == 3


def test_parameters_that_have_changed_since_the_tuning_are_named(project: Path) -> None:
    assert "The results stand on other parameters" not in report(project).text
    change_params(project, {"attention": {"spatial": ["all"], "temporal": False}, "tune": {"steps": 10}})
    page = report(project)
    assert "tune.steps : tuned with 400, now 10" in page.text
    assert (
        "attention : tuned with spatial: first, former, temporal: true, now spatial: all, temporal: false" in page.text
    )
    assert "Between frames: first, former" in page.text  # what the results stand on


def test_no_report_of_nothing(project: Path) -> None:
    with pytest.raises(TavError, match=r"results/fish: nothing to report yet; dvc repro score@fish"):
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
    check_alone(page)
    assert page.all("a", "href") == ["ball/report.html", "gone/report.html"]
    assert f"ball {CAPTION} 3 edits" in page.text and "text alignment 0.597" in page.text
    assert "gone 0 edits, not scored yet" in page.text
    for uri in page.all("img", "src"):
        with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
            assert picture.size == (480, 240)


def test_the_score_stage_leaves_a_report_and_outlasts_its_failure(
    project: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    change_params(project, {"tracking": {"uri": None}, "runtime": {"device": "cpu"}})
    with ClipStages(project, CLIP).session("edit"):
        pass
    assert not (project / REPORT).exists()
    assert "none here yet; tav report ball makes it" in show(project, [CLIP])
    with ClipStages(project, CLIP).session("score"):
        pass
    page = Page(project / REPORT)
    assert "score 0.0 s 0%" in page.text  # its own time is known by then
    assert (project / "results/index.html").exists()
    assert show(project, [CLIP]).endswith(f"\nreport:  {REPORT}")

    def failing(root: Path, clip: str) -> Path:
        raise OSError("disk full")

    monkeypatch.setattr("tav.reports.report.write_report", failing)
    (project / REPORT).unlink()
    with caplog.at_level(logging.WARNING), ClipStages(project, CLIP).session("score"):
        pass
    assert "no report of ball: disk full" in caplog.text and not (project / REPORT).exists()


# Figures


def picture_of(uri: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
        return np.asarray(picture)


def test_a_heat_map_gets_lighter_with_the_similarity() -> None:
    values = [[1.0, 0.9, 0.5], [0.9, 1.0, 0.99], [0.5, 0.99, 1.0]]
    map_ = heat_map(values, 0.5)
    assert map_.mean == pytest.approx((0.9 + 0.5 + 0.99) / 3) and map_.lowest == (0.5, 1, 3)
    assert map_.values == [10000, 9000, 5000, 9000, 10000, 9900, 5000, 9900, 10000] and map_.frames == [1, 2, 3]
    pixels = picture_of(map_.picture).astype(int)
    assert pixels.shape == (3, 3, 3)
    light = pixels.sum(-1)
    assert light[0, 2] < light[0, 1] < light[1, 2] < light[0, 0]
    scale = heat_scale(0.5)
    ends = picture_of(scale.picture)[0, [0, -1]]
    assert (ends == pixels[[0, 0], [2, 0]]).all()
    assert [text for _, text in scale.ticks][:: len(scale.ticks) - 1] == ["0.5", "1"]
    places = [place for place, _ in scale.ticks]
    assert places == sorted(places) and places[0] == 0 and places[-1] == 1


def test_heat_maps_of_one_and_of_many_frames() -> None:
    one = heat_map([[1.0]], 0.95)
    assert one.mean is None and one.lowest is None and picture_of(one.picture).shape == (1, 1, 3)
    count = 3 * MOST_CELLS
    many = heat_map(np.ones((count, count)), 0.95)
    assert len(many.frames) == MOST_CELLS and (many.frames[0], many.frames[-1]) == (1, count)
    assert len(many.values) == MOST_CELLS**2 and many.mean == 1


@pytest.mark.parametrize(
    "attention", [("first", "former"), ("self",), ("all",), ("former", "former", "next"), ("middle",)]
)
@pytest.mark.parametrize("frames", [1, 8, MOST_ROWS + 2])
def test_the_grid_shows_the_frames_that_attention_takes(attention: tuple[str, ...], frames: int) -> None:
    grid = attention_grid(attention, frames)
    sources = key_frames(attention, frames)
    drawn = {(row, column): count for column, row, count in grid.cells}
    assert grid.shown == min(frames, MOST_ROWS)
    for row in range(grid.shown):
        expected = {column: sources[row].count(column) for column in sources[row] if column < grid.shown}
        assert {column: count for (one, column), count in drawn.items() if one == row} == expected
        assert grid.sees[row] == ", ".join(str(frame + 1) for frame in sources[row])
    assert grid.mean == np.mean([len(set(source)) for source in sources])


def numbers(path: str) -> np.ndarray:
    """The points of a path, n 2."""
    return np.array(re.findall(r"[ML]?(-?[\d.]+) (-?[\d.]+)", path), float)


@pytest.mark.parametrize("count", [1, 2, 400, 5000])
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_the_loss_stays_in_its_frame(count: int, spread: float) -> None:
    rng = np.random.default_rng(count)
    steps = [
        {
            "step": n + 1,
            "loss": 0.01 * 10 ** rng.normal(0, spread),
            "learning_rate": 3e-5,
            "timestep": rng.integers(1000),
        }
        for n in range(count)
    ]
    chart = loss_chart(steps, 400)
    points = [numbers(path) for _, path, _ in chart.series if path]
    assert sum(map(len, points)) == (count if count <= 2000 else pytest.approx(count / 3, abs=4))
    for path in (*points, *(numbers(line) for _, _, line in chart.series if line), numbers(chart.smoothed)):
        assert (path[:, 0] >= chart.left).all() and (path[:, 0] <= chart.right).all()
        assert (path[:, 1] >= chart.top).all() and (path[:, 1] <= chart.bottom).all()
    rate = numbers(chart.rate)
    assert (rate[:, 1] == chart.rate_top).all() and chart.rate_peak == "3e-5"
    assert all(chart.left <= place <= chart.right for place, _ in chart.x.ticks) and chart.x.ticks[0][1] == "1"
    assert len(chart.y.ticks) >= 1 or spread == 0


def test_words_that_an_edit_changes() -> None:
    assert changed_words("a red ball", "A blue ball  rolls") == [
        ("A", False),
        ("blue", True),
        ("ball", False),
        ("rolls", True),
    ]
    assert changed_words("a ball", "a ball") == [("a ball", False)]


def test_times_in_words() -> None:
    assert [clock(seconds) for seconds in (0, 59.9, 59.96, 61, 3599.6, 7500)] == [
        "0.0 s",
        "59.9 s",
        "1 min 0 s",
        "1 min 1 s",
        "1 h 0 min",
        "2 h 5 min",
    ]


# In a browser


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    with browser_window() as window:
        yield window


@pytest.fixture(scope="module")
def reported(made: Path) -> Path:
    write_report(made, CLIP)
    write_index(made)
    return made


@pytest.fixture
def page(window: Browser, reported: Path) -> Iterator[Browser]:
    """The report in a window of 1280 pixels, all its videos loaded."""
    window.emulate(prefers_color_scheme="light", prefers_reduced_motion="no-preference")
    window.resize(1280, 900)
    window.open(reported / REPORT)
    window.run("localStorage.clear()")
    window.messages()
    window.open(reported / REPORT)
    window.wait(
        f"[...document.querySelectorAll('video')].filter(v => v.readyState >= 2).length === {1 + 2 * len(PROMPTS)}"
    )
    yield window
    assert window.messages() == []


SHOWN = "[...document.querySelectorAll('video')].filter(v => !v.closest('[hidden]'))"


def places(page: Browser) -> np.ndarray:
    """Where each video is that is shown, in frames."""
    return np.array(page.run(f"return {SHOWN}.map(v => v.currentTime)")) * float(FPS)


def settled(page: Browser, frame: int) -> None:
    """All videos stand still in the middle of this frame, and all that shows the frame's number says so."""
    page.wait(f"{SHOWN}.every(v => v.paused && !v.seeking)")
    assert places(page) == pytest.approx(frame + 0.5, abs=0.02)
    counter, value, said = page.run(
        "const scrub = document.querySelector('#scrub');"
        "return [document.querySelector('#counter').textContent, scrub.value, scrub.getAttribute('aria-valuetext')]"
    )
    assert (counter, value, said) == (f"{frame + 1} / {FRAMES}", str(frame), f"frame {frame + 1} of {FRAMES}")
    rows = page.run(
        "return [...document.querySelectorAll('[data-row]')].map(r => r.getAttribute('y') / r.dataset.size)"
    )
    assert len(rows) == 5 and rows == pytest.approx([frame] * 5)


def check_in_step(page: Browser, videos: int) -> None:
    """For two seconds all videos move and are within a frame of each other, wherever the loop is."""
    page.wait(f"{SHOWN}.every(v => !v.paused && v.currentTime > 0)")
    time.sleep(0.5)
    samples = []
    for _ in range(20):
        samples.append(places(page))
        time.sleep(0.1)
    samples = np.array(samples)
    assert samples.shape == (20, videos)
    apart = samples - samples[:, :1]
    apart -= FRAMES * np.round(apart / FRAMES)
    assert np.abs(apart).max() < 1, apart
    assert (np.ptp(samples, axis=0) > 3).all()


def test_all_videos_play_in_step_and_with_their_truths(page: Browser) -> None:
    check_in_step(page, 1 + len(PROMPTS))
    page.click("#truth")
    check_in_step(page, 1 + 2 * len(PROMPTS))
    page.run("const s = document.querySelector('#speed'); s.value = '2'; s.dispatchEvent(new Event('change'))")
    check_in_step(page, 1 + 2 * len(PROMPTS))
    page.click("#play")
    page.wait(f"{SHOWN}.every(v => v.paused)")


def test_a_video_that_falls_behind_catches_up(page: Browser) -> None:
    page.wait(f"{SHOWN}.every(v => !v.paused && v.currentTime > 0)")
    page.run(f"const [first, second] = {SHOWN}; second.currentTime = (first.currentTime + 1) % first.duration")
    time.sleep(0.5)
    check_in_step(page, 1 + len(PROMPTS))


def test_a_video_that_does_not_play_from_its_address_plays_as_a_blob(page: Browser) -> None:
    page.run("document.querySelectorAll('video')[1].dispatchEvent(new Event('error'))")
    assert page.run("return document.querySelectorAll('video')[1].src").startswith("blob:")
    check_in_step(page, 1 + len(PROMPTS))
    assert page.run("return document.querySelector('#unplayable').hidden")
    page.run("document.querySelectorAll('video')[1].dispatchEvent(new Event('error'))")
    assert not page.run("return document.querySelector('#unplayable').hidden")


def test_keys_and_scrubbing_move_all_videos(page: Browser) -> None:
    page.wait(f"{SHOWN}.every(v => !v.paused)")
    page.press(SPACE)
    page.wait(f"{SHOWN}.every(v => v.paused && !v.seeking)")
    page.run("const s = document.querySelector('#scrub'); s.value = 3; s.dispatchEvent(new Event('input'))")
    settled(page, 3)
    page.press(RIGHT, RIGHT)
    settled(page, 5)
    page.press(LEFT)
    settled(page, 4)
    page.press(*[RIGHT] * 4)  # past the last
    settled(page, 0)
    page.press(LEFT)
    settled(page, FRAMES - 1)
    page.run("document.querySelector('#scrub').focus()")
    page.press(LEFT)  # the slider's own
    settled(page, FRAMES - 2)
    page.run("document.querySelector('#play').focus()")
    page.press(SPACE)  # the button's own, and once
    page.wait(f"{SHOWN}.every(v => !v.paused)")
    assert page.run("return document.querySelector('#play').getAttribute('aria-label')") == "Pause"
    page.click("#on")
    page.wait(f"{SHOWN}.every(v => v.paused)")


def test_who_wants_less_motion_starts_it_himself(page: Browser, reported: Path) -> None:
    page.emulate(prefers_reduced_motion="reduce")
    page.open(reported / REPORT)
    page.wait("[...document.querySelectorAll('video')].every(v => v.readyState >= 2)")
    time.sleep(0.5)
    assert page.run("return [...document.querySelectorAll('video')].every(v => v.paused && v.currentTime === 0)")
    page.click("#play")
    check_in_step(page, 1 + len(PROMPTS))


def test_the_theme_is_the_systems_until_another_is_chosen(page: Browser, reported: Path) -> None:
    def darkness() -> list[bool]:
        """Whether the paper is darker than the ink, on the page and in its controls."""
        colours = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
        paper, ink = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in page.run(colours))
        return [paper < ink, "dark" in page.run("return getComputedStyle(document.documentElement).colorScheme")]

    assert darkness() == [False, False]
    page.emulate(prefers_color_scheme="dark")
    assert darkness() == [True, True]
    page.click("#theme")
    assert darkness() == [False, False]
    page.open(reported / "results/index.html")
    assert darkness() == [False, False]
    page.emulate(prefers_color_scheme="light")
    page.click("#theme")
    assert darkness() == [True, True]
    page.open(reported / REPORT)
    assert darkness() == [True, True]


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_is_wider_than_the_window(page: Browser, reported: Path, width: int) -> None:
    page.resize(width, 800)
    for name in (REPORT, "results/index.html"):
        page.open(reported / name)
        for details in ("false", "true"):
            page.run(f"document.querySelectorAll('details').forEach(d => d.open = {details})")
            page.run("const t = document.querySelector('#truth'); if (t && !t.checked) t.click()")
            assert page.run("return document.documentElement.scrollWidth") <= width
            page.run("scrollTo(0, document.body.scrollHeight)")
            outside = (
                "return [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, .hidden, #tip')"
                " && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"
            )
            assert page.run(outside) == []


def test_headings_sort_the_table(page: Browser) -> None:
    def order(column: int) -> list[str]:
        page.run("document.querySelectorAll('table.scores thead button')[arguments[0]].click()", column)
        return page.run("return [...document.querySelectorAll('tbody.sorted th')].map(t => t.textContent)")

    assert order(1) == ["cube", "on-sand", "blue-ball"]  # text alignment, the best first
    assert order(1) == ["blue-ball", "on-sand", "cube"]
    assert order(3) == ["cube", "blue-ball", "on-sand"]  # track error: lower is better, and one has none
    assert order(3) == ["blue-ball", "cube", "on-sand"]
    assert order(0) == ["blue-ball", "cube", "on-sand"]
    sorting = page.run(
        "return [...document.querySelectorAll('table.scores thead th')].map(t => t.getAttribute('aria-sort'))"
    )
    assert sorting == ["ascending", None, None, None, None]
    rows = page.run("return [...document.querySelectorAll('table.scores tbody th')].map(t => t.textContent)")
    assert (rows[0], rows[-1]) == ("source", "mean of the edits")


def test_values_of_heat_maps_and_explanations_are_shown_on_demand(page: Browser) -> None:
    tip = "const t = document.querySelector('#tip'); return t.hidden ? null : t.textContent"
    page.click("#play")
    page.move_to(".heat svg image", x=3, y=3)
    row = FRAMES // 2 + 1
    assert page.run(tip) == f"frame {row} with itself: 1.0000"
    page.move_to(".heat svg image", x=-60, y=3)
    text = page.run(tip)
    seen = re.fullmatch(r"frames (\d) and (\d): ([\d.]+)", text)
    assert seen and int(seen[1]) == row and float(seen[3]) == pytest.approx(1 - 0.02 * abs(row - int(seen[2])))
    page.move_to("h1")
    assert page.run(tip) is None

    page.run("document.querySelector('.heats .heat:last-child svg').focus({focusVisible: true})")
    assert page.run(tip) == "frame 1 with itself: 1.0000"
    page.press(DOWN, RIGHT, RIGHT)
    assert page.run(tip) == "frames 2 and 3: 0.9700"
    assert page.run("return document.querySelector('#reading').textContent") == "frames 2 and 3: 0.9700"
    page.press(ESCAPE)
    assert page.run(tip) is None
    page.run("document.querySelectorAll('table.scores thead button')[1].focus()")
    assert page.run(tip) == f"{METRICS['textual_alignment'].explanation} Higher is better."


def test_everything_that_can_be_pressed_has_a_name_and_shows_the_focus(page: Browser) -> None:
    unnamed = (
        "return [...document.querySelectorAll('button, input, select, a, [tabindex], svg[role], video, img')].filter(e =>"
        " !(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.getAttribute('alt')"
        " || e.closest('label')?.textContent.trim() || e.textContent.trim())).map(e => e.outerHTML.slice(0, 80))"
    )
    assert page.run(unnamed) == []
    page.click("#play")
    reached = []
    while not reached or reached[-1][0] != "BODY":
        page.press(TAB)
        focused = "const e = document.activeElement, s = getComputedStyle(e); return [e.tagName, e.id, s.outlineStyle]"
        reached.append(page.run(focused))
        assert len(reached) < 100
    *reached, _ = reached
    assert all(outline == "solid" for _, _, outline in reached), reached
    assert {"theme", "back", "play", "on", "scrub", "speed", "truth"} <= {name for _, name, _ in reached}
    tags = [tag for tag, _, _ in reached]
    assert (tags.count("svg"), tags.count("SUMMARY")) == (1 + len(PROMPTS), len(PROMPTS) + 2)


def test_hostile_texts_do_nothing_in_a_browser(window: Browser, project: Path) -> None:
    set_caption(project, EVIL)
    write_edit(project, "cube", prompt=EVIL, category=EVIL)
    write_scores(project, PROMPTS | {"cube": EVIL})
    write_report(project, CLIP)
    window.messages()
    window.open(project / REPORT)
    assert window.run("return document.querySelector('.caption').textContent") == EVIL
    assert window.run("return document.querySelectorAll('img, script').length") == 2
    assert window.messages() == []


def test_a_page_with_little_on_it_works(window: Browser, project: Path) -> None:
    for name in ("edits", "scores", "tuned"):
        shutil.rmtree(project / "results" / CLIP / name)
    write_report(project, CLIP)
    window.messages()
    window.open(project / REPORT)
    window.wait("document.querySelector('video').currentTime > 0")
    shutil.rmtree(project / "results" / CLIP / "frames")
    (project / "results" / CLIP / "tuned").mkdir()
    tuned = TUNED | {"attention": {"spatial": ["self"], "temporal": False}, "steps": 0}
    (project / "results" / CLIP / "tuned/tuned.json").write_text(json.dumps(tuned))
    write_report(project, CLIP)
    window.open(project / REPORT)
    window.click("#theme")
    assert window.run("return document.documentElement.dataset.theme")
    assert window.messages() == []
