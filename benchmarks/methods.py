"""Compare presets, inversions and samplers on scenes whose correct edits are known.

python -m benchmarks.methods                    all variants, on all scenes
python -m benchmarks.methods --quick            three scenes, one seed
python -m benchmarks.methods --scenes FOLDER    scenes of a folder

Prints a table of scores with 95 % intervals, seconds for an edit and the memory of the process, the paired differences from
Tune-A-Video, and writes a picture of one edit. Exits with code 1 if the recommended settings miss a target.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measures import Measure, markdown, table, write_measures
from benchmarks.scenes import EditResult, SceneRuns, by_scene, edits_only
from benchmarks.statistics import mean_interval, paired_difference
from benchmarks.toyworld import Score, add_scene_options, scene_runs
from tav_model.errors import TavError
from tav_model.files import read_json, write_json

BASELINE = "tune-a-video"
FIXED_POINT = {"invert.method": "fixed-point"}
LAYOUT = {"edit.layout_strength": 1.2}
WORDS = {"edit.cross_replace": 0.8}
RECOMMENDED = "fixed point, layout, words"
# Changes of params.yaml by variant.
VARIANTS: dict[str, Mapping[str, Any]] = {
    BASELINE: {},
    "50 steps": {"invert.steps": 50, "edit.steps": 50},
    "fixed point": FIXED_POINT,
    "regularised": {"invert.regularization": 0.1},
    "layout": LAYOUT,
    "fixed point, layout": {**FIXED_POINT, **LAYOUT},
    "words": WORDS,
    RECOMMENDED: {**FIXED_POINT, **LAYOUT, **WORDS},
    "by category": {"edit.preset": "category"},
    "fatezero": {"edit.preset": "fatezero"},
    "video-p2p": {"edit.preset": "video-p2p"},
    "plug-and-play": {"edit.preset": "plug-and-play"},
    "dpm-solver++, 10 steps": {"edit.sampler": "dpm-solver++", "edit.steps": 10},
}
SCORES = (
    Score("track_error", "track error", "track error", at_most=True),
    Score("attributes_edited", "edited", "edited"),
    Score("attributes_kept", "kept", "kept"),
    Score("psnr_to_truth", "PSNR, dB", "PSNR, dB", percent=False),
    Score("psnr_kept", "PSNR of what stays, dB", "PSNR of what stays, dB", percent=False),
    Score("ssim_kept", "SSIM of what stays", "SSIM of what stays", percent=False, number_format="{:.3f}"),
    Score("motion_fidelity", "motion fidelity", "motion fidelity", percent=False, number_format="{:.2f}"),
)
LOCAL = ("colour", "object")  # categories of edits that leave most of the picture
MEMORY_FILE = "memory.json"


def measure(runs: SceneRuns, variants: Sequence[str]) -> dict[str, list[EditResult]]:
    """Return the edits of every variant. Each runs in a process of its own, whose largest memory is kept."""
    results = {}
    for variant in variants:
        tuned_in = None if variant == BASELINE else BASELINE
        memory = runs.project(variant).parent / MEMORY_FILE
        if not memory.exists():
            child = os.fork()
            if child == 0:
                _run_and_exit(runs, variant, tuned_in)
            _, status, usage = os.wait4(child, 0)
            if status != 0:
                raise TavError(f"{variant}: failed, see above")
            write_json(memory, usage.ru_maxrss)
        results[variant] = edits_only(runs.run(variant, VARIANTS[variant], tuned_in))
    return results


def _run_and_exit(runs: SceneRuns, variant: str, tuned_in: str | None) -> None:
    status = 1
    try:
        runs.run(variant, VARIANTS[variant], tuned_in)
        status = 0
    except TavError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def scores_table(runs: SceneRuns, results: Mapping[str, list[EditResult]]) -> str:
    """Return the mean scores of every variant with their intervals, seconds for an edit and memory, as Markdown."""
    rows = [["", *(score.heading for score in SCORES), "seconds", "memory, MB"]]
    for variant, edits in results.items():
        rows.append([variant, *(_cell(score, edits) for score in SCORES), *_costs(runs, variant)])
    return markdown(rows)


def differences_table(results: Mapping[str, list[EditResult]]) -> str:
    """Return the paired differences from Tune-A-Video, as Markdown; an asterisk marks intervals that exclude 0."""
    rows = [["", *(score.heading for score in SCORES)]]
    for variant, edits in results.items():
        if variant != BASELINE:
            rows.append([f"{variant}, minus {BASELINE}", *(_difference(s, edits, results[BASELINE]) for s in SCORES)])
    return markdown(rows)


def targets(results: Mapping[str, list[EditResult]]) -> list[Measure]:
    """Return what the recommended settings gain over Tune-A-Video."""
    ours, theirs = results[RECOMMENDED], results[BASELINE]
    local = [[edit for edit in edits if edit.category in LOCAL] for edits in (ours, theirs)]
    gain = paired_difference(*(by_scene(_known("psnr_kept", edits), "psnr_kept") for edits in local))
    errors = [mean_interval(by_scene(edits, "track_error")).mean for edits in (ours, theirs)]
    return [
        Measure("local edits", "gain in PSNR of what stays, dB", gain.mean, 4, percent=False),
        Measure("all edits", "track error, share of Tune-A-Video's", errors[0] / errors[1], 2 / 3, at_most=True),
    ]


def _known(metric: str, edits: Sequence[EditResult]) -> list[EditResult]:
    return [edit for edit in edits if metric in edit.scores]


def _cell(score: Score, edits: Sequence[EditResult]) -> str:
    known = _known(score.key, edits)
    return score.text(mean_interval(by_scene(known, score.key))) if known else ""


def _difference(score: Score, edits: Sequence[EditResult], others: Sequence[EditResult]) -> str:
    pair = [by_scene(_known(score.key, some), score.key) for some in (edits, others)]
    if not pair[0]:
        return ""
    difference = paired_difference(*pair)
    return score.text(difference) + (" *" if difference.excludes_zero else "")


def _costs(runs: SceneRuns, variant: str) -> list[str]:
    """Return the seconds for an edit and the megabytes of the process."""
    from tav.config.paths import Project

    project = Project(runs.project(variant))
    # The stage also renders the reconstruction.
    seconds = [read_json(project.timings(scene.name))["edit"] / (len(scene.truth.edits) + 1) for scene in runs.scenes]
    memory = read_json(runs.project(variant).parent / MEMORY_FILE) / 1024
    return [f"{sum(seconds) / len(seconds):.1f}", f"{memory:.0f}"]


def picture(runs: SceneRuns, variants: Sequence[str], path: Path) -> None:
    """Write a contact sheet of the first edit of the first scene by all variants."""
    from tav.media.contact_sheet import write_contact_sheet
    from tav_model.video import read_video

    scene = runs.scenes[0]
    edit = next(iter(scene.truth.edits))
    results = {variant: runs.project(variant) / "results" / scene.name for variant in variants}
    rows = [("source", read_video(results[BASELINE] / "frames" / "source.mp4")[0])]
    rows += [(variant, read_video(folder / "edits" / f"{edit}.mp4")[0]) for variant, folder in results.items()]
    write_contact_sheet(path, rows)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 if the targets are reached, 1 if not, 2 after invalid arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods",
        description=__doc__.partition("\n")[0],
        epilog="Exits with code 1 if a target is missed.",
    )
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"{'; '.join(VARIANTS)} (default: all)")
    add_scene_options(parser, "methods")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TAV_QUIET", "1")
    try:
        if unknown := sorted(set(options.variants) - set(VARIANTS)):
            raise TavError(f"variant {unknown[0]!r}: must be one of {'; '.join(VARIANTS)}")
        runs = scene_runs(options)
        # The others use the tuning of the first.
        chosen = [name for name in VARIANTS if name == BASELINE or name in (options.variants or VARIANTS)]
        results = measure(runs, chosen)
    except TavError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    measures = targets(results) if RECOMMENDED in results else []
    parts = [table(measures)] if measures else []
    parts += [scores_table(runs, results), differences_table(results)]
    write_measures(options.out / "measures.json", measures)
    picture(runs, chosen, options.out / "methods.png")
    print("\n\n".join([*parts, f"*: the interval excludes 0.\n\npicture: {options.out / 'methods.png'}"]))
    return 0 if all(one.reached for one in measures) else 1


if __name__ == "__main__":
    sys.exit(main())
