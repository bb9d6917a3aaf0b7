"""The command `tav`: each sub-command on a small project, its mistakes in one line, and what it leaves alone."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import psutil
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from flows import services as serve
from flows import temporary_server
from tasks.clip_stages import ClipStages
from tasks.rows import RowBatch
from tav.config.stages import STAGES
from tav.media import importing as adding
from tav.versioning.dvc_pipeline import DvcPipeline
from tav_cli import doctor
from tav_cli import main as command
from tav_cli import run as runner
from tav_model.errors import TavError
from tav_model.files import read_json
from tests.support.dvc_project import commit_all, git
from tests.support.dvc_project import environment as dvc_environment
from tests.support.projects import ROOT, change_params, environment
from tests.support.servers import free_port

COMMANDS = ("add", "run", "edit", "status", "report", "compare", "benchmark", "up", "down", "doctor")
QUICK: dict[str, Any] = {
    "decode": {"frames": 2, "width": 64, "height": 64},
    "tune": {"steps": 2},
    "invert": {"steps": 1},
    "edit": {"steps": 1},
    "score": {"clip_model": None},
    "runtime": {"checkpoint_every": 1, "device": "cpu"},
    "tracking": {"uri": None},
}
CLIPS = {
    name: {"video": f"data/{name}.mp4", "caption": "a red ball", "prompts": f"data/{name}.csv", "decode": {}}
    for name in ("ball", "cube")
}
PROJECT_FILES = ("params.yaml", "dvc.yaml", "prefect.toml", "constraints.txt", ".gitignore", ".dvcignore")
PROJECT_FILES += (".dvc/config", ".dvc/.gitignore")
# In the place of the real reports, which have tests of their own.
REPORT = """\
from pathlib import Path

def write_report(root: Path, clip: str) -> Path:
    path = root / "results" / clip / "report.html"
    path.write_text(clip)
    return path

def write_index(root: Path) -> Path:
    path = root / "results" / "index.html"
    path.write_text("all")
    return path
"""
PROGRAM = f"""
import sys, types
sys.modules["tav.reports.report"] = types.ModuleType("report")
exec({REPORT!r}, vars(sys.modules["tav.reports.report"]))
from tav_cli.main import main
main()
"""


class Ended(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a command that was refused."""
        assert self.out == "" and self.err.count("\n") == 1 and self.err.startswith("error: "), self
        return self.err


Tav = Callable[..., Ended]


@pytest.fixture(scope="module")
def isolated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("isolated")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in dvc_environment(folder).items():
            patch.setenv(name, value)
        yield folder


@pytest.fixture(scope="module")
def fresh(isolated: Path) -> Path:
    """A project in which nothing has run, without the code, which is installed; the video of `cube` is broken."""
    project = isolated / "fresh"
    shutil.copytree(ROOT / "data", project / "data")
    for name in PROJECT_FILES:
        (project / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, project / name)
    change_params(project, QUICK, CLIPS)
    (project / "data/ball.csv").write_text("name,prompt\nblue,a blue ball\ncube,a red cube\n")
    (project / "data/cube.mp4").write_text("no video")
    git(project, "init", "-q")
    commit_all(project)
    return project


def settings_of(home: Path) -> dict[str, str]:
    """A Prefect of the test's own, with no server running."""
    return {
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api",
        "TAV_MLFLOW_PORT": str(free_port()),
    }


def started(project: Path, home: Path, *arguments: str, **pipes: Any) -> subprocess.Popen:
    """`tav` in a process of its own."""
    kept = {name: value for name, value in dvc_environment(home).items() if name != "PATH"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        cwd=project,
        env=environment(**kept, **settings_of(home), PYTHONPATH=str(ROOT)),
        text=True,
        start_new_session=True,
        **pipes,
    )


@pytest.fixture(scope="module")
def ran(fresh: Path, isolated: Path) -> tuple[Path, Ended]:
    """A project in which `tav run --json` has run both clips, and what it said."""
    project = Path(shutil.copytree(fresh, isolated / "ran"))
    with started(project, isolated, "run", "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=300)
    return project, Ended(process.returncode, out, err)


@pytest.fixture
def tav(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tav:
    """`tav` in this process and the folder where the test is."""
    for name, value in {"TAV_QUIET": "0", "NO_COLOR": "1", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    for name in ("PREFECT_API_URL", "TAV_MLFLOW_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(temporary_server, "start_temporary_server", lambda log: pytest.fail("a server was started"))

    def call(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["tav", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            command.main()
        return Ended(ended.value.code, *capsys.readouterr())

    return call


@pytest.fixture
def new(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = Path(shutil.copytree(fresh, tmp_path / "project"))
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def done(ran: tuple[Path, Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = Path(shutil.copytree(ran[0], tmp_path / "project"))
    monkeypatch.chdir(root)
    return root


def contents(root: Path) -> dict[str, bytes]:
    """All files of a project but those of git, DVC and our own work folder."""
    parts = {".git", ".dvc", ".tav", "logs", "__pycache__"}
    files = (path for path in root.rglob("*") if path.is_file() and not parts & set(path.relative_to(root).parts))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# The command itself


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_a_screen_and_has_an_example(name: str) -> None:
    shown = CliRunner().invoke(command.app, [*name.split(), "--help"], env={"COLUMNS": "80"})
    lines = shown.output.splitlines()
    assert shown.exit_code == 0 and len(lines) <= 24 and max(map(len, lines)) <= 80
    assert re.search(rf"^  Example: tav {name or 'run'}\b", shown.output, re.MULTILINE)
    if not name:
        for command_name in COMMANDS:
            (line,) = [line for line in lines if line.startswith(f"  {command_name} ")]
            assert not line.endswith("...")


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
        (["add", "x.mp4", "--caption", "a", "--frames", "many"], "(tav add --help)"),
    ],
)
def test_usage_errors_are_one_line(tav: Tav, new: Path, arguments: list[str], error: str) -> None:
    ended = tav(*arguments)
    assert ended.code == 2 and error in ended.error


@pytest.mark.parametrize("name", COMMANDS)
def test_outside_of_a_project(tav: Tav, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    given = {"add": ["x.mp4", "--caption", "a"], "edit": ["ball", "a cat"], "benchmark": ["x"]}
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
    shown = CliRunner().invoke(command.app, [], env=typing, prog_name="tav")
    assert shown.exit_code == 0 and shown.output.split() == names


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


def test_trouble_with_files_and_interrupts(tav: Tav, new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(error: BaseException) -> Callable[..., None]:
        def up(root: Path) -> None:
            raise error

        return up

    monkeypatch.setattr(serve, "up", fails(PermissionError(13, "Permission denied", "logs/serve.log")))
    assert tav("up") == (1, "", "error: logs/serve.log: Permission denied\n")
    monkeypatch.setattr(serve, "up", fails(KeyboardInterrupt()))
    assert tav("up") == (130, "", "stopped\n")
    monkeypatch.setattr(serve, "up", fails(TavError("port 4200 is taken")))
    assert tav("up") == (2, "", "error: port 4200 is taken\n")


def test_up_and_down_are_those_of_the_services(tav: Tav, new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Path] = []
    monkeypatch.setattr(serve, "up", called.append)
    assert tav("up").code == 0 and called == [new]
    monkeypatch.undo()
    monkeypatch.chdir(new)
    assert tav("down").out == "not running\n"


def test_colours_are_for_terminals_that_want_them(done: Path) -> None:
    def shown(**settings: str) -> str:
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

    assert "\x1b[32mup to date\x1b[0m" in shown()
    assert not re.search(r"\x1b\[(3|9)\d", shown(NO_COLOR="1"))


# tav run


def test_run_brings_up_to_date_what_it_can(ran: tuple[Path, Ended]) -> None:
    project, ended = ran
    assert ended.code == 1, ended.err
    result = json.loads(ended.out)["clips"]
    ball, cube = result["ball"], result["cube"]
    assert ball["stages"] == dict.fromkeys(STAGES, "done") and ball["error"] is None
    assert set(ball["edits"]) == {"blue", "cube"}
    for path in (*(edit["video"] for edit in ball["edits"].values()), ball["picture"], ball["report"]):
        assert (project / path).is_file()
    assert ball["scores"].keys() == ball["edits"]["blue"]["scores"].keys() >= {"flicker", "warping_error"}
    assert cube["stages"] == {} and "not a video that can be read" in cube["error"]
    lines = ended.err.splitlines()
    assert [line.partition(" done in ")[0] for line in lines if " done in " in line and line.startswith("ball: ")] == [
        f"ball: {stage}" for stage in STAGES
    ]
    assert lines[-2].startswith("error: cube: ") and lines[-1].startswith("1 of 2 clips failed")
    assert "|" not in ended.err and "Traceback" not in ended.err  # Prefect's log lines have bars
    assert "Finished in state Failed" in (project / "logs/run.log").read_text()


def test_run_knows_when_there_is_nothing_to_do(tav: Tav, done: Path, fake_reports: None) -> None:
    before = contents(done)
    ended = tav("run", "ball", "ball")
    assert ended.code == 0 and ended.err == "ball: up to date\n"
    rows = [line.split()[0] for line in ended.out.splitlines() if line]
    assert rows == ["ball:", "warping_error", "(source)", "blue", "cube", "(mean)", "videos:", "picture:", "report:"]
    assert ended.out.endswith("report:  results/ball/report.html\n")
    assert contents(done) == before
    (done / "results/ball/report.html").unlink()
    tav("run", "ball")
    assert contents(done) == before
    assert tav("run", "ball", "--quiet", "--json").err == ""
    # What is there already is no change.
    assert tav("run", "ball", "--set", "tune.steps=2", "--prompts", done / "data/ball.csv").code == 0


def test_run_names_what_has_failed(tav: Tav, done: Path, fake_reports: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows_fail(root: Path, clips: list[str], overrides: dict[str, Any], report: Any) -> None:
        assert (clips, overrides) == (["ball", "cube"], {"edit.steps": "2"})
        for stage in STAGES[:4]:
            report.stage("ball", stage, "up to date")
        report.stage("ball", "edit", "begins")
        report.ended("ball", "edit: 1 of 2 rows failed: blue (why). 1 done and kept")
        for stage in STAGES:
            report.stage("cube", stage, "up to date")
        report.ended("cube", None)

    monkeypatch.setattr(runner, "_run_flow", rows_fail)
    shutil.copytree(done / "results/ball", done / "results/cube")
    ended = tav("run", "--set", "edit.steps=2")
    assert ended.code == 1
    assert ended.out.startswith("cube: attention first, former + temporal\n")
    assert ended.err.splitlines() == [
        "ball: decode, encode, tune, invert up to date",
        "cube: up to date",
        "error: ball: edit: 1 of 2 rows failed: blue (why). 1 done and kept",
        "1 of 2 clips failed; logs/CLIP/STAGE.log say more",
    ]
    monkeypatch.setattr(runner, "_run_flow", lambda *_: "no Prefect server can be started")
    assert tav("run", "--set", "edit.steps=2") == (1, "", "error: no Prefect server can be started\n")


def test_a_report_that_fails_fails_no_run(tav: Tav, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_report(root: Path, clip: str) -> Path:
        raise TavError("no room")

    monkeypatch.setitem(sys.modules, "tav.reports.report", SimpleNamespace(write_report=write_report, write_index=None))
    (done / "results/ball/report.html").unlink()
    ended = tav("run", "ball")
    assert ended.code == 0 and "report:  none here yet; tav report ball makes it" in ended.out
    assert ended.err == "ball: up to date\nwarning: no report of ball: no room\n"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["cat"], "no clip named 'cat'; there are: ball, cube"),
        (["--set", "tune.steps"], "--set: 'tune.steps' is not allowed: must be KEY=VALUE"),
        (["--set", "tune.step=3"], "override tune.step: unknown key; did you mean steps?"),
        (["--set", "tune.steps=-1"], "tune.steps: -1 is not allowed: must be a whole number"),
        (["--set", "clips.ball.caption= "], "clips.ball.caption: '' is not allowed"),
        (["--set", "base_model=missing"], "no model 'missing': it is neither a folder"),
        (["--set", "clips.ball.video=data/none.mp4"], "data/none.mp4: no such file; it is the video of ball"),
        (["ball", "--prompts", "data/none.csv"], "data/none.csv: no such file"),
        (["ball", "--prompts", "params.yaml"], "params.yaml: line 1: unknown column"),
        (["ball", "--prompts", "/etc/passwd"], "--prompts: '/etc/passwd' lies outside of the project"),
        (["ball", "--prompts", "data/../../x.csv"], "--prompts: 'data/../../x.csv' lies outside of the project"),
    ],
)
def test_run_refuses_mistakes_before_any_work(tav: Tav, new: Path, arguments: list[str], error: str) -> None:
    before = contents(new)
    ended = tav("run", *arguments)
    assert ended.code == 2 and error in ended.error
    assert contents(new) == before


@pytest.mark.timeout(200)
def test_run_is_stopped_by_an_interrupt_and_nothing_is_left_running(done: Path, isolated: Path, tmp_path: Path) -> None:
    checkpoints = done / ".tav" / "checkpoints" / "ball"
    with (tmp_path / "err").open("w") as err:
        process = started(done, isolated, "run", "ball", "--set", "tune.steps=90000", stderr=err, stdout=err)
    deadline = time.monotonic() + 150
    while not any(checkpoints.glob("step-*")):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "err").read_text()
        time.sleep(0.2)
    (server,) = [
        child for child in psutil.Process(process.pid).children() if "flows.temporary_server" in child.cmdline()
    ]
    os.killpg(process.pid, signal.SIGINT)  # As a terminal sends it, to all of the foreground.
    assert process.wait(60) == 130
    said = (tmp_path / "err").read_text().splitlines()
    assert said[0] == "ball: decode, encode up to date"
    assert said[-1] == "stopped; the same command goes on from here" and "Traceback" not in " ".join(said)
    assert psutil.wait_procs([server], timeout=30)[1] == []
    assert read_yaml(done / "params.yaml")["tune"]["steps"] == 90000


def read_yaml(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


# tav add


def test_add_copies_a_video_and_keeps_params_yaml(tav: Tav, new: Path, tmp_path: Path) -> None:
    shutil.copy(ROOT / "params.yaml", new / "params.yaml")  # with comments
    before = (new / "params.yaml").read_text()
    video = Path(shutil.copy(new / "data/ball.mp4", tmp_path / "Mein Vidéo (1).MP4"))
    ended = tav(
        "add", video, "--caption", "a ball: red", "--edit", "a blue ball", "--edit", "a cat, red", "--frames", 4
    )
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[:2] == [
        "mein-video-1",
        "  video    data/mein-video-1.mp4: 4 frames of 128x128 are used",
    ]
    assert ended.err == "next: tav run mein-video-1\n"
    text = (new / "params.yaml").read_text()
    assert text.startswith(before)
    assert yaml.safe_load(text)["clips"]["mein-video-1"] == {
        "video": "data/mein-video-1.mp4",
        "caption": "a ball: red",
        "prompts": "data/mein-video-1.csv",
        "decode": {"frames": 4},
    }
    assert (new / "data/mein-video-1.mp4").read_bytes() == video.read_bytes()
    assert (new / "data/mein-video-1.csv").read_text() == 'prompt\na blue ball\n"a cat, red"\n'
    assert json.loads(tav("status", "mein-video-1", "--json").out)["clips"]["mein-video-1"]["prompts"]["todo"] == [
        "a-blue-ball",
        "a-cat-red",
    ]


def test_add_refers_to_what_is_in_the_project(tav: Tav, new: Path) -> None:
    ended = tav(
        "add", "data/ball.mp4", "--prompt", "a ball", "--name", "b", "--stride", 3, "--size", "128x64", "--json"
    )
    assert json.loads(ended.out) == {
        "name": "b",
        "video": "data/ball.mp4",
        "caption": "a ball",
        "prompts": "data/b.csv",
        "frames": 2,
        "height": 64,
        "width": 128,
        "edits": ["a-ball"],  # The caption: something to run from the start.
    }
    assert read_yaml(new / "params.yaml")["clips"]["b"]["decode"] == {
        "width": 128,
        "height": 64,
        "sampling": "stride",
        "stride": 3,
    }
    assert sorted(path.name for path in (new / "data").iterdir() if path.is_file()) == [
        "b.csv",
        *sorted(f"{name}.{kind}" for name in ("ball", "cube", "fish", "rocket") for kind in ("csv", "mp4")),
    ]


def test_add_takes_prompts_that_are_there_and_what_a_kill_has_left(tav: Tav, new: Path, tmp_path: Path) -> None:
    shutil.copy(new / "data/ball.mp4", tmp_path / "kite.mp4")
    shutil.copy(new / "data/ball.mp4", new / "data/kite.mp4")
    (new / "data/kite.csv").write_text("prompt,seed\na kite,3\n")
    assert json.loads(tav("add", tmp_path / "kite.mp4", "--caption", "a", "--json").out)["edits"] == ["a-kite"]
    assert (new / "data/kite.csv").read_text() == "prompt,seed\na kite,3\n"


def test_add_takes_a_folder_of_images(tav: Tav, new: Path, tmp_path: Path) -> None:
    frames = tmp_path / "frames"
    frames.mkdir()
    for number in range(3):
        Image.new("RGB", (80, 64), (number * 80, 0, 0)).save(frames / f"{number}.png")
    (frames / "secret.txt").write_text("secret")
    assert tav("add", frames, "--caption", "red").code == 0
    assert sorted(path.name for path in (new / "data/frames").iterdir()) == ["0.png", "1.png", "2.png"]


def test_results_are_copied_not_referred_to(tav: Tav, done: Path) -> None:
    ended = tav("add", "results/ball/edits/blue.mp4", "--caption", "a blue ball", "--json")
    assert json.loads(ended.out)["video"] == "data/blue.mp4"


@pytest.mark.parametrize(
    ("video", "options", "error"),
    [
        ("none.mp4", {}, "none.mp4: no such file"),
        ("a\0b.mp4", {}, "null byte"),
        ("text.mp4", {}, "text.mp4: not a video that can be read"),
        ("pipe.mp4", {}, "pipe.mp4: neither a video file nor a folder of images"),
        ("ball.mp4", {"--name": "../x"}, "--name: '../x' is not allowed: must be 1 to 64 of a-z"),
        ("ball.mp4", {"--name": "Ball"}, "--name: 'Ball' is not allowed"),
        ("ball.mp4", {}, "clips: 'ball' already exists; choose another name (--name)"),
        ("ball.mp4", {"--name": "fish"}, "data/fish.mp4: another file exists there; choose another name"),
        ("data/ball.mp4", {"--name": "fish", "--edit": "a"}, "data/fish.csv: has other prompts already"),
        ("ball.mp4", {"--name": "x", "--frames": 25}, "has 24 frames, but 25 are needed"),
        ("ball.mp4", {"--name": "x", "--frames": 0}, "clips.x.decode.frames: 0 is not allowed"),
        ("ball.mp4", {"--name": "x", "--size": "100x100"}, "clips.x.decode.width: 100 is not allowed"),
        ("ball.mp4", {"--name": "x", "--size": "big"}, "--size: 'big' is not allowed: must be WIDTHxHEIGHT"),
        ("ball.mp4", {"--name": "x", "--caption": " "}, "--caption: must be a string that is not blank"),
        ("ball.mp4", {"--name": "x", "--edit": ""}, "--edit: the prompt is empty"),
        ("ball.mp4", {"--name": "x", "--edit": "a\x07"}, "--edit: prompt: 'a\\x07' is not a string without control"),
        ("🎈.mp4", {}, "cannot make a clip name from this; choose one (--name)"),
    ],
)
def test_add_refuses_mistakes_and_changes_nothing(
    tav: Tav, new: Path, tmp_path: Path, video: str, options: dict[str, object], error: str
) -> None:
    for name in ("ball.mp4", "🎈.mp4"):
        shutil.copy(new / "data/ball.mp4", tmp_path / name)
    (tmp_path / "text.mp4").write_text("no video\n" * 99)
    os.mkfifo(tmp_path / "pipe.mp4")
    before = contents(new)
    path = video if "/" in video else f"{tmp_path}/{video}"
    ended = tav("add", path, *(word for pair in ({"--caption": "a ball"} | options).items() for word in pair))
    assert ended.code == 2 and error in ended.error.replace(f"{new}/", "")
    assert contents(new) == before


@pytest.mark.parametrize("moment", ["probe", "write"])
@pytest.mark.parametrize(("error", "code"), [(OSError(28, "No space left on device"), 1), (KeyboardInterrupt(), 130)])
def test_add_does_all_or_nothing(
    tav: Tav, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, error: BaseException, code: int
) -> None:
    def fails(*_: object) -> None:
        raise error

    shutil.copy(new / "data/ball.mp4", tmp_path / "kite.mp4")
    before = contents(new)
    monkeypatch.setattr(adding, {"probe": "read_frames", "write": "write_text"}[moment], fails)
    assert tav("add", tmp_path / "kite.mp4", "--caption", "a kite").code == code
    assert contents(new) == before
    monkeypatch.undo()
    monkeypatch.chdir(new)
    assert tav("add", tmp_path / "kite.mp4", "--caption", "a kite").code == 0


def test_what_the_user_changes_while_a_video_is_read_stays(
    tav: Tav, new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = adding.read_frames

    def slow(*arguments: Any) -> Any:
        change(new / "params.yaml", "seed: 33", "seed: 34")
        return real(*arguments)

    shutil.copy(new / "data/ball.mp4", tmp_path / "kite.mp4")
    monkeypatch.setattr(adding, "read_frames", slow)
    assert tav("add", tmp_path / "kite.mp4", "--caption", "a kite").code == 0
    params = read_yaml(new / "params.yaml")
    assert params["seed"] == 34 and "kite" in params["clips"]


# tav edit


def test_edit_renders_at_once_and_finds_what_was_rendered(
    tav: Tav, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = tav("edit", "ball", "a green ball", "a green ball", "a blue ball", "--json")
    assert ended.code == 0, ended.err
    green, blue = sorted(json.loads(ended.out)["edits"], key=lambda edit: edit["prompt"], reverse=True)
    assert green == {
        "prompt": "a green ball",
        "video": "results/ball/quick/a-green-ball.mp4",
        "preview": "results/ball/quick/a-green-ball.webp",
        "record": "results/ball/quick/a-green-ball.json",
        "rendered": True,
        "error": None,
    }
    assert not blue["rendered"]  # A row of the CSV has these settings too.
    assert (done / blue["video"]).read_bytes() == (done / "results/ball/edits/blue.mp4").read_bytes()
    assert read_json(done / green["record"])["name"] == "a-green-ball"
    versions = DvcPipeline(done)
    assert all(versions.is_current(stage, "ball") for stage in STAGES)

    shutil.rmtree(done / ".tav/rows")
    monkeypatch.setattr(RowBatch, "render", lambda *_: pytest.fail("rendered again"))
    before = contents(done)
    assert tav("edit", "ball", " a green ball ", "a blue ball", "-q") == (
        0,
        "results/ball/quick/a-green-ball.mp4\nresults/ball/quick/a-blue-ball.mp4\n",
        "",
    )
    assert contents(done) == before


def test_edit_with_other_settings_is_another_video_and_goes_into_the_csv(tav: Tav, done: Path) -> None:
    assert tav("edit", "ball", "a blue ball").out == "results/ball/quick/a-blue-ball.mp4\n"
    ended = tav("edit", "ball", "a blue ball", "--guidance-scale", 2, "--negative-prompt", "red", "--add")
    assert re.fullmatch(r"results/ball/quick/a-blue-ball-[0-9a-f]{8}\.mp4\n", ended.out)
    assert "data/ball.csv: added a-blue-ball" in ended.err
    assert (done / "data/ball.csv").read_text().splitlines() == [
        "name,prompt,guidance_scale,negative_prompt",
        "blue,a blue ball,,",
        "cube,a red cube,,",
        ",a blue ball,2.0,red",
    ]
    record = read_json(done / ended.out.strip().replace(".mp4", ".json"))
    assert (record["guidance_scale"], record["negative_prompt"], record["steps"]) == (2.0, "red", 1)
    # The pipeline has it already.
    assert ClipStages(done, "ball").rows_to_render() == []
    assert "has the prompts already" in tav("edit", "ball", "a blue ball", "--add").err


def test_a_prompt_that_fails_fails_alone(tav: Tav, done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = RowBatch.render

    def render(self: RowBatch, edit: Any, on_step: Any = None) -> None:
        if edit.prompt == "a cat":
            raise RuntimeError("no cats\nat all")
        real(self, edit, on_step)

    monkeypatch.setattr(RowBatch, "render", render)
    before = (done / "data/ball.csv").read_bytes()
    ended = tav("edit", "ball", "a cat", "a red cube", "--add")
    assert ended.code == 1 and ended.out == "results/ball/quick/a-red-cube.mp4\n"
    assert ended.err.splitlines()[-1] == "error: 'a cat': no cats"
    assert (done / "data/ball.csv").read_bytes() == before
    assert "RuntimeError: no cats" in (done / "logs/ball/quick.log").read_text()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["cube", "a cat"], "cube: not tuned and inverted yet; tav run cube does it"),
        (["cat", "a cat"], "no clip named 'cat'; there are: ball, cube"),
        (["ball", " "], "the prompt is empty"),
        (["ball", "a", "--steps", "0"], "steps: '0' is not a whole number between 1 and 1000"),
        (["ball", "a", "--guidance-scale", "nan"], "guidance_scale: 'nan' is not a number between 1 and 100"),
        (["ball", "a", "--seed", "-1"], "seed: '-1' is not a whole number"),
    ],
)
def test_edit_refuses_mistakes(tav: Tav, done: Path, arguments: list[str], error: str) -> None:
    before = contents(done)
    ended = tav("edit", *arguments)
    assert ended.code == 2 and error in ended.error
    assert contents(done) == before


def test_edit_writes_through_no_link_out_of_the_project(tav: Tav, done: Path, tmp_path: Path) -> None:
    (done / "data/ball.csv").rename(tmp_path / "elsewhere.csv")
    (done / "data/ball.csv").symlink_to(tmp_path / "elsewhere.csv")
    before = (tmp_path / "elsewhere.csv").read_bytes()
    assert "data/ball.csv is a link out of the project" in tav("edit", "ball", "a cat", "--add").error
    assert (tmp_path / "elsewhere.csv").read_bytes() == before and not (done / "results/ball/quick").exists()


def test_edit_waits_for_nobody(tav: Tav, done: Path) -> None:
    with ClipStages(done, "ball").session("decode"):
        assert f"is being worked on by process {os.getpid()} (stage decode)" in tav("edit", "ball", "a cat").error


# tav status


def statuses(tav: Tav, *clips: str) -> dict[str, Any]:
    ended = tav("status", "--json", *clips)
    assert ended.code == 0 and ended.err == "", ended
    return json.loads(ended.out)["clips"]


def states(clip: dict[str, Any]) -> dict[str, tuple[str, list[str]]]:
    return {stage: (one["state"], one["reasons"]) for stage, one in clip["stages"].items()}


def test_status_after_a_run_and_of_what_never_ran(tav: Tav, done: Path) -> None:
    before = contents(done)
    found = statuses(tav)
    assert states(found["ball"]) == dict.fromkeys(STAGES, ("up to date", [])) and found["ball"]["up_to_date"]
    assert found["ball"]["prompts"] == {"done": ["blue", "cube"], "todo": [], "problem": None}
    assert {state for state, _ in states(found["cube"]).values()} == {"never run"}
    assert len(found["cube"]["prompts"]["todo"]) == 5
    ended = tav("status")
    assert ended.out.splitlines() == [
        "ball: up to date; prompts: 2 of 2 done",
        "cube: never run; tav run cube makes it",
        "services: not running; tav up starts Prefect and MLflow",
    ]
    assert contents(done) == before
    assert "no clip named 'cat'" in tav("status", "cat").error


def test_status_says_why(tav: Tav, done: Path) -> None:
    change(done / "data/ball.csv", "a red cube\n", "a red cube\nstar,a red star\n")
    (ball,) = statuses(tav, "ball").values()
    assert states(ball)["edit"] == ("stale", ["data/ball.csv changed"])
    assert states(ball)["score"] == ("stale", ["after edit"]) and states(ball)["invert"] == ("up to date", [])
    assert ball["prompts"] == {"done": ["blue", "cube"], "todo": ["star"], "problem": None}
    assert not (done / ".tav/rows/ball/x").exists()

    change(done / "params.yaml", "  learning_rate: 0.001", "  learning_rate: 0.002")
    (ball,) = statuses(tav, "ball").values()
    assert states(ball)["tune"] == ("stale", ["tune.learning_rate 0.001 → 0.002"])
    assert states(ball)["edit"] == ("stale", ["data/ball.csv changed", "after tune"])
    assert ball["prompts"]["todo"] == ["blue", "cube", "star"]
    lines = tav("status", "ball").out.splitlines()
    assert lines[3].split("  ")[1:] and re.fullmatch(r"  tune +stale +tune.learning_rate 0.001 → 0.002 *", lines[3])
    assert lines[7].strip() == "prompts: 0 of 3 done; to do: blue, cube, star"


def test_status_of_what_is_lost_but_cached(tav: Tav, done: Path) -> None:
    shutil.rmtree(done / "results/ball/edits")
    (ball,) = statuses(tav, "ball").values()
    assert ball["stages"]["edit"] == {
        "state": "stale",
        "reasons": ["results/ball/edits is missing"],
        "restorable": True,
    }
    assert ball["prompts"]["todo"] == []
    assert "results/ball/edits is missing; DVC's cache has it" in tav("status", "ball").out
    assert not (done / "results/ball/edits").exists()


def test_status_while_a_stage_runs(tav: Tav, done: Path) -> None:
    change(done / "params.yaml", "  learning_rate: 0.001", "  learning_rate: 0.002")
    with ClipStages(done, "ball").session("tune"):
        (ball,) = statuses(tav, "ball").values()
        # Who only looks is in nobody's way.
        assert states(ball)["tune"] == ("running", [f"process {os.getpid()}"])
        assert states(ball)["invert"] == ("stale", ["after tune"])
    with ClipStages(done, "ball").session("tune"):
        pass


def test_status_of_a_csv_that_is_wrong_is_still_a_status(tav: Tav, done: Path) -> None:
    (done / "data/ball.csv").write_text("prompt,steps\na cat,abc\n")
    (ball,) = statuses(tav, "ball").values()
    assert ball["prompts"]["problem"].startswith("data/ball.csv: line 2: steps: 'abc'")
    assert "prompts: data/ball.csv: line 2: steps" in tav("status").out


def test_status_of_the_services(tav: Tav, done: Path) -> None:
    with serve._only_one(done, "http://127.0.0.1:4200", "http://user:secret@127.0.0.1:5000"):
        found = json.loads(tav("status", "ball", "--json").out)["services"]
        assert found == {"process": os.getpid(), "prefect": "http://127.0.0.1:4200", "mlflow": "http://127.0.0.1:5000"}
        assert "services: Prefect http://127.0.0.1:4200, MLflow http://127.0.0.1:5000" in tav("status", "ball").out
        assert f"already running (process {os.getpid()})" in tav("up").error


# tav report


@pytest.fixture
def fake_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace()
    exec(REPORT, vars(module))
    monkeypatch.setitem(sys.modules, "tav.reports.report", module)


def test_report(tav: Tav, done: Path, fake_reports: None, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda uri: opened.append(uri) or True)
    assert tav("report") == (0, "results/ball/report.html\nresults/index.html\n", "")
    assert (done / "results/index.html").is_file() and opened == []
    assert json.loads(tav("report", "ball", "--json").out) == {
        "clips": {"ball": "results/ball/report.html"},
        "index": "results/index.html",
    }
    tav("report", "--open")
    tav("report", "ball", "--open")
    assert opened == [(done / path).as_uri() for path in ("results/index.html", "results/ball/report.html")]
    monkeypatch.setattr("webbrowser.open", lambda uri: False)
    assert "open results/index.html in one" in tav("report", "--open").err
    assert "no clip named 'cat'" in tav("report", "cat").error
    shutil.rmtree(done / "results")
    assert "no results to report yet; tav run makes some" in tav("report").error


# tav doctor


@pytest.fixture
def ports(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Free ones, whatever runs on this machine."""
    found = {"prefect": free_port(), "mlflow": free_port()}
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{found['prefect']}/api")
    monkeypatch.setenv("TAV_MLFLOW_PORT", str(found["mlflow"]))
    return found


def checks(ended: Ended) -> dict[str, dict[str, str]]:
    answer = json.loads(ended.out)
    found = {check["name"]: check for check in answer["checks"]}
    problems = [check for check in found.values() if check["state"] == "problem"]
    assert answer["problems"] == len(problems) and ended.code == bool(problems)
    assert all(check["advice"] or check["found"] for check in problems)
    return found


NAMES = ["Python", "packages", "torch", "GPU", "threads", "memory", "disk", "codecs", "git", "DVC", "params.yaml"]
NAMES += ["clips", "device", "base model", "clip_model", "Prefect", "MLflow"]


def test_doctor_finds_a_project_well(
    tav: Tav, done: Path, ports: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    change_params(done, {"score": {"clip_model": "toyworld/scorer"}, "tracking": {"uri": "sqlite:///mlflow.db"}})
    monkeypatch.setattr(doctor, "MEMORY", (0, 0))
    monkeypatch.setattr(doctor, "DISK", (0, 0))
    found = checks(tav("doctor", "--json"))
    assert list(found) == NAMES
    states = {name: check["state"] for name, check in found.items()}
    # Other people's programs and packages are no fault of the project's.
    assert set(states.values()) <= {"ok", "warning"}
    assert {states[name] for name in NAMES if name not in ("packages", "threads", "torch", "GPU", "DVC")} == {"ok"}
    assert found["Prefect"]["found"] == f"port {ports['prefect']} is free for tav up"
    assert found["MLflow"]["found"].startswith("mlflow.db will be made by the first run")
    assert "H.264" in found["codecs"]["found"] and "clip_model" in found
    lines = tav("doctor").out.splitlines()
    assert lines[0].startswith("ok") and "Python" in lines[0]
    assert not any(line.startswith("ok") for line in tav("doctor", "--quiet").out.splitlines())


def test_doctor_says_what_is_wrong_and_what_to_do(
    tav: Tav, done: Path, ports: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def codecs() -> doctor.Check:
        raise RuntimeError("an error of a library")

    monkeypatch.setattr(doctor, "_codecs", codecs)
    monkeypatch.setattr(doctor, "DISK", (10**6, 10**6))
    monkeypatch.setattr(doctor, "MEMORY", (0, 10**6))
    shutil.rmtree(done / ".git")
    (done / ".dvc/config").unlink()
    (done / "constraints.txt").write_text("# tested\npytest==0.1\nno-such-package==1.0\n")
    (done / "data/ball.mp4").unlink()
    (done / "models/cut/unet").mkdir(parents=True)
    for part in ("scheduler", "text_encoder", "tokenizer", "unet", "vae"):
        (done / "models/cut" / part).mkdir(exist_ok=True)
        (done / "models/cut" / part / "config.json").write_text("{}")
    header = b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}'
    (done / "models/cut/unet/x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"1234")
    (done / "mlflow.db").write_text("no database" * 99)
    changes = {"base_model": "models/cut", "tracking": {"uri": "sqlite:///mlflow.db"}, "runtime": {"device": "cuda:99"}}
    change_params(done, changes)
    with serve.socket.create_server(("127.0.0.1", ports["prefect"])):
        found = checks(tav("doctor", "--json"))
    wrong = {name: check["found"] for name, check in found.items() if check["state"] == "problem"}
    assert "RuntimeError: an error of a library" in wrong.pop("codecs")
    assert "not a git repository" in wrong.pop("git") and wrong.pop("DVC") == "no folder .dvc here"
    assert wrong.pop("clips").startswith("ball: data/ball.mp4: no such file")
    assert "x.safetensors: not a whole safetensors file" in wrong.pop("base model")
    assert "'cuda:99' is not usable here" in wrong.pop("device") and "GiB free" in wrong.pop("disk")
    assert "file is not a database" in wrong.pop("MLflow") and wrong == {}
    warned = {name: check["found"] for name, check in found.items() if check["state"] == "warning"}
    assert re.fullmatch(r"pytest \S+ \(tested: 0.1\)", warned["packages"]) and "memory" in warned
    assert f"port {ports['prefect']} is taken by another program" in warned["Prefect"]


def test_doctor_of_a_broken_params_yaml(tav: Tav, new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_torch", "_gpus", "_codecs", "_packages"):
        monkeypatch.setattr(doctor, name, lambda *_: doctor.Check("x", "ok", ""))
    monkeypatch.setenv("COLUMNS", "400")
    (new / "params.yaml").write_text("tune: {stepz: 3}\n")
    ended = tav("doctor")
    assert ended.code == 1 and ended.out.splitlines()[-2].startswith("problem  params.yaml  params.yaml: ")
    assert "unknown key; did you mean steps?" in ended.out


def test_the_servers_lock_says_who_holds_it(tmp_path: Path) -> None:
    assert serve.running(tmp_path) is None
    with serve._only_one(tmp_path, "http://a", "http://b"):
        assert serve.running(tmp_path) == serve.Services(os.getpid(), "http://a", "http://b")
        with pytest.raises(TavError, match="already running"), serve._only_one(tmp_path, "c", "d"):
            pass
    assert serve.running(tmp_path) is None
    with (tmp_path / ".tav/serve.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
