"""The report in a browser: playing, keys, sorting, tooltips, themes, widths, and what others can make of it."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tav.config.metrics import METRICS
from tav.reports.report import write_index, write_report
from tests.support.browser import Browser, browser_window
from tests.support.reported import (
    CLIP,
    FPS,
    FRAMES,
    HOSTILE,
    PROMPTS,
    REPORT,
    TUNED,
    set_caption,
    write_edit,
    write_scores,
)

SPACE, LEFT, RIGHT, DOWN, ESCAPE, TAB = " ", "\ue012", "\ue014", "\ue015", "\ue00c", "\ue004"


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


VISIBLE = "[...document.querySelectorAll('video')].filter(v => !v.closest('[hidden]'))"


def positions(page: Browser) -> np.ndarray:
    """Return the position of each visible video, in frames."""
    return np.array(page.run(f"return {VISIBLE}.map(v => v.currentTime)")) * float(FPS)


def check_paused_at(page: Browser, frame: int) -> None:
    """Check that all videos are paused in the middle of this frame, and that everything shows its number."""
    page.wait(f"{VISIBLE}.every(v => v.paused && !v.seeking)")
    assert positions(page) == pytest.approx(frame + 0.5, abs=0.02)
    counter, value, announced = page.run(
        "const scrub = document.querySelector('#scrub');"
        "return [document.querySelector('#counter').textContent, scrub.value, scrub.getAttribute('aria-valuetext')]"
    )
    assert (counter, value, announced) == (f"{frame + 1} / {FRAMES}", str(frame), f"frame {frame + 1} of {FRAMES}")
    rows = page.run(
        "return [...document.querySelectorAll('[data-row]')].map(r => r.getAttribute('y') / r.dataset.size)"
    )
    assert len(rows) == 5 and rows == pytest.approx([frame] * 5)


def check_in_step(page: Browser, videos: int) -> None:
    """Check that for two seconds all videos play within a frame of each other, also when they loop."""
    page.wait(f"{VISIBLE}.every(v => !v.paused && v.currentTime > 0)")
    time.sleep(0.5)
    samples = []
    for _ in range(20):
        samples.append(positions(page))
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
    page.wait(f"{VISIBLE}.every(v => v.paused)")


def test_a_video_that_falls_behind_catches_up(page: Browser) -> None:
    page.wait(f"{VISIBLE}.every(v => !v.paused && v.currentTime > 0)")
    page.run(f"const [first, second] = {VISIBLE}; second.currentTime = (first.currentTime + 1) % first.duration")
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
    page.wait(f"{VISIBLE}.every(v => !v.paused)")
    page.press(SPACE)
    page.wait(f"{VISIBLE}.every(v => v.paused && !v.seeking)")
    page.run("const s = document.querySelector('#scrub'); s.value = 3; s.dispatchEvent(new Event('input'))")
    check_paused_at(page, 3)
    page.press(RIGHT, RIGHT)
    check_paused_at(page, 5)
    page.press(LEFT)
    check_paused_at(page, 4)
    page.press(*[RIGHT] * 4)  # past the last
    check_paused_at(page, 0)
    page.press(LEFT)
    check_paused_at(page, FRAMES - 1)
    page.run("document.querySelector('#scrub').focus()")
    page.press(LEFT)  # the slider's own
    check_paused_at(page, FRAMES - 2)
    page.run("document.querySelector('#play').focus()")
    page.press(SPACE)  # the button's own, and once
    page.wait(f"{VISIBLE}.every(v => !v.paused)")
    assert page.run("return document.querySelector('#play').getAttribute('aria-label')") == "Pause"
    page.click("#forward")
    page.wait(f"{VISIBLE}.every(v => v.paused)")


def test_with_reduced_motion_nothing_plays_until_started(page: Browser, reported: Path) -> None:
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

    assert order(1) == ["cube", "on-sand", "blue-ball"]  # textual alignment, the best first
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


def test_every_control_has_a_name_and_shows_the_focus(page: Browser) -> None:
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
    assert {"theme", "back", "play", "forward", "scrub", "speed", "truth"} <= {name for _, name, _ in reached}
    tags = [tag for tag, _, _ in reached]
    assert (tags.count("svg"), tags.count("SUMMARY")) == (1 + len(PROMPTS), len(PROMPTS) + 2)


def test_hostile_texts_are_harmless(window: Browser, project: Path) -> None:
    set_caption(project, HOSTILE)
    write_edit(project, "cube", prompt=HOSTILE, category=HOSTILE)
    write_scores(project, PROMPTS | {"cube": HOSTILE})
    write_report(project, CLIP)
    window.messages()
    window.open(project / REPORT)
    assert window.run("return document.querySelector('.caption').textContent") == HOSTILE
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
