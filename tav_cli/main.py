"""The command `tav`: its sub-commands with their options, and how errors end it.

The work of each sub-command is in a module of its own, which is imported when the sub-command runs, so that `tav --help` and
completions stay fast.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tav.runtime.exit_status import ExitStatus, explain_error
from tav_model.errors import TavError

# Typer does not export Click's UsageError, and newer versions bring their own Click.
_UsageError: Any = typer.BadParameter.__base__


class _TavGroup(typer.core.TyperGroup):
    """The group of sub-commands. Errors end it with one line on standard error and an `ExitStatus`."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line, and exit."""
        kwargs["standalone_mode"] = False
        sys.exit(_exit_status(lambda: super(_TavGroup, self).main(*args, **kwargs)))

    def invoke(self, ctx: Any) -> Any:
        """Run the sub-command; Ctrl-C ends it without Click's line break."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            raise typer.Exit(ExitStatus.INTERRUPTED) from None

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options, with a help text for --show-completion that keeps the help on one screen."""
        params: list[Any] = super().get_params(ctx)
        for param in params:
            if param.name == "show_completion":
                param.help = "Show completion for the current shell."
        return params


class _TavCommand(typer.core.TyperCommand):
    """A sub-command with the usual usage line: `VIDEO`, where newer versions of Typer write `{VIDEO}`."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the parts of the usage line."""
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]


def _exit_status(action: Callable[[], Any]) -> int:
    """Run `action`, print the error that it raises, and return the exit code."""
    try:
        return action() or ExitStatus.SUCCESS
    except typer.Abort:
        return _fail(ExitStatus.INTERRUPTED, "stopped")
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx else "tav"
        return _fail(ExitStatus.USAGE, f"{error.format_message().rstrip('.')} ({command} --help)")
    except Exception as error:
        explained = explain_error(error)
        if explained is None:
            raise
        return _fail(*explained)


def _fail(status: ExitStatus, message: str) -> ExitStatus:
    print(f"error: {message}", file=sys.stderr)
    return status


app = typer.Typer(
    cls=_TavGroup,
    # Plain text: two lines for two options, on any terminal.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    pretty_exceptions_enable=False,
)


def _command(short_help: str, example: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return app.command(cls=_TavCommand, short_help=short_help, epilog=f"Example: {example}")


def _project_root() -> Path:
    """Return the project's folder, which is the current one.

    Raises:
        TavError: the current folder is not a project's.
    """
    here = Path.cwd()
    if not (here / "params.yaml").is_file():
        above = [folder for folder in here.parents if (folder / "params.yaml").is_file()]
        advice = f"cd {above[0]}" if above else "cd to the folder that has params.yaml"
        raise TavError(f"{here}: not a project's folder; {advice}")
    return here


def _complete_clip(incomplete: str) -> list[str]:
    """Return the clips that the shell may complete to; none where params.yaml cannot be read."""
    try:
        import yaml

        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        clips = yaml.load(Path("params.yaml").read_bytes(), Loader=loader)  # noqa: S506 (either loader is safe)
        return [name for name in clips["clips"] if isinstance(name, str) and name.startswith(incomplete)]
    except Exception:
        return []


def _set_quiet(quiet: bool) -> None:
    if quiet:
        os.environ["TAV_QUIET"] = "1"


# Arguments are in the usage line and explained in the text: a section of their own would make the help no clearer.
Clips = Annotated[list[str] | None, typer.Argument(metavar="CLIP", hidden=True, autocompletion=_complete_clip)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors on standard error.", callback=_set_quiet)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a parameter; repeatable.")
]
ClipOverrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a parameter of these clips alone; repeatable."),
]
CommonOverrides = Annotated[
    list[str] | None,
    typer.Option("--set-all", metavar="KEY=VALUE", help="Change a parameter of all clips; repeatable."),
]


def _show_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        print(f"tav {version('tav')}")
        raise typer.Exit()


@app.callback(invoke_without_command=True, epilog="Example: tav run ball      (more: tav COMMAND --help)")
def _tav(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """One-shot video editing as a reproducible pipeline. Run it in a project."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@_command("Add a clip to the project.", 'tav add ski.mp4 --caption "a man is skiing" --edit "a cat is skiing"')
def add(
    video: Annotated[Path, typer.Argument(metavar="VIDEO", hidden=True)],
    caption: Annotated[str, typer.Option("--caption", "--prompt", metavar="TEXT", help="What the video shows.")],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the clip. Default: from the video's.")
    ] = None,
    edit: Annotated[
        list[str] | None, typer.Option(metavar="PROMPT", help="A prompt for the clip's CSV; repeatable.")
    ] = None,
    frames: Annotated[str | None, typer.Option(metavar="N", help="Number of frames to use, or all.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Size in pixels, such as 512x512.")] = None,
    start: Annotated[int | None, typer.Option(metavar="N", help="First frame to use.")] = None,
    end: Annotated[int | None, typer.Option(metavar="N", help="Frame to stop before.")] = None,
    stride: Annotated[int | None, typer.Option(metavar="N", help="Use every Nth frame from --start on.")] = None,
    mask: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Where to edit, in white, or boxes."),
    ] = None,
    control: Annotated[
        str | None, typer.Option(metavar="KIND", help="Keep edges: canny, lineart; or depth=MODEL, ...")
    ] = None,
    control_model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Control network. Default: the base model's own.")
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Add a clip: its video and prompts in data/, and its entry in params.yaml.

    VIDEO is a video, an animated GIF or a folder of numbered images. It is copied unless it is in the project already.
    """
    root = _project_root()
    from tav_cli.add import add_clip

    chosen = {"frames": frames, "start": start, "end": end, "stride": stride}
    add_clip(root, video, caption, name, edit or [], size, chosen, json, mask, control, control_model)


@_command("Bring clips up to date, from decoding to scores.", "tav run ball --set edit.guidance_scale=5")
def run(
    clips: Clips = None,
    overrides: ClipOverrides = None,
    common_overrides: CommonOverrides = None,
    paper: Annotated[
        bool,
        typer.Option("--paper", help="Tune, invert and edit these clips as in the paper, but for what --set says."),
    ] = False,
    prompts: Annotated[
        str | None, typer.Option(metavar="CSV", help="Use another prompt CSV of the project for these clips.")
    ] = None,
    json: Json = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print only errors: no progress, no scores.", callback=_set_quiet)
    ] = False,
) -> None:
    """Bring clips up to date (default: all): decode, encode, annotate, tune, invert, edit, score.

    --set, --set-all, --paper and --prompts are written to params.yaml. Without a CLIP, --set and --paper change all clips.
    A run that was stopped resumes where it was. Exit code 1: some clips or prompts failed.
    """
    root = _project_root()
    from tav_cli.run import run as run_pipeline

    raise typer.Exit(run_pipeline(root, clips or [], overrides or [], common_overrides or [], prompts, json, paper))


@_command(
    "Render prompts right away, from a tuned clip.",
    'tav edit ball "a purple ball is bouncing on the sand" --guidance-scale 4',
)
def edit(
    clip: Annotated[str, typer.Argument(metavar="CLIP", hidden=True, autocompletion=_complete_clip)],
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", hidden=True)],
    # Numbers as they are typed, so that a mistake is quoted; they are checked as the cells of a CSV are.
    guidance_scale: Annotated[str | None, typer.Option(metavar="X", help="Strength of the prompt, 1 to 100.")] = None,
    steps: Annotated[str | None, typer.Option(metavar="N", help="Number of sampling steps, 1 to 1000.")] = None,
    seed: Annotated[str | None, typer.Option(metavar="N", help="Seed of the random noise.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="What to steer away from.")] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="What to keep of the clip, such as attribute.")
    ] = None,
    mask: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Where to edit: a file or folder of the project, or: difference, words, none."
        ),
    ] = None,
    control_scale: Annotated[
        str | None, typer.Option(metavar="X", help="Strength of the control networks, 0 to 2.")
    ] = None,
    add_to_csv: Annotated[bool, typer.Option("--add", help="Also add the prompts to the clip's CSV.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Render prompts right away, from a clip that is tuned and inverted. Each is written to results/CLIP/quick/NAME.mp4.

    Settings that are not given are those of params.yaml. A prompt that was rendered before is not rendered again.
    """
    root = _project_root()
    from tav_cli.edit import edit_clip

    settings = {
        "guidance_scale": guidance_scale,
        "steps": steps,
        "seed": seed,
        "negative_prompt": negative_prompt,
        "preset": preset,
        "mask": mask,
        "control_scale": control_scale,
    }
    raise typer.Exit(edit_clip(root, clip, prompts, settings, add_to_csv, json))


@_command(
    "Make a base model from LoRAs, embeddings or a checkpoint.",
    "tav base ghibli --from stable-diffusion-v1-5 --lora ~/ghibli.safetensors:0.8",
)
def base(
    name: Annotated[str, typer.Argument(metavar="NAME", hidden=True)],
    base_model: Annotated[str, typer.Option("--from", metavar="BASE", help="Base model to start from.")],
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:SCALE]", help="LoRA to fuse in; repeatable."),
    ] = None,
    textual_inversion: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE[:TOKEN]", help="Word to add; repeatable."),
    ] = None,
    single_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Checkpoint with other weights for BASE."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a base model of this name.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make the base model models/NAME, a folder in diffusers' layout, from BASE and .safetensors files from the web.

    Default SCALE: 1. Default TOKEN: the file's. Use it as any other: --set base_model=models/NAME.
    """
    root = _project_root()
    from tav_cli.base import make_base_model

    make_base_model(root, name, base_model, lora or [], textual_inversion or [], single_file, force, json)


@_command("Show what is up to date, what is not, and why.", "tav status ball")
def status(clips: Clips = None, json: Json = False) -> None:
    """Show the state of clips (default: all): which stages are up to date, which are not and why, and which prompts
    are still to render. Exit code 2: a prompt CSV is invalid.
    """  # noqa: D205 (one paragraph of the help)
    root = _project_root()
    from tav_cli.status import status as show_status

    raise typer.Exit(show_status(root, clips or [], json))


@_command("Write the HTML report of clips.", "tav report ball --open")
def report(
    clips: Clips = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the HTML report of clips (default: all that have results): videos, scores and curves on one page."""
    root = _project_root()
    from tav_cli.report import report as write_reports

    write_reports(root, clips or [], open_browser, json)


@_command("Compare the MLflow runs of each clip, best first.", "tav compare ball --by frame_consistency")
def compare(
    clips: Clips = None,
    clip: Annotated[list[str] | None, typer.Option(metavar="NAME", hidden=True, autocompletion=_complete_clip)] = None,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC",
            help="Score to order by. Default: textual_alignment, if there is one. Ties: the better "
            "textual_alignment, then frame_consistency, then the newer run.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON list instead of tables.")] = False,
    include_unscored: Annotated[bool, typer.Option("--all", help="Also show runs without scores.")] = False,
) -> None:
    """Compare the MLflow runs of clips (default: all), best first: the parameters that differ between them, and their
    mean scores, as far as the terminal has room.
    """  # noqa: D205 (one paragraph of the help)
    root = _project_root()
    from tav_cli.compare import show_comparisons

    # `--clip NAME` is how earlier versions named clips.
    show_comparisons(root, [*(clips or []), *(clip or [])], by, include_unscored, json)


@_command("Run the LOVEU-TGVE-2023 benchmark.", "tav benchmark ~/loveu-tgve-2023 --set edit.guidance_scale=7.5")
def benchmark(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", hidden=True)],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for results and the submission.")] = Path(
        "results/benchmarks/tgve"
    ),
    overrides: Overrides = None,
    only: Annotated[list[str] | None, typer.Option(metavar="SET/CLIP", help="Run this clip only; repeatable.")] = None,
    quiet: Quiet = False,
) -> None:
    """Run the LOVEU-TGVE-2023 benchmark: four edits of each clip, scored by category, with a folder to submit.

    FOLDER is the unpacked data set, with its CSV at the top. A run that was stopped resumes where it was. Exit code 1:
    some clips failed.
    """
    root = _project_root()
    from tav_cli.benchmark import benchmark as run_benchmark

    raise typer.Exit(run_benchmark(root, folder, out, overrides or [], only or []))


@_command(
    "Start Prefect and the MLflow UI in the background.", "tav up && prefect deployment run tav/edit-batch --watch"
)
def up() -> None:
    """Start Prefect, its worker and the MLflow UI in the background."""
    root = _project_root()
    from tav_cli.services import up as start_services

    start_services(root)


@_command("Stop the services started by `tav up`.", "tav down")
def down() -> None:
    """Stop the services started by `tav up`."""
    root = _project_root()
    from tav_cli.services import down as stop_services

    stop_services(root)


@_command("Check this machine and this project.", "tav doctor")
def doctor(json: Json = False, quiet: Quiet = False) -> None:
    """Check this machine and this project: what works, what does not, and what to do about it.

    Exit code 1: there is a problem.
    """
    root = _project_root()
    from tav_cli.doctor import doctor as run_checks

    raise typer.Exit(run_checks(root, json))


def main() -> None:
    """Run the command line `tav`."""
    app(prog_name="tav")


if __name__ == "__main__":
    main()
