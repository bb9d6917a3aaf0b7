"""`tav edit`: render prompts from a tuned clip, and print the path of each video when it is done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tasks.clip_stages import ClipStages
from tasks.quick_edits import QuickEditResult, check_ready, quick_edits
from tav.config import load_params
from tav.config.paths import Project, project_path
from tav.config.prompts import append_rows, make_rows
from tav.media.masks import check_mask
from tav.runtime.events import EventStream
from tav.runtime.exit_status import RESUMABLE, ExitStatus
from tav.runtime.progress_display import standard_error_display
from tav_cli.terminal import ProgressBars, print_error, print_json, print_message, print_notice
from tav_model.errors import TavError


def edit_clip(
    root: Path, clip: str, prompts: Sequence[str], settings: dict[str, Any], add_to_csv: bool, as_json: bool
) -> ExitStatus:
    """Edit a clip that is tuned and inverted.

    Args:
        root: the project's folder.
        clip: the clip's name.
        prompts: what the edits should show.
        settings: `guidance_scale`, `steps`, `seed`, `negative_prompt`, `preset`, `mask` and `control_scale`; None: as in
            params.yaml.
        add_to_csv: also append the prompts that were rendered to the clip's CSV.
        as_json: print one JSON document at the end instead of a line for each video.

    Raises:
        TavError: no such clip, a clip that is not tuned yet, a setting that is not allowed, a mask that is none, or an
            invalid CSV.
    """
    params = load_params(root / "params.yaml").for_clip(clip)
    rows = make_rows(prompts, "tav edit", **settings)
    if settings.get("mask") is None:
        check_mask(root, params.edit.mask, "params.yaml: edit.mask")
    else:
        check_mask(root, settings["mask"], "--mask")
    bars = ProgressBars()
    stages = ClipStages(root, clip, EventStream(*([bars] if bars.enabled else standard_error_display())))
    check_ready(stages)
    if settings.get("control_scale") is not None and not stages.control("edit"):
        raise TavError(f"--control-scale: the clip {clip} has no control; set control in params.yaml, and run it again")
    csv = _writable_csv(stages) if add_to_csv else None
    done: list[QuickEditResult] = []
    try:
        with bars, bars.activity(f"edit {clip}"):
            for edit in quick_edits(stages, rows):
                done.append(edit)
                if edit.video is not None and not as_json:
                    bars.print_line(str(edit.video.relative_to(root)))
    except KeyboardInterrupt:
        print_notice(RESUMABLE)
        return ExitStatus.INTERRUPTED
    if csv is not None:
        rendered = {edit.prompt for edit in done if edit.video is not None}
        added = append_rows(csv, [row for row in rows if row.prompt in rendered])
        names = ", ".join(row.name for row in added)
        print_message(f"{stages.settings.prompts}: {f'added {names}' if added else 'has the prompts already'}")
    remarks = _reported(root, clip, [edit.video for edit in done if edit.video is not None])
    for line in remarks:
        print_message(line)
    if as_json:
        print_json({"clip": clip, "edits": [_as_json(root, edit) for edit in done]})
    failed = [edit for edit in done if edit.video is None]
    for edit in failed:
        print_error(f"{edit.prompt!r}: {edit.error}")
    return ExitStatus.FAILED if failed else ExitStatus.SUCCESS


def _reported(root: Path, clip: str, videos: Sequence[Path]) -> list[str]:
    """Update the clip's report if there is one, and return a line for each video: its scores, or what is wrong."""
    from tav.config.metrics import METRICS
    from tav.config.prompt_words import load_vocabulary
    from tav.config.results import read_record
    from tav.reports.remarks import edit_remarks
    from tav.reports.scores import read_quick_scores

    project = Project(root)
    if project.report(clip).exists():
        from tav.reports.report import refresh_reports

        refresh_reports(root, clip)
    base_model = load_params(root / "params.yaml").for_clip(clip).base_model
    vocabulary = load_vocabulary(root, base_model)
    lines = []
    for video in videos:
        own = read_quick_scores(project.quick(clip), video)
        if own is None:
            continue
        numbers = [
            f"{metric.label} {metric.text(own.scores[metric.key])} (source {metric.text(own.source[metric.key])})"
            for metric in (METRICS["textual_alignment"], METRICS["frame_consistency"])
            if metric.key in own.scores and metric.key in own.source
        ]
        prompt = read_record(video.with_suffix(".json")).get("prompt", "")
        remarks = edit_remarks(prompt, own.scores, own.source, vocabulary, base_model)
        lines.append(f"{'! ' if remarks else ''}{video.stem}: {'; '.join(remarks or [', '.join(numbers)])}")
    return lines


def _writable_csv(stages: ClipStages) -> Path:
    """Return the path of the clip's CSV, after reading it: a mistake in it must show before the rendering.

    Raises:
        TavError: it is invalid, or a link out of the project.
    """
    stages.prompt_rows()
    path = project_path(stages.root, stages.settings.prompts, f"params.yaml: clips.{stages.clip}.prompts")
    if not path.resolve().is_relative_to(stages.root.resolve()):
        raise TavError(
            f"--add: {stages.settings.prompts} is a link out of the project; only files inside it are written"
        )
    return path.resolve()


def _as_json(root: Path, edit: QuickEditResult) -> dict[str, Any]:
    files: dict[str, Any] = {"video": None}
    if edit.video is not None:
        video = edit.video.relative_to(root)
        files = {
            "video": str(video),
            "preview": str(video.with_suffix(".webp")),
            "record": str(video.with_suffix(".json")),
        }
    return {"prompt": edit.prompt, **files, "rendered": edit.rendered, "error": edit.error}
