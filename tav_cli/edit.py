"""`tav edit`: prompts rendered at once, a line with the video's path for each when it is done."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tasks.clip_stages import ClipStages
from tasks.quick_edits import QuickEditResult, check_ready, quick_edits
from tav.config import load_params
from tav.config.paths import project_path
from tav.config.prompts import append_rows, make_rows
from tav.runtime.progress import display_on
from tav_cli.terminal import Bars, complain, print_json, say
from tav_model.errors import TavError


def edit_clip(
    root: Path, clip: str, prompts: Sequence[str], settings: dict[str, Any], keep: bool, as_json: bool
) -> int:
    """Edit a clip that is tuned and inverted.

    Args:
        settings: `guidance_scale`, `steps`, `seed` and `negative_prompt`; None: as in params.yaml.
        keep: whether the prompts go into the clip's CSV too, once they are rendered.

    Returns:
        The exit code: 0, 1 where a prompt has failed, 130 where the user has stopped it.

    Raises:
        TavError: no such clip, one that is not tuned yet, a setting that is not allowed, or a CSV that is wrong.
    """
    load_params(root / "params.yaml").clip(clip)
    rows = make_rows(prompts, "tav edit", **settings)
    stages = ClipStages(root, clip)
    check_ready(stages)
    table = _table(stages) if keep else None
    done: list[QuickEditResult] = []
    try:
        with ExitStack() as stack:
            bars = stack.enter_context(Bars())
            if bars.are_wanted:
                stack.enter_context(display_on(bars))
            stack.enter_context(bars.working(f"edit {clip}"))
            for edit in quick_edits(stages, rows):
                done.append(edit)
                if edit.video is not None and not as_json:
                    bars.output(str(edit.video.relative_to(root)))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    if table is not None:
        rendered = {edit.prompt for edit in done if edit.video is not None}
        added = append_rows(table, [row for row in rows if row.prompt in rendered])
        names = ", ".join(row.name for row in added)
        say(f"{stages.settings.prompts}: {f'added {names}' if added else 'has the prompts already'}")
    if as_json:
        print_json({"clip": clip, "edits": [_as_json(root, edit) for edit in done]})
    failed = [edit for edit in done if edit.video is None]
    for edit in failed:
        complain(f"{edit.prompt!r}: {edit.error}")
    return 1 if failed else 0


def _table(stages: ClipStages) -> Path:
    """The clip's CSV, which is read now: a mistake in it must not show after the rendering.

    Raises:
        TavError: it cannot be read, or is a link out of the project.
    """
    stages.prompt_rows()
    path = project_path(stages.root, stages.settings.prompts, f"params.yaml: clips.{stages.clip}.prompts")
    if not path.resolve().is_relative_to(stages.root.resolve()):
        raise TavError(f"--add: {stages.settings.prompts} is a link out of the project, which is not written through")
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
