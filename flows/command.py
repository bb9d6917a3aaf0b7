"""The installed command `tav`. Each sub-command's work is in a module of its own, imported when it is asked for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tav_model.errors import TavError

app = typer.Typer(
    help="One-shot video editing as a reproducible pipeline.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _run_in_the_project() -> None:
    """One-shot video editing as a reproducible pipeline. Run it in the project's folder."""


@app.command()
def compare(
    clip: Annotated[list[str] | None, typer.Option(metavar="NAME", help="A clip; may be given again.")] = None,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC",
            help="Order by this score. Default: textual_alignment, where it is. Ties: the better textual_alignment, "
            "then frame_consistency, then the newer run.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON list instead of tables.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Runs without scores too.")] = False,
) -> None:
    """The MLflow runs of each clip side by side, best first: what differs between them, and their mean scores."""
    from flows.compare import show_comparisons

    show_comparisons(Path.cwd(), clip or [], by, everything, json)


@app.command()
def benchmark(
    folder: Annotated[Path, typer.Argument(help="Where LOVEU-TGVE-2023 was unpacked, with its CSV at the top.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where results and the submission go.")] = Path(
        "results/benchmarks/tgve"
    ),
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A parameter other than params.yaml has it; may be given again."
        ),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="SET/CLIP", help="This clip alone; may be given again.")
    ] = None,
) -> None:
    """Run the LOVEU-TGVE-2023 benchmark: four edits of each clip, scored by category, with a folder to submit.

    A run that was stopped goes on where it was. Exit code 1: some clips have failed.
    """
    from flows.benchmark import benchmark as run_benchmark

    raise typer.Exit(run_benchmark(Path.cwd(), folder, out, changes or [], only or []))


def main() -> None:
    """A user's mistake is one line and exit code 2; trouble with files is one line and exit code 1."""
    try:
        app()
    except TavError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
