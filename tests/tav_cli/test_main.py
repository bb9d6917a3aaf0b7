"""The command `tav` itself: help, version, completion, usage errors, and which error ends it with which exit code."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from flows import services
from tav_cli import main as command
from tav_model.errors import TavError
from tests.support.projects import ROOT
from tests.support.tav_command import COMMANDS, Tav


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_a_screen_and_has_an_example(name: str) -> None:
    result = CliRunner().invoke(command.app, [*name.split(), "--help"], env={"COLUMNS": "80"})
    lines = result.output.splitlines()
    assert result.exit_code == 0 and len(lines) <= 24 and max(map(len, lines)) <= 80
    assert re.search(rf"^  Example: tav {name or 'run'}\b", result.output, re.MULTILINE)
    if not name:
        for command_name in COMMANDS:
            (line,) = [line for line in lines if line.startswith(f"  {command_name} ")]
            assert not line.endswith("...")


def test_every_option_has_a_help_text() -> None:
    group = typer.main.get_command(command.app)
    for name, one in {"tav": group, **group.commands}.items():
        for option in one.params:
            assert option.hidden or option.help, f"{name}: {option.name}"


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    script = """
import sys
from tav_cli.main import main
try:
    main()
except SystemExit:
    pass
heavy = {"torch", "prefect", "mlflow", "dvc", "pandas", "pydantic", "rich.progress", "numpy"}
print(sorted(heavy & set(sys.modules)))
import resource
usage = resource.getrusage(resource.RUSAGE_SELF)
print(usage.ru_utime + usage.ru_stime)
"""
    call = [sys.executable, "-c", script, "--help"]
    seconds = []
    for _ in range(3):
        *_, heavy, spent = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )[:-1]
        assert heavy == "[]"
        seconds.append(float(spent))
    assert min(seconds) < 0.5


def test_version_and_no_command(tav: Tav) -> None:
    assert re.fullmatch(r"tav \d+\.\d+\.\d+\n", tav("--version").out)
    bare = tav()
    assert bare.code == 0 and bare.out.startswith("Usage: tav [OPTIONS] COMMAND")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["juggle"], "No such command 'juggle' (tav --help)"),
        (["--juggle"], "No such option: --juggle (tav --help)"),
        (["run", "--juggle"], "No such option: --juggle (tav run --help)"),
        (["edit", "ball"], "Missing argument 'PROMPT' (tav edit --help)"),
        (["add", "x.mp4"], "Missing option '--caption' / '--prompt' (tav add --help)"),
        (["add", "x.mp4", "--caption", "a", "--start", "many"], "(tav add --help)"),
    ],
)
def test_usage_errors_are_one_line(tav: Tav, new: Path, arguments: list[str], error: str) -> None:
    ended = tav(*arguments)
    assert ended.code == 2 and error in ended.error


@pytest.mark.parametrize("name", COMMANDS)
def test_outside_of_a_project(tav: Tav, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    given = {
        "add": ["x.mp4", "--caption", "a"],
        "edit": ["ball", "a cat"],
        "base": ["x", "--from", "y"],
        "benchmark": ["x"],
    }
    monkeypatch.chdir(tmp_path)
    ended = tav(name, *given.get(name, []))
    assert ended.code == 2 and f"{tmp_path}: not a project's folder" in ended.error
    (tmp_path / "below").mkdir()
    (tmp_path / "params.yaml").touch()
    monkeypatch.chdir(tmp_path / "below")
    assert tav(name, *given.get(name, [])).error.endswith(f"not a project's folder; cd {tmp_path}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["below", "params.yaml"]


@pytest.mark.parametrize(
    ("typed", "names"),
    [("tav run ", ["ball", "cube"]), ("tav run b", ["ball"]), ("tav edit c", ["cube"]), ("tav st", ["status"])],
)
def test_completion(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], typed: str, names: list[str]
) -> None:
    monkeypatch.chdir(fresh)
    typing = {"_TAV_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    result = CliRunner().invoke(command.app, [], env=typing, prog_name="tav")
    assert result.exit_code == 0 and result.output.split() == names


def test_completion_of_a_broken_params_yaml_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("clips: [", "clips: 3", "- a", "\0", "clips: {1: {}, ball: {}}"):
        (tmp_path / "params.yaml").write_text(text)
        assert command._complete_clip("") == (["ball"] if "ball" in text else [])
    (tmp_path / "params.yaml").unlink()
    assert command._complete_clip("") == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (PermissionError(13, "Permission denied", "logs/x.log"), 1, "error: logs/x.log: Permission denied\n"),
        (OSError(28, "No space left on device"), 1, "error: No space left on device\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (typer.Abort(), 130, "error: stopped\n"),
        (TavError("port 4200 is taken"), 2, "error: port 4200 is taken\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors_end_the_command_with_a_line_and_an_exit_status(
    tav: Tav, new: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, printed: str
) -> None:
    def start(root: Path) -> None:
        raise error

    monkeypatch.setattr(services, "start", start)
    assert tav("up") == (status, "", printed)


@pytest.mark.parametrize("error", [RuntimeError("a defect"), OSError("without a number")])
def test_defects_keep_their_traceback(new: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def start(root: Path) -> None:
        raise error

    monkeypatch.setattr(services, "start", start)
    monkeypatch.setattr(sys, "argv", ["tav", "up"])
    with pytest.raises(type(error), match=str(error)):
        command.main()


def test_colours_are_for_terminals_that_want_them(done: Path) -> None:
    def status_in_a_terminal(**settings: str) -> str:
        reader, terminal = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "tav_cli.main", "status"],
            cwd=done,
            stdout=terminal,
            env={name: value for name, value in os.environ.items() if name != "NO_COLOR"}
            | {"TERM": "xterm"}
            | settings,
        )
        os.close(terminal)
        output = b""
        try:
            while data := os.read(reader, 1000):
                output += data
        except OSError:  # a closed terminal
            pass
        assert process.wait() == 0
        os.close(reader)
        return output.decode()

    assert "\x1b[32mup to date\x1b[0m" in status_in_a_terminal()
    assert not re.search(r"\x1b\[(3|9)\d", status_in_a_terminal(NO_COLOR="1"))
