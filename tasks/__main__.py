"""The command line of the stages, `python -m tasks STAGE --clip NAME`, and of their scores, `python -m tasks show`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tav.runtime.exit_status import RESUMABLE, ExitStatus, explain_error

HELP = {
    "decode": "read the clip's frames, at the size and rate of params.yaml",
    "encode": "the VAE's latents of the frames, and the caption's embeddings",
    "tune": "tune the inflated UNet on the clip",
    "invert": "the noise that the tuned model turns into the clip (DDIM inversion)",
    "edit": "render each row of the clip's prompt CSV",
    "score": "score the edits, and put them on a contact sheet",
    "show": "print the scores there are, and where the pictures and the report lie",
}


def main(arguments: list[str] | None = None) -> ExitStatus:
    parser = argparse.ArgumentParser(
        prog="python -m tasks",
        description="Run one stage of the pipeline, as dvc.yaml does. `dvc repro` runs all that is needed.",
        epilog="example: python -m tasks tune --clip ball",
    )
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for stage, text in HELP.items():
        one = stages.add_parser(stage, help=text, description=text)
        one.add_argument("--clip", metavar="NAME", help="a clip of params.yaml (default: all of them)")
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
    from tav.config import load_params

    root = Path.cwd()
    params = load_params(root / "params.yaml")
    clips = [clip] if clip else list(params.clips)
    if stage == "show":
        from tav.reports.score_table import show

        print(show(root, [name for name in clips if params.clip(name)]))
        return
    from tasks.clip_stages import ClipStages

    for name in clips:
        ClipStages(root, name).run(stage)
        if stage == "score":
            from tav.reports.report import update_reports

            update_reports(root, name)


if __name__ == "__main__":
    sys.exit(main())
