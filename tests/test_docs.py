"""The documentation: generated pages are current, links lead somewhere, and what it tells the reader to type works."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from tav_model.video import read_video
from tests.support.docs_pages import NEEDS, ROOT, Block, blocks, is_long, is_run, pages, simple_commands
from tests.support.loveu_tgve import write_benchmark
from tests.support.projects import QUICK, environment, fresh_clone
from tests.support.servers import free_port

DOCS = ROOT / "docs"
# Programs of the system and of others, whose options are theirs to check.
OTHERS = {
    "cat",
    "cd",
    "cp",
    "docker",
    "echo",
    "export",
    "git",
    "install",
    "kill",
    "kubectl",
    "ls",
    "mkdir",
    "nvidia-smi",
    "pip",
}
OTHERS |= {"nvidia-smi", "pre-commit", "ray", "sleep", "source", "ssh", "sudo", "tail"}
PREFIXES = ("do", "nohup")
KEYWORDS = ("done", "for")
KINDS = {"sh", "console", "text", "python", "yaml", "csv", "json", "toml"}


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def commands() -> list[tuple[Block, str]]:
    return [(block, line) for page in pages() for block in blocks(page) for line in block.commands]


def inline_commands() -> list[tuple[str, str]]:
    """What is written in a line as code and begins with one of our programs and a second word."""
    found = []
    for page in pages():
        text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for code in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
            # What ends with an option names it, and is no whole command.
            if re.match(r"(tav|dvc|prefect|mlflow|make|python -m) \S", code) and not code.split()[-1].startswith("-"):
                found.append((page_id(page), f"{code} --help" if re.fullmatch(r"tav \w+", code) else code))
    return found


def test_generated_pages_are_current() -> None:
    from docs.generate import pages as generated

    old = [path.relative_to(ROOT).as_posix() for path, text in generated().items() if path.read_text() != text]
    assert not old, f"run `make docs` and commit {', '.join(old)}"


def test_every_block_says_what_it_is() -> None:
    for page in pages():
        for block in blocks(page):
            assert block.kind in KINDS, f"{block}: ```{block.kind}; one of {', '.join(sorted(KINDS))}"
            assert not block.needs or block.needs in NEEDS, f"{block}: needs {block.needs!r}"


def anchors(page: Path) -> set[str]:
    """The headings of a page, as links call them."""
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.replace("`", "")).strip().lower()) for title in titles}


@pytest.mark.parametrize("page", pages(), ids=page_id)
def test_links_and_pictures_are_there(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / unquote(path)).resolve() if path else page
        assert file.exists(), f"{page_id(page)}: {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page_id(page)}: {target}: {sorted(anchors(file))}"


def test_examples_of_parameters_are_allowed() -> None:
    """Excerpts of params.yaml."""
    import yaml

    from tav.config import Params

    shipped = yaml.safe_load((ROOT / "params.yaml").read_text())
    seen = 0
    for page in pages():
        for block in blocks(page):
            excerpt = yaml.safe_load(block.text) if block.kind == "yaml" else None
            if not isinstance(excerpt, dict) or not set(excerpt) <= set(shipped):
                continue
            whole = dict(shipped)
            for key, value in excerpt.items():
                whole[key] = {**shipped[key], **value} if isinstance(value, dict) and key != "clips" else value
            Params.model_validate(json.loads(json.dumps(whole)))
            seen += 1
    assert seen >= 2


# The commands exist


def check_tav(arguments: list[str]) -> None:
    import typer

    from tav_cli.main import app

    check_click(typer.main.get_command(app), "tav", arguments)


def check_click(group: Any, name: str, arguments: list[str]) -> None:
    """Parse a command line of Click as it would be, without doing it."""
    command = group
    while hasattr(command, "commands") and arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
        assert name in command.commands, f"no command {name}; there are {', '.join(command.commands)}"
        command = command.commands[name]
    if not any(word in ("--help", "-h", "--version") for word in arguments):
        command.make_context(name, arguments)


def check_dvc(arguments: list[str]) -> None:
    from dvc.cli import parse_args

    parse_args(arguments)


def check_prefect(arguments: list[str]) -> None:
    from prefect.cli._app import _app

    _app.parse_args([word for word in arguments if word != "--no-prompt"], print_error=False, exit_on_error=False)


def check_mlflow(arguments: list[str]) -> None:
    from mlflow.cli import cli

    check_click(cli, "mlflow", arguments)


def check_make(arguments: list[str]) -> None:
    targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for word in arguments:
        assert "=" in word or word in targets, f"the Makefile has no {word}"


def check_python(arguments: list[str], titles: set[str]) -> None:
    if arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]), f"no module {arguments[1]}"
    elif arguments[0] != "-c":
        assert (ROOT / arguments[0]).exists() or arguments[0] in titles, f"no file {arguments[0]}"


@functools.cache
def checks() -> Mapping[str, Callable[[list[str]], None]]:
    return {
        "tav": check_tav,
        "dvc": check_dvc,
        "prefect": check_prefect,
        "mlflow": check_mlflow,
        "make": check_make,
    }


def check(line: str, titles: set[str]) -> None:
    """That each program of a line is known, and that ours and those we build on take their arguments."""
    for program, *arguments in simple_commands(line):
        while program in PREFIXES:
            program, *arguments = arguments
        if program in KEYWORDS:
            continue
        if program == "python":
            check_python(arguments, titles)
        elif program in checks():
            checks()[program](arguments)
        else:
            assert program in OTHERS, f"unknown program {program}"


@pytest.mark.slow
def test_commands_take_the_options_that_pages_give_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # --quiet sets a variable
    wrong = []
    lines = [(str(block), line, block.page) for block, line in commands()]
    lines += [(place, code, None) for place, code in inline_commands()]
    for place, line, page in lines:
        titles = {block.title for block in blocks(page)} if page else set()
        try:
            check(line, titles)
        except (Exception, SystemExit) as error:
            wrong.append(f"{place}: {line}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)
    assert len(lines) > 100


@pytest.mark.parametrize(
    "line",
    [
        "tav run --sett a=1",
        "tav rum",
        "make demos",
        "dvc reprod",
        "prefect deployment run x --wach",
        "python -m taskss",
    ],
)
def test_a_wrong_command_is_found(line: str) -> None:
    with pytest.raises((Exception, SystemExit, AssertionError)):
        check(line, set())


# The commands work


def runnable() -> list[Any]:
    marks = {True: [pytest.mark.long, pytest.mark.timeout(1800)], False: []}
    return [pytest.param(page, id=page_id(page), marks=marks[is_long(page)]) for page in pages() if is_run(page)]


@pytest.mark.slow
@pytest.mark.parametrize("page", runnable())
def test_the_commands_of_a_page_work(page: Path, tmp_path: Path) -> None:
    """All of them, in order, in one shell, in a fresh clone with small parameters: seconds for each stage."""
    project = prepare(tmp_path)
    script = ["set +e", "trap 'tav down >/dev/null 2>&1' EXIT"]
    expected = []
    for block in blocks(page):
        if block.title and not block.title.startswith("params.yaml"):
            file = project / block.title
            assert not file.exists(), f"{block}: {block.title} is there already"
            script.append(f"cat > {block.title} <<'END-OF-{block.line}'\n{block.text}END-OF-{block.line}")
        if block.needs:
            continue
        for number, line in enumerate(block.commands, 1):
            code = block.exits if number == len(block.commands) else 0
            expected.append((f"{block}: {line}", code))
            # Who leaves something in the background comes back when it is done.
            wait = "\nwait $!" if line.endswith("&") else ""
            script.append(f"echo '@@ begin {len(expected) - 1}'\n{line}{wait}\necho \"@@ end $?\"")
    servers = {
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api",
        "TAV_MLFLOW_PORT": str(free_port()),
        "DVC_SITE_CACHE_DIR": str(tmp_path / "site"),
        "DVC_GLOBAL_CONFIG_DIR": str(tmp_path / "global"),
        "HOME": str(tmp_path / "home"),
        "MAKEFLAGS": f"VENV={tmp_path / 'venv'}",
    }
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=project,
        env=environment(**servers),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1700,
    )
    codes = [int(code) for code in re.findall(r"^@@ end (\d+)$", done.stdout, re.MULTILINE)]
    for (what, code), found in zip(expected, codes, strict=False):
        assert found == code, f"{what}\nexit code {found}, not {code}\n{done.stdout[-6000:]}"
    assert len(codes) == len(expected), done.stdout[-6000:]
    if page.name == "files.md":
        check_files(project)


def prepare(folder: Path) -> Path:
    """A fresh clone, with small parameters, and beside it what pages find there."""
    from tav.config import write_overrides

    project = fresh_clone(folder / "tav")
    small = {f"{section}.{key}": value for section, values in QUICK.items() for key, value in values.items()}
    params = project / "params.yaml"
    write_overrides(params, small)
    params.write_text(params.read_text().partition("  fish:")[0])  # Two clips are enough.
    (folder / "home").mkdir()
    for line in ("[user]", "\tname = test", "\temail = test@localhost"):
        with (folder / "home/.gitconfig").open("a") as file:
            file.write(f"{line}\n")
    subprocess.run(["git", "commit", "-qam", "Small parameters"], cwd=project, check=True)
    _make_data_set(folder / "loveu-tgve-2023")
    _make_environment(folder / "venv")
    return project


def _make_data_set(folder: Path) -> None:
    """A small LOVEU-TGVE-2023 with a clip of the name that the real one has."""
    table = write_benchmark(folder) / "LOVEU-TGVE-2023_Dataset.csv"
    table.write_text(table.read_text().replace("\nball,", "\ngold-fish,"))
    frames = folder / "DAVIS_480p/480p_frames"
    (frames / "ball").rename(frames / "gold-fish")


def _make_environment(folder: Path) -> None:
    """The environment of these tests, as `make` finds one that it has installed."""
    folder.mkdir()
    for path in Path(sys.prefix).iterdir():
        (folder / path.name).symlink_to(path)
    (folder / ".installed").unlink(missing_ok=True)
    (folder / ".installed").touch()


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/how-to/library.md"])
def test_the_library_does_what_a_page_shows(page: str, tmp_path: Path) -> None:
    """The page's Python, in order, with few steps; warnings about packages that nothing here needs would be noise."""
    for name in ("toyworld", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    codes = [block.text for block in blocks(ROOT / page) if block.kind == "python" and not block.title]
    script = re.sub(
        r"(steps=)\d+", r"\g<1>2", "\n".join(codes).replace("from safetensors", f"{RESULTS}\nfrom safetensors")
    )
    assert script.count("steps=2") >= 3
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(ROOT)),
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert "torchvision" not in done.stderr and "Warning" not in done.stderr
    videos = re.findall(r'"([\w-]+)(?:\.mp4)?"', script.partition("prompt")[2])
    written = sorted(tmp_path.glob("*.mp4"))
    assert written and {path.stem for path in written} <= set(videos)
    for path in written:
        frames, fps = read_video(path)
        assert frames.shape == (8, 128, 128, 3) and fps == Fraction(84, 23)


# What the pipeline leaves, made by the library.
RESULTS = """
import shutil
from tav_model.tensors import save_tensors
shutil.copytree("tuned-ball", "results/ball/tuned")
save_tensors("results/ball/inverted/inverted.safetensors", {"latents": inverted}, {})
"""


# The reference says what the code has


def test_every_environment_variable_is_described() -> None:
    used = set()
    for folder in ("tav_cli", "flows", "tasks", "tav", "toyworld", "tav_model"):
        for path in (ROOT / folder).rglob("*.py"):
            used |= set(re.findall(r"\bTAV_[A-Z][A-Z_]*[A-Z]\b", path.read_text()))
    used.discard("TAV_TEST_CLIPS")
    described = set(re.findall(r"^\| `(TAV_[A-Z_]+)`", (DOCS / "reference/environment.md").read_text(), re.MULTILINE))
    assert described - {"TAV_TEST_CLIPS"} == used


def test_every_metric_is_defined() -> None:
    from tav.config.metrics import METRICS

    text = (DOCS / "reference/metrics.md").read_text()
    described = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert described == set(METRICS)
    for name, metric in METRICS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"| {'higher' if metric.higher_is_better else 'lower'} |" in row


def test_every_column_is_described() -> None:
    from tav.config.prompts import CATEGORIES, COLUMNS

    text = (DOCS / "reference/prompts.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == list(COLUMNS)
    assert all(f"`{category}`" in text for category in CATEGORIES)


def check_files(project: Path) -> None:
    """What reference/files.md says of tensors and records, by the results that its commands have left."""
    from safetensors import safe_open

    text = (DOCS / "reference/files.md").read_text()
    rows = re.findall(r"^\| `([\w/]+\.safetensors)` \| (.*?) \| (.*?) \| (.*?) \| (.*?) \|$", text, re.MULTILINE)
    (clip,) = (folder for folder in (project / "results").iterdir() if (folder / "tuned").is_dir())
    assert {name for name, *_ in rows} == {path.relative_to(clip).as_posix() for path in clip.rglob("*.safetensors")}
    for name, keys, _, shape, metadata in rows:
        with safe_open(clip / name, "pt") as file:
            if name != "tuned/tuned.safetensors":
                assert set(re.findall(r"`(\w+)`", keys)) == set(file.keys()), name
                axes = len(shape.strip("`").split())
                assert all(len(file.get_slice(key).get_shape()) == axes for key in file.keys()), name  # noqa: SIM118
            assert set(re.findall(r"`(\w+)`", metadata)) == set(file.metadata()), name
    for name, keys in re.findall(r"^\| `([\w/.]+\.json)` \| (.*?) \|", text, re.MULTILINE):
        path = next(iter(clip.glob(name.replace("NAME", "*"))))
        assert set(re.findall(r"`(\w+)`", keys)) == set(json.loads(path.read_text())), name
    for name, columns in re.findall(r"^\| `([\w/.]+\.csv)` \| (.*?) \|", text, re.MULTILINE):
        found = (clip / name).read_text().partition("\n")[0].split(",")
        assert set(re.findall(r"`(\w+)`", columns)) <= set(found), name


# The site


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    if importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed: pip install -c constraints.txt -e '.[docs]'")
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (site / "index.html").exists() and not list(site.rglob("*.py*"))
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe|source|link)\b[^>]*>", text)
        assert not [tag for tag in fetched if re.search(r"""(src|href)=["']?(https?:)?//""", tag)], page
