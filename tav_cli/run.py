"""`tav run`: run the flow `tav` in this process, with its progress on the terminal.

Prefect's server is that of `tav up`, or what answers at Prefect's address; without one, a server for this run alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flows.services import running, serving_api
from tasks.clip_stages import in_use, unwritable
from tav.config import Params, load_params, overrides_of_clips, parse_overrides
from tav.config.clip_settings import RESULT_SECTIONS, SINGLE_VALUES
from tav.config.dotted_keys import flatten
from tav.config.paper import paper_settings
from tav.config.paths import Project, project_path, resolve_model
from tav.config.stages import STAGES
from tav.runtime.devices import choose_devices
from tav.runtime.events import (
    ClipFinished,
    Event,
    StageFailed,
    StageFinished,
    StageRestored,
    StageStarted,
    StageUpToDate,
    Subscriber,
)
from tav.runtime.exit_status import RESUMABLE, ExitStatus
from tav.runtime.progress import clock
from tav.runtime.progress_display import is_quiet, standard_error_display
from tav.versioning.dvc_pipeline import DvcPipeline
from tav_cli.terminal import ProgressBars, output_console, print_error, print_json, print_message, print_notice
from tav_model.errors import TavError
from tav_model.files import read_json

LOG, SERVER_LOG = "logs/run.log", "logs/run-prefect-server.log"
PACKAGES = ("flows", "tasks", "tav", "toyworld", "tav_model")


def run(
    root: Path,
    clips: Sequence[str],
    overrides: Sequence[str],
    common_overrides: Sequence[str],
    prompts: str | None,
    as_json: bool,
    paper: bool = False,
) -> ExitStatus:
    """Bring clips up to date, and print their scores and where their files are.

    Args:
        root: the project's folder.
        clips: names; empty: all.
        overrides: `KEY=VALUE`, written to params.yaml as these clips' own settings; without `clips`, as the common ones.
        common_overrides: `KEY=VALUE`, written to params.yaml as the settings of all clips.
        prompts: a CSV in the project to use for these clips, written to params.yaml.
        as_json: print a JSON document instead of a table.
        paper: write the paper's settings like `overrides`, which replace single ones of them.

    Raises:
        TavError: before any work: no such clip; a parameter, prompt CSV or model that is not allowed.
    """
    start = time.monotonic()
    common: dict[str, Any] = {**parse_overrides(common_overrides, "--set-all")}
    given = (paper_settings() if paper else {}) | parse_overrides(overrides)
    before = load_params(root / "params.yaml")
    chosen = list(dict.fromkeys(clips)) or list(before.clips)
    for clip in chosen:
        before.clip(clip)
    if clips:
        # As common settings first, so that an error names the key as the user wrote it.
        load_params(root / "params.yaml", common | given)
        changes: dict[str, Any] = {**common, **overrides_of_clips(given, chosen)}
    else:
        common |= given
        changes = dict(common)
    if prompts is not None:
        prompts = path_in_project(root, prompts, "--prompts")
        changes |= {f"clips.{clip}.prompts": prompts for clip in chosen}
    params = load_params(root / "params.yaml", changes)
    _check_inputs(root, params, chosen)
    if params.runtime.device != before.runtime.device:
        choose_devices(params.runtime.device)

    _explain_own_settings(params, common, chosen)
    if clips:
        _explain_common_settings(given)
    _refuse(in_use(root, clip, "run") for clip in chosen)
    progress = FlowProgress(root, chosen)
    try:
        versions = DvcPipeline(root)
        if params == before and all(versions.is_current(stage, clip) for clip in chosen for stage in STAGES):
            progress.report_all_up_to_date()
            from tav.reports.report import refresh_reports

            for clip in chosen:  # Where `dvc repro` restored the results, it has not written their report.
                refresh_reports(root, clip)
        else:
            _refuse(unwritable(root, clip, "run", Project(root).results(clip)) for clip in chosen)
            with progress:
                problem = _run_flow(root, chosen, changes, progress)
            if problem:
                print_error(problem)
                return ExitStatus.FAILED
    except KeyboardInterrupt:
        print_notice(RESUMABLE)
        return ExitStatus.INTERRUPTED
    done = [clip for clip in chosen if clip not in progress.errors]
    if as_json:
        print_json(_result(root, progress, time.monotonic() - start))
    elif done and not is_quiet():
        from tav.reports.score_table import score_table

        output_console().print(score_table(root, done))
    if not progress.errors:
        return ExitStatus.SUCCESS
    for clip, reason in progress.errors.items():
        print_error(f"{clip}: {reason}")
    logs = ", ".join(dict.fromkeys(progress.log(clip) for clip in progress.errors))
    print_message(f"{len(progress.errors)} of {len(chosen)} clips failed; see {logs}")
    return ExitStatus.FAILED


def path_in_project(root: Path, text: str, what: str) -> str:
    """Return the path of a file in the project as params.yaml names it, however the user named it.

    Raises:
        TavError: it is outside the project.
    """
    path = Path(text).expanduser()
    if path.is_absolute() or ".." in path.parts:
        # A link in the project counts by its own name, wherever it leads.
        candidates = [(Path(os.path.normpath(root / path)), root), (path.resolve(), root.resolve())]
        inside = [candidate.relative_to(top) for candidate, top in candidates if candidate.is_relative_to(top)]
        if not inside:
            raise TavError(f"{what}: {text!r} is outside the project; copy it to data/")
        path = inside[0]
    project_path(root, str(path), what)
    return path.as_posix()


def _check_inputs(root: Path, params: Params, clips: Sequence[str]) -> None:
    """Check what would otherwise fail after the tuning, or after Prefect's start, and warn of words that are unknown.

    Raises:
        TavError: a missing model or video, a mask that is none, a control network of another base model, or an invalid
            prompt CSV.
    """
    from tav.config.control import check_control
    from tav.config.prompt_words import unknown_words_warning
    from tav.config.prompts import read_prompts
    from tav.media.masks import check_mask
    from tav_model.base_models import check_base

    warnings = []
    masks: dict[str | None, str] = {}  # Where each is named first: it is read once.
    for clip in clips:
        settings, own = params.clip(clip), params.for_clip(clip)
        check_base(resolve_model(root, own.base_model))
        for name in (own.score.clip_model, own.score.pickscore_model):
            if name:
                resolve_model(root, name)
        check_control(root, clip, params)
        video = project_path(root, settings.video, f"params.yaml: clips.{clip}.video")
        if not video.exists():
            raise TavError(f"{settings.video}: no such file; it is the video of {clip} in params.yaml")
        try:
            rows = read_prompts(project_path(root, settings.prompts, f"params.yaml: clips.{clip}.prompts"))
        except TavError as error:
            raise TavError(str(error).replace(f"{root}{os.sep}", "")) from None
        masks.setdefault(own.edit.mask, "params.yaml: edit.mask")
        for row in rows:
            masks.setdefault(row.mask, f"{settings.prompts}: line {row.line}: mask")
            if row.control_scale is not None and not any("edit" in one.stages for one in own.control):
                raise TavError(f"{settings.prompts}: line {row.line}: control_scale: the clip {clip} has no control")
        texts = [settings.caption, *(row.prompt for row in rows)]
        if warning := unknown_words_warning(root, own.base_model, texts):
            warnings.append(f"warning: {clip}: {warning}")
    for mask, where in masks.items():
        check_mask(root, mask, where)
    for line in warnings:
        print_message(line)


def _explain_own_settings(params: Params, common: Iterable[str], clips: Sequence[str]) -> None:
    """Say which settings of all clips do not apply to a clip, because it has its own."""
    for clip in clips:
        for name, value in flatten(params.clip(clip).model_dump(exclude_unset=True)).items():
            is_set = name not in SINGLE_VALUES or value != "None"
            if is_set and any(name == key or name.startswith(f"{key}.") for key in common):
                print_message(f"{clip}: keeps its own {name}, {value} (clips.{clip}.{name} in params.yaml)")


def _explain_common_settings(given: Iterable[str]) -> None:
    """Say which settings that were given for some clips are those of all, because a clip cannot have its own."""
    if shared := [key for key in given if key.partition(".")[0] not in RESULT_SECTIONS]:
        print_message(f"{', '.join(shared)}: changed for all clips, because clips have no {shared[0]} of their own")


def _refuse(reasons: Iterable[str | None]) -> None:
    """Refuse the run before anything slow if no clip can be worked on. One of several fails alone, when it is its turn.

    Args:
        reasons: for each clip, why it cannot be worked on, or None.

    Raises:
        TavError: with all reasons, if each clip has one.
    """
    reasons = list(reasons)
    if all(reasons):
        raise TavError("; ".join(reason for reason in reasons if reason))


def _run_flow(root: Path, clips: list[str], overrides: dict[str, Any], progress: FlowProgress) -> str | None:
    """Run the flow; return what went wrong, unless it is the failure of a clip, which `progress` receives."""
    (root / LOG).parent.mkdir(exist_ok=True)
    services = running(root)
    url = serving_api(root)
    if url is None:
        from flows.temporary_server import start_temporary_server

        with progress.bars.activity("starting Prefect"):
            url = start_temporary_server(root / SERVER_LOG)
        if url is None:
            return f"no Prefect server can be started for this run; see {SERVER_LOG}"
    os.environ["PREFECT_API_URL"] = url
    os.environ.setdefault("DO_NOT_TRACK", "1")  # Prefect's client would count uses, and announce that on the terminal.
    # The handler on the terminal; Prefect's pages show everything.
    os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "CRITICAL"
    if services and services.mlflow:
        os.environ["TAV_MLFLOW_URL"] = services.mlflow  # for the links on Prefect's pages
    with progress.bars.activity("loading"):
        from flows.observers import observed_by
        from flows.tav import tav

    import httpx

    with observed_by(*progress.subscribers), _prefect_log(root / LOG):
        try:
            state = tav(clips, None, overrides, return_state=True)
        except httpx.TransportError:
            logging.getLogger("prefect").exception("the server is gone")
            return (
                f"Prefect's server no longer answers; what is done is kept, so run it again; see {LOG} and {SERVER_LOG}"
            )
    if state.is_cancelled():  # The flow has handled the interrupt.
        raise KeyboardInterrupt
    if state.is_completed() or progress.errors:
        return None
    return f"{state.message or state.name}; see {LOG}"


@contextlib.contextmanager
def _prefect_log(path: Path) -> Iterator[None]:
    """Write Prefect's log to a file, and print the project's own warnings on the terminal."""
    file_handler = logging.FileHandler(path, encoding="utf-8")
    file_handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
    prefect, root = logging.getLogger("prefect"), logging.getLogger()
    terminal_handler = _TerminalWarnings(logging.WARNING)
    prefect.addHandler(file_handler)
    root.addHandler(terminal_handler)
    try:
        yield
    finally:
        prefect.removeHandler(file_handler)
        root.removeHandler(terminal_handler)
        file_handler.close()


class _TerminalWarnings(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        # Errors of a stage, which have a traceback, are printed at the end with the clip's name.
        if record.name.partition(".")[0] in PACKAGES and not record.exc_info:
            print_message(f"{record.levelname.lower()}: {record.getMessage()}")


class FlowProgress:
    """The progress of the flow in this process: bars on a terminal, and a line for each stage. A subscriber of events.

    Attributes:
        outcomes: for each clip and stage that ended: up to date, restored or done.
        errors: for each clip that failed, why.
    """

    def __init__(self, root: Path, clips: Sequence[str]) -> None:
        self.bars = ProgressBars()
        self.outcomes: dict[str, dict[str, str]] = {clip: {} for clip in clips}
        self.errors: dict[str, str] = {}
        self._project = Project(root)
        self._up_to_date: dict[str, list[str]] = {clip: [] for clip in clips}
        self._started: dict[str, str] = {}

    def __enter__(self) -> FlowProgress:
        self.bars.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.bars.__exit__(*exception)

    @property
    def subscribers(self) -> list[Subscriber]:
        """What receives the flow's events: this, and the bars or lines that show the loops."""
        return [self, *([self.bars] if self.bars.enabled else standard_error_display())]

    def report_all_up_to_date(self) -> None:
        """Report that there is nothing to do."""
        for clip in self.outcomes:
            self.outcomes[clip] = dict.fromkeys(STAGES, "up to date")
            print_message(f"{clip}: up to date")

    def log(self, clip: str) -> str:
        """Return the path of the log of a clip's failure: that of its last stage, or where that is empty, of the run."""
        root = self._project.root
        stage = self._started.get(clip)
        path = self._project.log(clip, stage) if stage else root / LOG
        return str(path.relative_to(root)) if path.exists() and path.stat().st_size else LOG

    def __call__(self, event: Event) -> None:
        """Report the stages of a clip as they start and end."""
        match event:
            case StageUpToDate():
                self._up_to_date[event.clip].append(event.stage)
                self.outcomes[event.clip][event.stage] = "up to date"
            case StageRestored():
                self._ended(event, "restored")
                print_message(f"{event.clip}: {event.stage} restored from DVC's cache")
            case StageStarted():
                self._report_up_to_date(event.clip)
                self._started[event.clip] = event.stage
                self.bars.start_activity(event.title)
            case StageFailed():
                self.bars.end_activity(event.title)
            case StageFinished():
                self._ended(event, "done")
                print_message(f"{event.clip}: {event.stage} done in {clock(event.seconds)}")
            case ClipFinished():
                self._report_up_to_date(event.clip)
                if event.error is not None:
                    self.errors[event.clip] = event.error

    def _ended(self, event: Event, outcome: str) -> None:
        self._report_up_to_date(event.clip)
        self.outcomes[event.clip][event.stage] = outcome
        self.bars.end_activity(event.title)

    def _report_up_to_date(self, clip: str) -> None:
        stages, self._up_to_date[clip] = self._up_to_date[clip], []
        if len(stages) == len(STAGES):
            print_message(f"{clip}: up to date")
        elif stages:
            print_message(f"{clip}: {', '.join(stages)} up to date")


def _result(root: Path, progress: FlowProgress, seconds: float) -> dict[str, Any]:
    """Return the JSON document of a run."""
    from tav.config.results import read_scores

    project = Project(root)
    results: dict[str, Any] = {}
    for clip, outcomes in progress.outcomes.items():
        results[clip] = {"error": progress.errors.get(clip), "stages": outcomes}
        if clip in progress.errors:
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
