"""`tav run`: the flow `tav` in this process, with its progress on the terminal.

Prefect's server is the one of `tav up`, or whatever answers at Prefect's address; where none does, one for this run.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flows.services import answers, api_url, running
from tav.config import Params, load_params, parse_overrides
from tav.config.paths import Project, project_path, resolve_model
from tav.config.stages import STAGES
from tav.runtime.progress import clock, display_on
from tav.versioning.dvc_pipeline import DvcPipeline
from tav_cli.terminal import Bars, complain, print_json, say
from tav_model.errors import TavError
from tav_model.files import read_json

LOG, SERVER_LOG = "logs/run.log", "logs/run-prefect-server.log"


def run(root: Path, clips: Sequence[str], changes: Sequence[str], prompts: str | None, as_json: bool) -> int:
    """Bring clips up to date, and print their scores and where their files are.

    Args:
        clips: names; none: all.
        changes: `KEY=VALUE`, written to params.yaml.
        prompts: a CSV in the project to use for these clips, written to params.yaml.

    Returns:
        The exit code: 0, 1 where a clip has failed, 130 where the user has stopped it.

    Raises:
        TavError: before any work: no such clip, a parameter, prompt CSV or model that is not allowed.
    """
    start = time.monotonic()
    overrides: dict[str, Any] = dict(parse_overrides(changes))
    before = load_params(root / "params.yaml")
    chosen = list(dict.fromkeys(clips)) or list(before.clips)
    for clip in chosen:
        before.clip(clip)
    if prompts is not None:
        prompts = in_project(root, prompts, "--prompts")
        overrides |= {f"clips.{clip}.prompts": prompts for clip in chosen}
    params = load_params(root / "params.yaml", overrides)
    _check(root, params, chosen)

    report = _Report(chosen)
    try:
        versions = DvcPipeline(root)
        if params == before and all(versions.is_current(stage, clip) for clip in chosen for stage in STAGES):
            report.all_current()
        else:
            with report:
                problem = _run_flow(root, chosen, overrides, report)
                if problem:
                    complain(problem)
                    return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    done = [clip for clip in chosen if clip not in report.failed]
    _write_missing_reports(root, done)
    if as_json:
        print_json(_result(root, chosen, report, time.monotonic() - start))
    elif done:
        from tav.reports.score_table import show

        print(show(root, done))
    for clip, reason in report.failed.items():
        complain(f"{clip}: {reason}")
    if report.failed:
        say(f"{len(report.failed)} of {len(chosen)} clips failed; logs/CLIP/STAGE.log say more")
    return 1 if report.failed else 0


def in_project(root: Path, text: str, what: str) -> str:
    """How params.yaml calls a file of the project that a user has named in any way.

    Raises:
        TavError: it lies outside.
    """
    path = Path(text).expanduser()
    if path.is_absolute() or ".." in path.parts:
        # A link in the project counts as what it is called there, wherever it leads.
        ways = [(Path(os.path.normpath(root / path)), root), (path.resolve(), root.resolve())]
        inside = [way.relative_to(top) for way, top in ways if way.is_relative_to(top)]
        if not inside:
            raise TavError(f"{what}: {text!r} lies outside of the project; copy it to data/")
        path = inside[0]
    project_path(root, str(path), what)
    return path.as_posix()


def _check(root: Path, params: Params, clips: Sequence[str]) -> None:
    """What would else be found after the tuning, or after the wait for Prefect."""
    from tav.config.prompts import read_prompts

    resolve_model(root, params.base_model)
    for name in (params.score.clip_model, params.score.pickscore_model):
        if name:
            resolve_model(root, name)
    for clip in clips:
        settings = params.clip(clip)
        video = project_path(root, settings.video, f"params.yaml: clips.{clip}.video")
        if not video.exists():
            raise TavError(f"{settings.video}: no such file; it is the video of {clip} in params.yaml")
        try:
            read_prompts(project_path(root, settings.prompts, f"params.yaml: clips.{clip}.prompts"))
        except TavError as error:
            raise TavError(str(error).replace(f"{root}{os.sep}", "")) from None


def _run_flow(root: Path, clips: list[str], overrides: dict[str, Any], report: _Report) -> str | None:
    """Run the flow; returns what has gone wrong, where that is not one of the clips' own failures."""
    (root / LOG).parent.mkdir(exist_ok=True)
    services = running(root)
    url = services.prefect + "/api" if services else api_url(root)
    if not answers(f"{url}/health", 2):
        from flows.temporary_server import start_temporary_server

        with report.bars.working("starting Prefect"):
            url = start_temporary_server(root / SERVER_LOG) or ""
        if not url:
            return f"no Prefect server can be started for this run; {SERVER_LOG} says why"
    os.environ["PREFECT_API_URL"] = url
    os.environ.setdefault("DO_NOT_TRACK", "1")  # Else Prefect's client counts uses, and says so on the terminal.
    # Its handler on the terminal, not what its pages show.
    os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"
    if services and services.mlflow:
        os.environ["TAV_MLFLOW_URL"] = services.mlflow  # for the links on Prefect's pages
    with report.bars.working("loading"):
        from flows.tav import tav, watched_by

    with watched_by(report), _logged(root / LOG):
        state = tav(clips, None, overrides, return_state=True)
    if state.is_completed() or report.failed:
        return None
    return f"{state.message or state.name}; {LOG} says more"


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Prefect's log goes to a file, and warnings of our own to the terminal."""
    to_file = logging.FileHandler(path, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
    prefect, root = logging.getLogger("prefect"), logging.getLogger()
    warnings = _Warnings(logging.WARNING)
    prefect.addHandler(to_file)
    root.addHandler(warnings)
    try:
        yield
    finally:
        prefect.removeHandler(to_file)
        root.removeHandler(warnings)
        to_file.close()


class _Warnings(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        # Errors of a stage are said at the end, with the clip's name.
        if record.name.partition(".")[0] in ("flows", "tasks", "toyworld", "tav_model") and not record.exc_info:
            say(f"{record.levelname.lower()}: {record.getMessage()}")


class _Report:
    """What the flow says in this process: bars on a terminal, and a line for each stage; a `flows.tav.Watcher`."""

    def __init__(self, clips: Sequence[str]) -> None:
        self.bars = Bars()
        self.events: dict[str, dict[str, str]] = {clip: {} for clip in clips}
        self.failed: dict[str, str] = {}
        self._current: list[str] = []
        self._began = 0.0
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> _Report:
        self._undo.enter_context(self.bars)
        if self.bars.are_wanted:
            self._undo.enter_context(display_on(self.bars))
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def all_current(self) -> None:
        for clip in self.events:
            self.events[clip] = dict.fromkeys(STAGES, "up to date")
            say(f"{clip}: up to date")

    def stage(self, clip: str, stage: str, event: str) -> None:
        title = f"{stage} {clip}"
        if event == "up to date":
            self._current.append(stage)
        else:
            self._say_current(clip)
        if event == "begins":
            from prefect.runtime import flow_run

            os.environ["PREFECT__FLOW_RUN_ID"] = flow_run.id or ""  # As a worker sets it, for MLflow's tags.
            self._began = time.monotonic()
            self.bars.work(title)
            return
        self.events[clip][stage] = event
        self.bars.rest(title)
        if event == "restored":
            say(f"{clip}: {stage} restored from DVC's cache")
        elif event == "done":
            say(f"{clip}: {stage} done in {clock(time.monotonic() - self._began)}")

    def ended(self, clip: str, error: str | None) -> None:
        if len(self._current) == len(STAGES):
            self._current.clear()
            say(f"{clip}: up to date")
        self._say_current(clip)
        for stage in STAGES:
            self.bars.rest(f"{stage} {clip}")
        if error is not None:
            self.failed[clip] = error

    def _say_current(self, clip: str) -> None:
        if self._current:
            say(f"{clip}: {', '.join(self._current)} up to date")
            self._current.clear()


def _write_missing_reports(root: Path, clips: Sequence[str]) -> None:
    """The stage `score` leaves a report, unless it was restored; without one the results are no less."""
    project = Project(root)
    for clip in clips:
        if project.report(clip).exists():
            continue
        try:
            from tav.reports.report import write_index, write_report

            write_report(root, clip)
            write_index(root)
        except Exception as error:
            complain(f"no report of {clip}: {error}", "warning")


def _result(root: Path, clips: Sequence[str], report: _Report, seconds: float) -> dict[str, Any]:
    """What `--json` prints."""
    from tav.config.results import read_scores

    project = Project(root)
    results: dict[str, Any] = {}
    for clip in clips:
        results[clip] = {"error": report.failed.get(clip), "stages": report.events[clip]}
        if clip in report.failed:
            continue
        edits = project.edits(clip).relative_to(root)
        results[clip] |= {
            "scores": read_json(project.scores(clip) / "metrics.json")["mean"],
            "edits": {
                name: {"video": str(edits / f"{name}.mp4"), "scores": scores}
                for name, scores in read_scores(project.scores(clip)).items()
            },
            "picture": str(project.contact_sheet(clip).relative_to(root)),
            "report": str(project.report(clip).relative_to(root)) if project.report(clip).exists() else None,
        }
    return {"clips": results, "seconds": round(seconds, 3)}
