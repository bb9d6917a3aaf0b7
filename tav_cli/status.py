"""`tav status`: print which stages are up to date, which are not and why, and which prompts are still to render."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from flows.services import Services, running
from tasks.clip_stages import ClipStages, clip_holder
from tav.config import load_params
from tav.config.stages import STAGES
from tav.runtime.exit_status import ExitStatus
from tav.runtime.redaction import redact
from tav.versioning.dvc_pipeline import DvcPipeline, DvcStageStatus
from tav_cli.terminal import output_console, print_error, print_json
from tav_model.errors import TavError

LOCK_SECONDS = 5  # to wait for another process that holds DVC's lock
STYLES = {"up to date": "green", "stale": "yellow", "running": "cyan", "never run": "dim"}


@dataclass(frozen=True)
class StageStatus:
    """The state of one stage of a clip.

    Attributes:
        state: up to date, stale, never run or running.
        reasons: what has changed; or which earlier stage has to run first.
        restorable: DVC's cache holds its outputs, so that nothing has to be computed.
    """

    state: str
    reasons: list[str]
    restorable: bool


@dataclass(frozen=True)
class ClipStatus:
    """The state of a clip.

    Attributes:
        stages: the state of each stage, in the order of the pipeline.
        done: names of the prompts that are rendered, in the order of the CSV; empty where that is invalid.
        todo: names of the other prompts.
        problem: what is wrong with the CSV.
    """

    stages: dict[str, StageStatus]
    done: list[str]
    todo: list[str]
    problem: str | None = None

    @property
    def is_up_to_date(self) -> bool:
        """Whether every stage is up to date."""
        return all(stage.state == "up to date" for stage in self.stages.values())


def status(root: Path, clips: Sequence[str], as_json: bool) -> ExitStatus:
    """Print the state of clips, and whether the services of `tav up` run; a CSV that is invalid is an error, too.

    Args:
        root: the project's folder.
        clips: names; empty: all.
        as_json: print a JSON document instead of text.

    Raises:
        TavError: no such clip, an invalid params.yaml, or no DVC project.
    """
    params = load_params(root / "params.yaml")
    for clip in clips:
        params.clip(clip)
    versions = DvcPipeline(root, wait=LOCK_SECONDS)
    statuses = {clip: clip_status(root, clip, versions) for clip in list(dict.fromkeys(clips)) or params.clips}
    services = running(root)
    if as_json:
        print_json(_as_json(statuses, services))
    else:
        console = output_console()
        for clip, clip_state in statuses.items():
            _print_clip(console, clip, clip_state, in_full=clip in clips)
        console.print(_services_line(services), highlight=False)
    problems = list(dict.fromkeys(clip_state.problem for clip_state in statuses.values() if clip_state.problem))
    for problem in problems:
        print_error(problem)
    return ExitStatus.USAGE if problems else ExitStatus.SUCCESS


def clip_status(root: Path, clip: str, versions: DvcPipeline) -> ClipStatus:
    """Return the state of a clip, without changing anything."""
    clip_stages = ClipStages(root, clip)
    before_tune = _stages_before_tune(clip_stages)
    stages = _stage_statuses(versions.status(clip, STAGES), clip_holder(root, clip), before_tune)
    tune = stages["tune"]
    if tune.state in ("stale", "never run") and all(stages[stage].state == "up to date" for stage in before_tune):
        step = None if tune.restorable else clip_stages.resume_step()
        if step is not None:
            reason = f"resumes from the checkpoint of step {step} of {clip_stages.params.tune.steps}"
            stages["tune"] = replace(tune, reasons=[*tune.reasons, reason])
    try:
        names = [row.name for row in clip_stages.prompt_rows()]
    except TavError as error:
        return ClipStatus(stages, [], [], str(error).replace(f"{root}/", ""))
    edit = stages["edit"]
    if edit.state == "up to date" or edit.restorable:
        todo: list[str] = []
    elif all(stages[stage].state == "up to date" for stage in STAGES[: STAGES.index("edit")]):
        todo = [row.name for row in clip_stages.rows_to_render()]
    else:
        todo = names  # Other inputs lead to other videos.
    return ClipStatus(stages, [name for name in names if name not in todo], todo)


def _stages_before_tune(clip_stages: ClipStages) -> list[str]:
    """Return the stages whose outputs the tuning may depend on: only with control in it, what `annotate` writes."""
    needed = {"annotate"} if clip_stages.is_tuned_under_control() else set()
    return [stage for stage in STAGES[: STAGES.index("tune")] if stage != "annotate" or stage in needed]


def _stage_statuses(
    dvc_statuses: dict[str, DvcStageStatus], holder: dict[str, Any] | None, before_tune: Sequence[str]
) -> dict[str, StageStatus]:
    """Combine what DVC knows with the stage that runs now; a stage depends on all stages before it.

    Args:
        dvc_statuses: by stage, in the order of the pipeline.
        holder: which process works on the clip, such as `{"process": 123, "stage": "tune"}`.
        before_tune: the stages that `tune` depends on.
    """
    depends_on = {"annotate": ["decode"], "tune": before_tune}
    stages: dict[str, StageStatus] = {}
    for stage, dvc_status in dvc_statuses.items():
        earlier = depends_on.get(stage, stages)
        waits_for = next((one for one in earlier if stages[one].state != "up to date"), None)
        state, reasons = dvc_status.state, dvc_status.reasons
        if holder and holder.get("stage") == stage:
            state, reasons = "running", [f"process {holder['process']}"]
        elif state == "in use":
            state = "stale"
        elif waits_for:
            # Its inputs in results/ will be replaced before it runs.
            reasons = [reason for reason in reasons if not reason.startswith("results/")]
            state = "stale" if state == "up to date" else state
        if waits_for and state != "running":
            reasons = [*reasons, f"after {waits_for}"] if state == "stale" else []
        stages[stage] = StageStatus(state, reasons, dvc_status.is_restorable and not waits_for)
    return stages


def _as_json(statuses: dict[str, ClipStatus], services: Services | None) -> dict[str, Any]:
    return {
        "clips": {
            clip: {
                "up_to_date": clip_state.is_up_to_date,
                "stages": {stage: asdict(stage_state) for stage, stage_state in clip_state.stages.items()},
                "prompts": {"done": clip_state.done, "todo": clip_state.todo, "problem": clip_state.problem},
            }
            for clip, clip_state in statuses.items()
        },
        "services": asdict(services) | {"mlflow": redact(services.mlflow)} if services else None,
    }


def _print_clip(console: Console, clip: str, clip_state: ClipStatus, in_full: bool) -> None:
    """Print one line where all stages agree, unless `in_full`; else a line for each stage."""
    states = {stage.state for stage in clip_state.stages.values()}
    prompts = _prompts_line(clip_state)
    if len(states) == 1 and not in_full and not clip_state.problem and "stale" not in states:
        (state,) = states
        hint = f"; start with: tav run {clip}" if state == "never run" else f"; {prompts}"
        console.print(Text.assemble((clip, "bold"), ": ", (state, STYLES[state]), hint))
        return
    console.print(Text(clip, style="bold"))
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for stage, status in clip_state.stages.items():
        reasons = [*status.reasons, *(["in DVC's cache"] if status.restorable else [])]
        table.add_row("", stage, Text(status.state, style=STYLES[status.state]), Text("; ".join(reasons)))
    console.print(table)
    console.print(Padding(Text(prompts), (0, 0, 0, 2), expand=False))


def _prompts_line(clip_state: ClipStatus) -> str:
    if clip_state.problem:
        return f"prompts: {clip_state.problem}"
    done, todo = clip_state.done, clip_state.todo
    line = f"prompts: {len(done)} of {len(done) + len(todo)} done"
    return f"{line}; to render: {', '.join(todo)}" if todo else line


def _services_line(services: Services | None) -> Text:
    if services is None:
        return Text("services: not running; tav up starts Prefect and MLflow", style="dim")
    mlflow = f", MLflow {redact(services.mlflow)}" if services.mlflow else ""
    return Text(f"services: Prefect {services.prefect}{mlflow}; tav down stops them")
