"""What the command lines of the benchmarks on scenes have in common."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.measures import ROOT
from benchmarks.scenes import FOLDERS, SceneRuns, load_scenes
from tav.runtime.waiting import set_waiting
from tav_model.errors import TavError

SEEDS, QUICK_SCENES = 3, 3


def add_scene_options(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the options that all benchmarks of the method share: scenes, seeds, quick, out, set and fresh."""
    parser.add_argument(
        "--scenes",
        type=Path,
        metavar="FOLDER",
        help="folder of scene files, NAME.json (default: data/scenes and benchmarks/scenes)",
    )
    parser.add_argument("--seeds", type=int, metavar="N", help=f"number of seeds (default: {SEEDS}; with --quick: 1)")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SCENES} scenes, 1 seed, fewer pictures")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "results" / "benchmarks" / out,
        metavar="DIR",
        help="folder for results (default: %(default)s)",
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=JSON", help="change parameters of the method")
    parser.add_argument("--fresh", action="store_true", help="discard earlier results and start over")


def scene_runs(options: argparse.Namespace, prepare: Callable[[Path], None] | None = None) -> SceneRuns:
    """Return the runs that the options of `add_scene_options` describe.

    Args:
        options: the options.
        prepare: as for `SceneRuns`.

    Raises:
        TavError: options that are not allowed, or no valid scene file.
    """
    if options.seeds is not None and options.seeds < 1:
        raise TavError(f"--seeds {options.seeds}: must be at least 1")
    changes = {}
    for text in options.set:
        key, separator, value = text.partition("=")
        try:
            changes[key] = json.loads(value)
        except json.JSONDecodeError:
            raise TavError(f"--set {text}: must be KEY=JSON, such as tune.steps=100") from None
        if not separator or not key:
            raise TavError(f"--set {text}: must be KEY=JSON, such as tune.steps=100")
    if options.fresh:
        shutil.rmtree(options.out, ignore_errors=True)
    folders = [options.scenes] if options.scenes else FOLDERS
    scenes = load_scenes(folders, QUICK_SCENES if options.quick else None)
    seeds = options.seeds or (1 if options.quick else SEEDS)
    return SceneRuns(options.out / "runs", scenes, seeds, changes, prepare)


def exit_code(benchmark: Callable[[], bool]) -> int:
    """Run a benchmark and return its exit code: 0 if it reaches its targets, 1 if not, 2 after an error of the user's.

    Args:
        benchmark: returns whether all targets are reached.
    """
    set_waiting()
    os.environ.setdefault("TAV_QUIET", "1")
    try:
        return 0 if benchmark() else 1
    except TavError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
