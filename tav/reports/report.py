"""The report of a clip: one HTML page that contains everything, including videos, and opens anywhere without a network.

Where the videos are large, the page links them, and needs the folder that it is in.

It shows what the results contain when it is written, and names the command for each part that is missing.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import logging
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from tav.config import RESULT_SECTIONS, Params, load_params
from tav.config.paths import Project
from tav.config.prompt_words import load_vocabulary
from tav.config.stages import STAGES
from tav.reports.figures import MAX_ROWS, LossChart, attention_grid, loss_chart
from tav.reports.quick_edits import read_quick_edits
from tav.reports.remarks import edit_remarks
from tav.reports.scores import read_clip_scores, read_heat_maps, with_quick_scores
from tav.reports.videos import (
    csv_names,
    edit_paths,
    embed_video,
    mosaic,
    ordered_edit_paths,
    page_of_links,
    read_conditions,
    read_edits,
)
from tav.runtime.logs import stage_log
from tav.tracking.provenance import environment_tags
from tav_model.digests import digest
from tav_model.errors import TavError
from tav_model.files import read_json, write_text

if TYPE_CHECKING:
    from jinja2 import Environment

logger = logging.getLogger(__name__)

PAGES = Path(__file__).parent / "page"
# The page's content security policy allows these by their hashes, and nothing else.
ASSETS = {"style": "style.css", "theme": "theme.js", "script": "report.js"}
# The files of a clip's results that decide what its page shows.
SHOWN = (
    "frames/source.mp4",
    "control/*.json",
    "tuned/tuned.json",
    "tuned/loss.csv",
    "edits/*.json",
    "scores/*",
    "quick/*.json",
    "quick/scores/*.json",
)
HEAD_LENGTH = 1000  # characters at the beginning of a page, among which is the digest of what it shows
# In pixels. A browser shows the one that fits, because the text of a scaled-down drawing would be unreadable.
CHART_WIDTHS = {"wide": 760, "narrow": 330}


def refresh_reports(root: Path, clip: str) -> None:
    """Write a clip's page and the overview where they are missing or show other results than the present ones.

    That happens where DVC restores results: the score stage, which writes the pages, does not run then.
    """
    if not _are_current(root, clip):
        update_reports(root, clip)


def _are_current(root: Path, clip: str) -> bool:
    project = Project(root)
    if not project.reports().exists():
        return False
    try:
        with project.report(clip).open(encoding="utf-8") as page:
            return _digest_of_results(root, clip) in page.read(HEAD_LENGTH)
    except (OSError, UnicodeDecodeError, TavError):
        return False


def _digest_of_results(root: Path, clip: str) -> str:
    """Return a digest of the results and the parameters that a clip's page shows.

    Videos count by their records, which have their digests.
    """
    params = load_params(root / "params.yaml").for_clip(clip)
    results = Project(root).results(clip)
    parts: list[str | Path] = [repr(_parameters(params, clip)), repr(csv_names(root, params, clip))]
    for pattern in SHOWN:
        for path in sorted(results.glob(pattern)):
            parts += [path.relative_to(results).as_posix(), path]
    return digest(*parts)


def update_reports(root: Path, clip: str) -> None:
    """Write a clip's page and the overview after its score stage.

    A failure is logged to the stage's log instead of being raised: the results do not depend on the pages.
    """
    with stage_log(Project(root).log(clip, "score")):
        try:
            write_report(root, clip)
            write_index(root)
        except Exception as error:
            logger.warning("no report of %s: %s", clip, error, exc_info=not isinstance(error, TavError))


def write_report(root: Path, clip: str) -> Path:
    """Write `results/CLIP/report.html` from the current results, and return its path.

    Raises:
        TavError: There is no such clip, it has no results yet, or a file of its results is damaged.
    """
    from tav_model.tuned_weights import INFO_FILE, read_info

    params = load_params(root / "params.yaml").for_clip(clip)
    caption = params.clip(clip).caption
    project = Project(root)
    parts = (project.frames(clip), project.tuned(clip), project.edits(clip), project.scores(clip))
    if not any(part.is_dir() and any(part.iterdir()) for part in parts):
        raise TavError(f"results/{clip}: nothing to report yet; run tav run {clip}")
    results_digest = _digest_of_results(root, clip)  # First: what changes meanwhile may not be on the page.

    source_path = project.frames(clip) / "source.mp4"
    folders = (project.edits(clip), project.quick(clip), project.control(clip))
    videos = [source_path, *(path for folder in folders for path in edit_paths(folder))]
    linking = page_of_links(videos, project.report(clip))
    source = embed_video(source_path, linking)
    edits = read_edits(root, clip, params, source.fps if source else None, linking)
    scores = read_clip_scores(project.scores(clip))
    scored = [edit.name for edit in edits if scores and scores.of(edit.name, edit.prompt)]
    quick = read_quick_edits(project.quick(clip), caption, {edit.identity for edit in edits}, linking)
    rows, edits = len(edits), edits + quick.edits
    scores = with_quick_scores(scores, quick.scores)
    similarities = {name: one.similarities for (name, _), one in quick.scores.items() if one.similarities}
    first = source or (edits[0].video if edits else None)
    planned = params.decode.frames if params.decode.frames != "all" else MAX_ROWS
    frames = first.frames if first else planned
    tuned = read_info(project.tuned(clip)) if (project.tuned(clip) / INFO_FILE).exists() else {}
    attention = tuned.get("attention", params.attention.model_dump())
    base_model = tuned.get("base_model", params.base_model)
    vocabulary = load_vocabulary(root, base_model)
    page = _environment().get_template("report.html")
    text = page.render(
        results_digest=results_digest,
        clip=clip,
        caption=caption,
        source=source,
        conditions=read_conditions(project.control(clip), source, linking),
        edits=edits,
        rows=rows,
        quick=quick,
        remarks={
            edit.name: edit_remarks(
                edit.prompt,
                scores.of(edit.name, edit.prompt) if scores else {},
                scores.source if scores else {},
                vocabulary,
                base_model,
            )
            for edit in edits
        },
        first=first,
        frames=frames,
        linked=linking is not None,
        scores=scores,
        heat=read_heat_maps(project.scores(clip), scored, similarities, frames),
        base_model=base_model,
        charts=_loss_charts(project.tuned(clip) / "loss.csv"),
        tuned=tuned,
        attention=attention,
        grid=attention_grid(attention["spatial"], frames),
        timings=_timings(project.timings(clip)),
        parameters=_parameters(params, clip),
        differences=_differences(tuned, params),
        **_common(root),
    )
    write_text(project.report(clip), text)
    return project.report(clip)


def write_index(root: Path) -> Path:
    """Write `results/index.html`, with a card for each clip that has a report, and return its path.

    Raises:
        TavError: No clip has a report, or a file of its results is damaged.
    """
    params = load_params(root / "params.yaml")
    project = Project(root)
    cards = []
    for path in sorted(project.reports().parent.glob("*/report.html")):
        clip = path.parent.name
        known = params.clips.get(clip)  # It may have been removed from params.yaml since.
        videos = ordered_edit_paths(root, clip, params)
        cards.append(
            {
                "clip": clip,
                "caption": known.caption if known else "",
                "edits": len(videos),
                "scores": read_clip_scores(project.scores(clip)),
                "image": mosaic(project.frames(clip) / "source.mp4", videos),
            }
        )
    if not cards:
        raise TavError(f"{project.reports().parent}: no report of any clip yet")
    page = _environment().get_template("index.html")
    write_text(project.reports(), page.render(cards=cards, **_common(root)))
    return project.reports()


def _environment() -> Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "yaml": _yaml_value}
    return environment


def _common(root: Path) -> dict[str, Any]:
    """Return what every page has: styles, scripts and their hashes, the time, and the git revision."""
    from markupsafe import Markup

    texts = {name: (PAGES / file).read_text(encoding="utf-8") for name, file in ASSETS.items()}
    digests = {name: hashlib.sha256(text.encode()).digest() for name, text in texts.items()}
    tags = environment_tags(root)
    return {
        # Styles and scripts must not be escaped; they come from this package.
        "assets": {name: Markup(text) for name, text in texts.items()},  # noqa: S704
        "hashes": {name: f"sha256-{base64.b64encode(digest).decode()}" for name, digest in digests.items()},
        "written": datetime.now().astimezone(),
        "revision": tags.get("mlflow.source.git.commit"),
        "dirty": tags.get("tav.git.dirty") == "True",
        "version": tags.get("tav.version"),
    }


def _loss_charts(path: Path) -> dict[str, LossChart]:
    """Return the loss curve in each width; empty before the tuning, or if it had no steps."""
    if not path.exists():
        return {}
    names = ("step", "loss", "learning_rate", "timestep")
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            steps = [{name: float(row[name]) for name in names} for row in csv.DictReader(stream)]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise TavError(f"{path}: not a loss curve ({type(error).__name__}: {error})") from None
    return {name: loss_chart(steps, width) for name, width in CHART_WIDTHS.items()} if steps else {}


def _timings(path: Path) -> list[tuple[str, float, float]]:
    """Return each stage that has run here, its duration and that of the stages before it, in seconds."""
    if not path.exists():
        return []
    record = read_json(path)
    stages, before = [], 0.0
    for stage in STAGES:
        if stage in record:
            stages.append((stage, float(record[stage]), before))
            before += float(record[stage])
    return stages


def _parameters(params: Params, clip: str) -> dict[str, list[tuple[str, Any, str]]]:
    """Return the parameters that determine the result, by section: key, value and description of each."""
    own = params.clip(clip)
    single = [(own, name) for name in ("video", "caption", "prompts")] + [
        (params, name) for name in ("base_model", "seed", *(["control"] if params.control else []))
    ]
    sections = {"clip": [(name, holder.model_dump()[name], _description(holder, name)) for holder, name in single]}
    for name in RESULT_SECTIONS:
        section = getattr(params, name)
        if isinstance(section, BaseModel):
            values = section.model_dump()
            sections[name] = [(key, value, _description(section, key)) for key, value in values.items()]
    return sections


def _description(section: BaseModel, key: str) -> str:
    return type(section).model_fields[key].description or ""


def _differences(tuned: dict[str, Any], params: Params) -> list[tuple[str, Any, Any]]:
    """Return the parameters that have changed since the tuning: key, the tuning's value, the current value."""
    now = {
        "base_model": params.base_model,
        "seed": params.seed,
        "steps": params.tune.steps,
        "attention": params.attention.model_dump(),
        "trainable_modules": params.tune.trainable,
    }
    keys = {"steps": "tune.steps", "trainable_modules": "tune.trainable"}
    return [
        (keys.get(name, name), tuned[name], value)
        for name, value in now.items()
        if name in tuned and tuned[name] != value
    ]


def duration(seconds: float) -> str:
    """Write a duration as `4.2 s`, `3 min 7 s` or `2 h 5 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _yaml_value(value: Any) -> str:
    """Write a parameter's value as in params.yaml."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(map(_yaml_value, value))
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_yaml_value(inner)}" for name, inner in value.items())
    if value == "":
        return '""'
    return f"{value:g}" if isinstance(value, float) else str(value)
