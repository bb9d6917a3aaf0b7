"""Progress bars and messages on standard error: which appear, and when."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tav.runtime.events import EventStream
from tav.runtime.progress import Progress
from tav_cli import terminal
from tav_cli.terminal import ProgressBars, print_error, print_message, print_notice


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal of 120 columns receives."""
    screen = io.StringIO()
    monkeypatch.delenv("TAV_QUIET", raising=False)
    monkeypatch.setattr(
        terminal, "Console", lambda **_: Console(file=screen, force_terminal=True, width=120, highlight=False)
    )
    return screen


def shown(bars: ProgressBars) -> list[str]:
    """The lines of the bars as they are now, without the bars themselves."""
    console = Console(file=io.StringIO(), width=120)
    console.print(bars._rich.get_renderable())
    return [" ".join(line.replace("━", "").replace("╸", "").split()) for line in console.file.getvalue().splitlines()]


def test_a_loop_takes_the_place_of_its_activity_and_returns_to_it(screen: io.StringIO) -> None:
    with ProgressBars() as bars, bars.activity("tune ball"):
        assert bars.enabled and shown(bars) == ["tune ball 0:00"]
        with Progress(EventStream(bars), stage="tune", clip="ball", total=4) as progress:
            progress.update(3, loss=0.25)
            (line,) = shown(bars)
            assert line.startswith("tune ball") and "3/4 steps" in line and line.endswith("loss 0.25")
        (line,) = shown(bars)
        assert line.startswith("tune ball finishing")
    assert shown(bars) == []


def test_a_loop_without_an_activity_is_removed_at_its_end(screen: io.StringIO) -> None:
    with ProgressBars() as bars:
        with Progress(EventStream(bars), stage="edit", clip="ball", total=2) as progress:
            progress.update()
            assert "1/2 steps" in shown(bars)[0]
        assert shown(bars) == []


def test_a_loop_with_nothing_to_do_has_no_bar(screen: io.StringIO) -> None:
    with ProgressBars() as bars, bars.activity("edit ball"):
        with Progress(EventStream(bars), stage="edit", clip="ball", total=0):
            assert shown(bars) == ["edit ball 0:00"]
        assert "0/0" not in "".join(shown(bars))


def test_lines_of_output_are_complete_between_bars(screen: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBars() as bars, bars.activity("edit ball"):
        bars.print_line("results/ball/quick/blue.mp4")
        assert capsys.readouterr().out == "results/ball/quick/blue.mp4\n"
        assert len(shown(bars)) == 1


@pytest.mark.parametrize("quiet", [False, True])
def test_quiet_keeps_notices_and_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    monkeypatch.setenv("TAV_QUIET", str(int(quiet)))
    print_message("ball: up to date")
    print_notice("stopped")
    print_error("an error")
    lines = ["stopped", "error: an error"]
    assert capsys.readouterr().err.splitlines() == (lines if quiet else ["ball: up to date", *lines])
