"""The pages and drawings of the documentation that are made from the code: `python -m docs.generate`.

What the reference says of parameters, commands and deployments comes from the models, the command line and the
deployment files themselves; a test fails where a page is not what this module writes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from docs.drawings import DRAWINGS

DOCS = Path(__file__).parent
ROOT = DOCS.parent
NOTICE = "<!-- Made by `python -m docs.generate`; change the code that it is made from, not this page. -->\n"
RUNTIME_AND_TRACKING = ("runtime", "tracking")
EXAMPLE = "Example: "


def pages() -> dict[Path, str]:
    """Every generated file, by its path, with its text."""
    texts = {
        DOCS / "reference" / "parameters.md": parameters(),
        DOCS / "reference" / "command-line.md": command_line(),
        DOCS / "reference" / "deployments.md": deployments(),
    }
    return texts | {DOCS / "drawings" / f"{name}.svg": draw() for name, draw in DRAWINGS.items()}


def main() -> None:
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(path.relative_to(ROOT))


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)


# params.yaml


def parameters() -> str:
    """The page of params.yaml, key by key."""
    from tav.config import ClipParams, Params, load_params
    from tav.config.schema import is_section

    shipped = load_params(ROOT / "params.yaml").model_dump()
    parts = [
        NOTICE,
        "# Parameters: params.yaml\n",
        "All that decides a result is in `params.yaml`, and is checked before any work starts. An unknown key, a wrong type "
        "or a value out of range is an error of one line that names the key, the value and what is allowed.\n",
        "*Default* is what holds where a key is left out of its section. *Shipped* is what the project's own `params.yaml` "
        "says: settings for the embedded base model. The defaults of `decode`, `tune`, `invert` and `edit` are the settings "
        "of the paper, for Stable Diffusion. The sections themselves must be there, except `runtime` and `tracking`, "
        "because DVC looks for them in the file.\n",
        "A value can be changed in the file, or from a command line, which writes it to the file: "
        "`tav run ball --set edit.guidance_scale=5`, `dvc exp run -S edit.guidance_scale=5`.\n",
        "## Top level\n",
        _keys(
            {name: field for name, field in Params.model_fields.items() if not is_section(field.annotation)},
            Params,
            shipped,
        ),
        *(f"`{name}`: {_again(name)[0].lower()}{_again(name)[1:]}" for name in ("base_model", "seed")),
    ]
    for name, field in Params.model_fields.items():
        if is_section(field.annotation):
            section = field.annotation
            title = re.sub(r"\s+", " ", inspect.getdoc(section) or "")
            parts += [f"## {name}\n", f"{title}\n", _again(name), _keys(section.model_fields, section, shipped[name])]
    parts += [
        "## clips\n",
        "The clips, by name. A name is 1 to 64 of `a-z`, `0-9`, `_` and `-`, and begins with a letter or digit; it is part "
        "of file names and of DVC's stage names, as in `dvc repro score@ball`. `tav add` writes an entry.\n",
        _keys(ClipParams.model_fields, ClipParams, None),
    ]
    return "\n".join(parts)


def _again(section: str) -> str:
    """Which stages run again when a value of the section changes."""
    import yaml

    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    if section in RUNTIME_AND_TRACKING:
        return "A change runs nothing again: DVC does not watch this section.\n"
    names = list(stages)
    watching = [name for name, stage in stages.items() if section in stage["do"].get("params", ())]
    again = [f"`{name}`" for name in names[names.index(watching[0]) :]]  # What a stage writes, later ones stand on.
    return f"A change runs {', '.join(again)} again.\n"


def _keys(fields: Mapping[str, Any], model: Any, shipped: Mapping[str, Any] | None) -> str:
    from tav.config.error_messages import describe_allowed

    schema = model.model_json_schema()["properties"]
    header = ("Key", "Type", "Default", *(("Shipped",) if shipped is not None else ()), "Allowed", "Meaning")

    def row(name: str, field: Any) -> tuple[str, ...]:
        default = "must be given" if field.is_required() else _value(field.default)
        ours = (_value(shipped[name]),) if shipped is not None else ()
        if name in ("clips", "decode"):
            kind, allowed = "mapping", "clips by name" if name == "clips" else "keys of [decode](#decode), or `{}`"
            ours = ("four samples",) if ours else ()
        else:
            kind, allowed = (
                _kind(field.annotation),
                describe_allowed(schema[name]).replace(str(2**63), "2<sup>63</sup>"),
            )
        return f"`{name}`", kind, default, *ours, allowed, field.description or ""

    return _table(header, [row(name, field) for name, field in fields.items()])


def _value(value: Any) -> str:
    """As YAML would have it."""
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    if isinstance(value, float):
        text = f"{value:g}"
        return f"`{re.sub(r'e-0*', 'e-', text)}`"
    return f"`{value}`" if value != "" else '`""`'


def _kind(annotation: Any) -> str:
    """The YAML type of a value."""
    arguments = get_args(annotation)
    if type(None) in arguments:
        return f"{_kind(next(one for one in arguments if one is not type(None)))} or null"
    if get_origin(annotation) is list:
        return "list"
    origin = str(get_origin(annotation))
    if "Literal" in origin:
        return "string"
    if "Annotated" in str(type(annotation)) or hasattr(annotation, "__metadata__"):
        return _kind(arguments[0])
    return {bool: "true or false", int: "whole number", float: "number", str: "string"}[annotation]


# The command line


def command_line() -> str:
    """The page of `tav`, command by command, and of the module that DVC calls."""
    import click
    import typer

    from tav_cli.main import app

    group = typer.main.get_command(app)
    group.name = "tav"
    parts = [
        NOTICE,
        "# Command line\n",
        "`tav` works on the project in the current folder: the one with `params.yaml`. What people read goes to stderr, "
        "results go to stdout; `--json` makes them one JSON document. [Exit codes](exit-codes.md) and "
        "[environment variables](environment.md) have pages of their own.\n",
        _table(
            ("Command", "What it does"),
            [
                (f"[`tav {name}`](#tav-{name})", command.get_short_help_str(200))
                for name, command in group.commands.items()
            ],
        ),
    ]
    top = click.Context(group, info_name="tav", **group.context_settings)
    parts += ["## tav\n", _options(group, top)]
    for name, command in group.commands.items():
        context = click.Context(command, info_name=name, parent=top)
        usage = " ".join(["tav", name, *command.collect_usage_pieces(context)])
        text = "\n\n".join(
            re.sub(r"\s*\n\s*", " ", part) for part in inspect.cleandoc(command.help or "").split("\n\n")
        )
        parts += [f"## tav {name}\n", f"```text\n{usage}\n```\n", f"{_code(text)}\n", _options(command, context)]
        parts += [f"Example: `{(command.epilog or '').removeprefix(EXAMPLE)}`\n"]
    parts += ["## python -m tasks\n", _stages()]
    return "\n".join(parts)


def _options(command: Any, context: Any) -> str:
    rows = []
    for param in command.get_params(context):
        if record := param.get_help_record(context):
            names, text = record
            text = text.replace("[required]", "Must be given.").replace("[default: ", "Default: ").rstrip("]").strip()
            rows.append((f"`{names}`", _code(re.sub(r"\s+", " ", text))))
    return _table(("Option", "Meaning"), rows)


def _code(text: str) -> str:
    """Options and paths in a help text as code."""
    text = re.sub(r"(?<![\w`/-])(--[a-z][\w-]*)", r"`\1`", text)
    return re.sub(r"(?<![\w`/])((?:results/CLIP/|data/|params\.yaml)[\w./*-]*\w)", r"`\1`", text)


def _stages() -> str:
    from tasks.__main__ import HELP

    rows = [(f"`python -m tasks {name} --clip CLIP`", text) for name, text in HELP.items()]
    return (
        "One stage at a time, as `dvc.yaml` calls them. `dvc repro` and `tav run` call what is needed, in order. Without "
        "`--clip`, all clips.\n\n"
    ) + _table(("Command", "What it does"), rows)


# Prefect


def deployments() -> str:
    """The page of Prefect's deployments and of the flow's parameters."""
    import yaml

    from flows.tav import tav

    rows = []
    for name in ("prefect.yaml", "deploy/docker/prefect.yaml", "deploy/kubernetes/prefect.yaml"):
        for one in yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))["deployments"]:
            rows.append((f"`tav/{one['name']}`", f"`{one['work_pool']['name']}`", f"`{name}`", one["description"]))
    documented = inspect.getdoc(tav.fn) or ""
    texts = dict(re.findall(r"^    (\w+): (.*(?:\n        .*)*)", documented, re.MULTILINE))
    parameters = [
        (
            f"`{name}`",
            f"`{parameter.annotation}`",
            f"`{_default(parameter.default)}`",
            _braces(re.sub(r"\s+", " ", texts[name])),
        )
        for name, parameter in inspect.signature(tav.fn).parameters.items()
    ]
    return "\n".join(
        [
            NOTICE,
            "# Prefect deployments\n",
            f"There is one flow, `{tav.name}`: {documented.partition(': ')[2].partition(chr(10))[0]} It runs for each clip. "
            "What is up to date by `dvc.lock` is not run, and what DVC has in its cache is restored.\n",
            "## Deployments\n",
            _table(("Deployment", "Work pool", "Defined in", "What it is"), rows),
            "`tav up` makes the work pool and the deployment of `prefect.yaml`, and starts a worker for them. The others are "
            "described in [Many machines](../how-to/many-machines.md).\n",
            "## Parameters\n",
            "All deployments take the same parameters.\n",
            _table(("Parameter", "Type", "Default", "Meaning"), parameters),
            "On a command line each is JSON, as in "
            "`prefect deployment run tav/edit-batch --watch --param 'clips=[\"ball\"]'` and "
            "`prefect deployment run tav/edit-batch --param 'overrides={\"edit.guidance_scale\": 5}'`.\n",
            "## What a run shows\n",
            "A flow run has a task run for each stage that is not up to date, and for the stage `edit` one for each row "
            "of the prompt CSV that is to be rendered. A task run that fails for lack of memory, or because of the file "
            "system, is tried again twice; a mistake in what was given is not. A row that fails, fails alone, and the flow "
            "run then ends as failed, with the rows' names. Scores, links and the contact sheet are on the page "
            "*Artifacts*.\n",
        ]
    )


def _default(value: Any) -> str:
    return "null" if value is None else str(value)


def _braces(text: str) -> str:
    """An example in braces as code."""
    return re.sub(r"(\{[^}]*\})", r"`\1`", text)


if __name__ == "__main__":
    main()
