"""The installed command `tav`. Each sub-command's work is in a module of its own, imported when it is asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tav_model.errors import TavError

# The class is not exported under its own name.
_UsageError: Any = typer.BadParameter.__base__


class _Commands(typer.core.TyperGroup):
    """Errors as one line on stderr: exit code 2 for a user's mistake, 1 for trouble with files, 130 for Ctrl-C."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        sys.exit(_exit_code(lambda: super(_Commands, self).main(*args, **kwargs)))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            raise typer.Exit(130) from None

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)
        for param in params:
            if param.name == "show_completion":
                param.help = "Show completion for the current shell."  # The whole help is to fit one screen.
        return params


class _Command(typer.core.TyperCommand):
    """Usage lines as everywhere else: VIDEO, [CLIP]... (newer Typers write {VIDEO})."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]


def _exit_code(action: Callable[[], Any]) -> int:
    try:
        return action() or 0
    except TavError as error:
        return _fail(str(error), 2)
    except _UsageError as error:
        where = error.ctx.command_path if error.ctx else "tav"
        return _fail(f"{error.format_message().rstrip('.')} ({where} --help)", 2)
    except typer.Abort:
        return _fail("stopped", 130)
    except OSError as error:
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror}", 1)


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


app = typer.Typer(
    cls=_Commands,
    # Plain text: two lines for two options, on any terminal.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    pretty_exceptions_enable=False,
)


def _command(short_help: str, example: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return app.command(cls=_Command, short_help=short_help, epilog=f"Example: {example}")


def _root() -> Path:
    """The project's folder: the current one.

    Raises:
        TavError: it is none.
    """
    here = Path.cwd()
    if not (here / "params.yaml").is_file():
        above = [folder for folder in here.parents if (folder / "params.yaml").is_file()]
        way = f"cd {above[0]}" if above else "cd to one, which has a params.yaml"
        raise TavError(f"{here}: not a project's folder; {way}")
    return here


def _complete_clip(incomplete: str) -> list[str]:
    """Names of clips for the shell; a params.yaml that cannot be read has none."""
    try:
        import yaml

        clips = yaml.load(Path("params.yaml").read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        return [name for name in clips["clips"] if isinstance(name, str) and name.startswith(incomplete)]
    except Exception:
        return []


def _be_quiet(quiet: bool) -> None:
    if quiet:
        os.environ["TAV_QUIET"] = "1"


# Arguments are in the usage line and explained in the text: a section of their own would make that no clearer.
Clips = Annotated[list[str] | None, typer.Argument(metavar="CLIP", hidden=True, autocompletion=_complete_clip)]
Json = Annotated[bool, typer.Option("--json", help="JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Errors alone on stderr.", callback=_be_quiet)]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Another parameter; may be given again.")
]


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"tav {version('tav')}")
        raise typer.Exit()


@app.callback(invoke_without_command=True, epilog="Example: tav run ball      (tav COMMAND --help says more)")
def _tav(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """One-shot video editing as a reproducible pipeline; for a project's folder."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@_command("Add a clip to the project.", 'tav add ~/ski.mp4 --caption "a man is skiing" --edit "a cat is skiing"')
def add(
    video: Annotated[Path, typer.Argument(metavar="VIDEO", hidden=True)],
    caption: Annotated[str, typer.Option("--caption", "--prompt", metavar="TEXT", help="What is seen in it.")],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The clip's name. Default: from the video's.")
    ] = None,
    edit: Annotated[
        list[str] | None, typer.Option(metavar="PROMPT", help="An edit, for its CSV; may be given again.")
    ] = None,
    frames: Annotated[int | None, typer.Option(metavar="N", help="How many frames to use.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="At which size, as 512x512.")] = None,
    start: Annotated[int | None, typer.Option(metavar="N", help="The first frame.")] = None,
    end: Annotated[int | None, typer.Option(metavar="N", help="The frame after the last.")] = None,
    stride: Annotated[
        int | None, typer.Option(metavar="N", help="Each Nth frame, instead of evenly to the end.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Add a clip: its video and prompts in data/, and its entry in params.yaml.

    VIDEO is a video, an animated GIF or a folder of numbered images. What is not in the project yet is copied.
    """
    root = _root()
    from tav_cli.add import add_clip

    chosen = {"frames": frames, "start": start, "end": end, "stride": stride}
    add_clip(root, video, caption, name, edit or [], size, chosen, json)


@_command("Bring clips up to date, from decoding to scores.", "tav run ball --set edit.guidance_scale=5")
def run(
    clips: Clips = None,
    changes: Set = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="CSV", help="Other prompts for these clips, in the project.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Bring clips up to date, all of them by default: decode, encode, tune, invert, edit, score.

    --set and --prompts are written to params.yaml. A run that was stopped goes on where it was. Exit code 1: some
    clips or prompts have failed.
    """
    root = _root()
    from tav_cli.run import run as run_pipeline

    raise typer.Exit(run_pipeline(root, clips or [], changes or [], prompts, json))


@_command(
    "Render prompts at once, from a clip that is tuned.",
    'tav edit ball "a green ball is bouncing on the snow" --seed 7',
)
def edit(
    clip: Annotated[str, typer.Argument(metavar="CLIP", hidden=True, autocompletion=_complete_clip)],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", hidden=True)],
    guidance_scale: Annotated[float | None, typer.Option(metavar="X", help="1 to 100.")] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="1 to 1000.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N")] = None,
    negative_prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What to steer away from.")] = None,
    keep: Annotated[bool, typer.Option("--add", help="Add the prompts to the clip's CSV too.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Render prompts at once, from a clip that is tuned and inverted: results/CLIP/quick/NAME.mp4 for each.

    Settings that are not given are those of params.yaml. What was rendered before is found.
    """
    root = _root()
    from tav_cli.edit import edit_clip

    settings = {
        "guidance_scale": guidance_scale,
        "steps": steps,
        "seed": seed,
        "negative_prompt": negative_prompt,
    }
    raise typer.Exit(edit_clip(root, clip, prompts, settings, keep, json))


@_command("What is up to date, what is not, and why.", "tav status ball")
def status(clips: Clips = None, json: Json = False) -> None:
    """How clips stand, all of them by default: which stages are up to date, which are not and why, and which prompts
    are to do.
    """
    root = _root()
    from tav_cli.status import status as show_status

    show_status(root, clips or [], json)


@_command("Write each clip's page with all there is to see.", "tav report ball --open")
def report(
    clips: Clips = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the report of each clip that has results, or of those named: an HTML page with all there is to see."""
    root = _root()
    from tav_cli.report import report as write_reports

    write_reports(root, clips or [], show, json)


@_command("The MLflow runs of each clip, best first.", "tav compare --clip ball --by frame_consistency")
def compare(
    clip: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A clip; may be given again.", autocompletion=_complete_clip),
    ] = None,
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
    root = _root()
    from tav_cli.compare import show_comparisons

    show_comparisons(root, clip or [], by, everything, json)


@_command("Run the LOVEU-TGVE-2023 benchmark.", "tav benchmark ~/loveu-tgve-2023 --set edit.steps=20")
def benchmark(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", hidden=True)],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where results and the submission go.")] = Path(
        "results/benchmarks/tgve"
    ),
    changes: Set = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="SET/CLIP", help="This clip alone; may be given again.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Run the LOVEU-TGVE-2023 benchmark: four edits of each clip, scored by category, with a folder to submit.

    FOLDER is where it was unpacked, with its CSV at the top. A run that was stopped goes on where it was. Exit code 1:
    some clips have failed.
    """
    root = _root()
    from tav_cli.benchmark import benchmark as run_benchmark

    raise typer.Exit(run_benchmark(root, folder, out, changes or [], only or []))


@_command(
    "Start Prefect and the MLflow UI in the background.", "tav up && prefect deployment run tav/edit-batch --watch"
)
def up() -> None:
    """Start Prefect, its worker and the MLflow UI in the background."""
    root = _root()
    from flows.services import up as start

    start(root)


@_command("End them.", "tav down")
def down() -> None:
    """End what tav up has started."""
    root = _root()
    from flows.services import down as stop

    stop(root)


@_command("Check this machine and this project.", "tav doctor")
def doctor(json: Json = False, quiet: Quiet = False) -> None:
    """Check this machine and this project: what works, what does not, and what to do about it.

    Exit code 1: there is a problem.
    """
    root = _root()
    from tav_cli.doctor import doctor as examine

    raise typer.Exit(examine(root, json))


def main() -> None:
    app(prog_name="tav")


if __name__ == "__main__":
    main()
