"""`tav status`: what is up to date, what is not and why, and which prompts are still to be rendered."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
from tav.runtime.redaction import redact
from tav.versioning.dvc_pipeline import DvcPipeline, DvcStageStatus
from tav_cli.terminal import output_console, print_json
from tav_model.errors import TavError

WAIT_SECONDS = 5  # for another process that holds DVC's lock
STYLES = {"up to date": "green", "stale": "yellow", "running": "cyan", "never run": "dim"}


@dataclass(frozen=True)
class StageStatus:
    """One stage of one clip.

    Attributes:
        state: up to date, stale, never run or running.
        reasons: what has changed; or which stage before it is to run first.
        restorable: DVC's cache has what it would give, so that nothing is computed.
    """

    state: str
    reasons: list[str]
    restorable: bool


@dataclass(frozen=True)
class ClipStatus:
    """One clip.

    Attributes:
        done, todo: names of the prompts, in the CSV's order; both empty where it cannot be read.
        problem: what is wrong with the CSV.
    """

    stages: dict[str, StageStatus]
    done: list[str]
    todo: list[str]
    problem: str | None = None

    @property
    def is_current(self) -> bool:
        return all(stage.state == "up to date" for stage in self.stages.values())


def status(root: Path, clips: Sequence[str], as_json: bool) -> None:
    """Print how clips stand, and whether the services of `tav up` run.

    Args:
        clips: names; none: all.

    Raises:
        TavError: no such clip, a params.yaml that is wrong, or no DVC project.
    """
    params = load_params(root / "params.yaml")
    for clip in clips:
        params.clip(clip)
    versions = DvcPipeline(root, wait=WAIT_SECONDS)
    found = {clip: clip_status(root, clip, versions) for clip in list(dict.fromkeys(clips)) or params.clips}
    services = running(root)
    if as_json:
        print_json(_as_json(found, services))
        return
    console = output_console()
    for clip, one in found.items():
        _show(console, clip, one, at_length=clip in clips)
    console.print(_services_line(services), highlight=False)


def clip_status(root: Path, clip: str, versions: DvcPipeline) -> ClipStatus:
    """How one clip stands; nothing is changed."""
    stages = _stages(versions.status(clip, STAGES), clip_holder(root, clip))
    own = ClipStages(root, clip)
    try:
        names = [row.name for row in own.prompt_rows()]
    except TavError as error:
        return ClipStatus(stages, [], [], str(error).replace(f"{root}/", ""))
    edit = stages["edit"]
    if edit.state == "up to date" or edit.restorable:
        todo: list[str] = []
    elif all(stages[stage].state == "up to date" for stage in STAGES[: STAGES.index("edit")]):
        todo = own.rows_to_render()
    else:
        todo = names  # Other inputs, other videos.
    return ClipStatus(stages, [name for name in names if name not in todo], todo)


def _stages(standings: dict[str, DvcStageStatus], worker: str | None) -> dict[str, StageStatus]:
    """With what each stage waits for: each stands on all before it."""
    at_work_on = re.search(r"\(stage (\w+)\)", worker or "")
    stages: dict[str, StageStatus] = {}
    waits_for = None
    for stage, standing in standings.items():
        state, reasons = standing.state, standing.reasons
        if worker and at_work_on and at_work_on[1] == stage:
            state, reasons = "running", [worker.partition(" (")[0]]
        elif state == "in use":
            state = "stale"
        elif waits_for:
            # Whatever lies there of the stages before it will be other files.
            reasons = [reason for reason in reasons if not reason.startswith("results/")]
            state = "stale" if state == "up to date" else state
        if waits_for and state != "running":
            reasons = [*reasons, f"after {waits_for}"] if state == "stale" else []
        stages[stage] = StageStatus(state, reasons, standing.is_restorable and not waits_for)
        if state != "up to date" and waits_for is None:
            waits_for = stage
    return stages


def _as_json(found: dict[str, ClipStatus], services: Services | None) -> dict[str, Any]:
    return {
        "clips": {
            clip: {
                "up_to_date": one.is_current,
                "stages": {stage: asdict(status) for stage, status in one.stages.items()},
                "prompts": {"done": one.done, "todo": one.todo, "problem": one.problem},
            }
            for clip, one in found.items()
        },
        "services": asdict(services) | {"mlflow": redact(services.mlflow)} if services else None,
    }


def _show(console: Console, clip: str, one: ClipStatus, at_length: bool) -> None:
    states = {stage.state for stage in one.stages.values()}
    prompts = _prompts_line(one)
    if len(states) == 1 and not at_length and not one.problem and "stale" not in states:
        (state,) = states
        hint = f"; tav run {clip} makes it" if state == "never run" else f"; {prompts}"
        console.print(Text.assemble((clip, "bold"), ": ", (state, STYLES[state]), hint))
        return
    console.print(Text(clip, style="bold"))
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for stage, status in one.stages.items():
        why = "; ".join(status.reasons)
        if status.restorable:
            why = f"{why}{'; ' if why else ''}DVC's cache has it"
        table.add_row("", stage, Text(status.state, style=STYLES[status.state]), Text(why))
    console.print(table)
    console.print(Padding(Text(prompts), (0, 0, 0, 2), expand=False))


def _prompts_line(one: ClipStatus) -> str:
    if one.problem:
        return f"prompts: {one.problem}"
    line = f"prompts: {len(one.done)} of {len(one.done) + len(one.todo)} done"
    return f"{line}; to do: {', '.join(one.todo)}" if one.todo else line


def _services_line(services: Services | None) -> Text:
    if services is None:
        return Text("services: not running; tav up starts Prefect and MLflow", style="dim")
    mlflow = f", MLflow {redact(services.mlflow)}" if services.mlflow else ""
    return Text(f"services: Prefect {services.prefect}{mlflow}; tav down ends them")
