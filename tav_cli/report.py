"""`tav report`: write the HTML pages of clips from their present results, and print the paths."""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from pathlib import Path

from tav.config import load_params
from tav.config.paths import Project
from tav_cli.terminal import print_json, print_message
from tav_model.errors import TavError


def report(root: Path, clips: Sequence[str], open_browser: bool, as_json: bool) -> None:
    """Write the pages and print their paths, the overview of all clips last.

    Args:
        root: the project's folder.
        clips: names; empty: all that have results.
        open_browser: also open a page: that of the clip where one was named, else the overview.
        as_json: print a JSON document instead of lines.

    Raises:
        TavError: no such clip, or nothing to report.
    """
    params = load_params(root / "params.yaml")
    for clip in clips:
        params.clip(clip)
    project = Project(root)
    chosen = list(dict.fromkeys(clips)) or [
        clip for clip in params.clips if any(part(clip).is_dir() for part in (project.tuned, project.edits))
    ]
    if not chosen:
        raise TavError("no results to report yet; run `tav run` first")
    from tav.reports.report import write_index, write_report

    pages = {}
    for clip in chosen:
        pages[clip] = write_report(root, clip)
        if not as_json:
            print(pages[clip].relative_to(root), flush=True)
    index = write_index(root)
    if as_json:
        paths = {clip: str(page.relative_to(root)) for clip, page in pages.items()}
        print_json({"clips": paths, "index": str(index.relative_to(root))})
    else:
        print(index.relative_to(root))
    if open_browser:
        page = pages[clips[0]] if len(chosen) == 1 and clips else index
        if not webbrowser.open(page.resolve().as_uri()):
            print_message(f"no browser could be started; open {page.relative_to(root)} yourself")
