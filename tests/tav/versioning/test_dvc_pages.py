"""The page that `dvc plots show` writes needs no network."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest
from dvc_render import VegaRenderer, render_html

from tests.support.browser import browser_window
from tests.support.projects import ROOT

CONFIG = configparser.ConfigParser()
CONFIG.read_string(re.sub(r"(?m)^ +", "", (ROOT / ".dvc/config").read_text()))
TEMPLATE = ROOT / ".dvc" / CONFIG["plots"]["html_template"]


def test_the_template_has_the_libraries_that_dvc_would_load() -> None:
    text = TEMPLATE.read_text(encoding="utf-8")
    wanted = re.findall(r"npm/([a-z-]+)@([0-9.]+)", VegaRenderer.SCRIPTS)
    assert wanted and re.findall(r"<script>/\* ([a-z-]+) ([0-9.]+) \*/", text) == wanted
    assert "{plot_divs}" in text and "{scripts}" not in text
    assert not re.search(r"<(script|link)[^>]*(src|href)=", text)


@pytest.mark.slow
def test_a_loss_curve_is_drawn(tmp_path: Path) -> None:
    points = [{"step": step, "loss": 1 / step, "rev": "workspace"} for step in range(1, 20)]
    curve = VegaRenderer(points, "results/ball/tuned/loss.csv", x="step", y="loss", title="Training loss")
    page = Path(render_html([curve], tmp_path / "index.html", TEMPLATE))
    with browser_window() as browser:
        browser.open(page)
        browser.wait("document.querySelector('.vega-embed canvas, .vega-embed svg')")
        assert not [message for message in browser.messages() if "http" in message.replace("file://", "")]
