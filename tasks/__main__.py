"""The command line of the stages, `python -m tasks STAGE --clip NAME`, and of their scores, `python -m tasks show`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tav.runtime.exit_status import RESUMABLE, ExitStatus, explain_error

if TYPE_CHECKING:
    from tav.runtime.events import Event

HELP = {
    "decode": "read the clip's frames, at the size and rate of params.yaml",
    "encode": "encode the frames with the VAE, and the caption with the text encoder",
    "annotate": "compute the edges, depth, ... that control networks see of the frames",
    "tune": "tune the inflated UNet on the clip",
    "invert": "compute the noise that the tuned model turns into the clip (DDIM inversion)",
    "edit": "render each row of the clip's prompt CSV",
    "score": "score the edits, and write a contact sheet",
    "all": "bring all stages up to date in one process, and record each of them for DVC, as `dvc repro` does",
    "show": "print the scores, and where the videos, the contact sheet and the report are",
}


def main(arguments: list[str] | None = None) -> ExitStatus:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks",
        description="Run one stage of the pipeline, as dvc.yaml does. `dvc repro` runs every stage that is out of date.",
        epilog="example: python -m tasks tune --clip ball",
    )
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for stage, text in HELP.items():
        one = stages.add_parser(stage, help=text, description=text)
        one.add_argument("--clip", metavar="NAME", help="a clip of params.yaml (default: every clip)")
    chosen = parser.parse_args(arguments)
    try:
        run(chosen.stage, chosen.clip)
    except KeyboardInterrupt:
        print(RESUMABLE, file=sys.stderr)
        return ExitStatus.INTERRUPTED
    except Exception as error:
        explained = explain_error(error)
        if explained is None:
            raise
        status, message = explained
        stage = f"{chosen.stage}: " if status == ExitStatus.FAILED else ""
        print(f"error: {stage}{message}", file=sys.stderr)
        return status
    return ExitStatus.SUCCESS


def run(stage: str, clip: str | None) -> None:
    """Run one stage, or all, of one clip of the current folder's project, or of every clip.

    Raises:
        TavError: a user's mistake.
        FullDiskError: the disk is full.
    """
    from tav.config import load_params

    root = Path.cwd()
    params = load_params(root / "params.yaml")
    clips = [clip] if clip else list(params.clips)
    if stage == "show":
        show(root, [name for name in clips if params.clip(name)])
        return
    from tasks.clip_stages import ClipStages
    from tav.runtime.events import EventStream
    from tav.runtime.progress_display import standard_error_display

    for name in clips:
        events = EventStream(*standard_error_display())
        stages = ClipStages(root, name, events)
        # The stages that read the caption and the prompts.
        warning = stages.unknown_words_warning() if stage in ("encode", "edit", "all") else None
        if warning:
            print(f"warning: {warning}", file=sys.stderr)
        if stage == "all":
            from tasks.all_stages import bring_up_to_date

            with events.subscribed(print_if_not_run):
                bring_up_to_date(root, name, events)
            continue
        stages.run(stage)
        if stage == "score":
            stages.report()
    if stage == "all":
        show(root, clips)


def show(root: Path, clips: Sequence[str]) -> None:
    """Print the scores of clips."""
    from rich.console import Console

    from tav.reports.score_table import score_table

    Console().print(score_table(root, clips))


def print_if_not_run(event: Event) -> None:
    """Print a line on standard error for a stage that need not run."""
    from tav.runtime.events import StageRestored, StageUpToDate
    from tav.runtime.progress_display import is_quiet

    outcomes = {StageUpToDate: "up to date", StageRestored: "restored from DVC's cache"}
    if type(event) in outcomes and not is_quiet():
        print(f"{event.title}: {outcomes[type(event)]}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
