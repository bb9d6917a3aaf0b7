"""Compare presets, inversions and samplers on scenes whose correct edits are known.

python -m benchmarks.methods                    all variants, on all scenes
python -m benchmarks.methods --quick            three scenes, one seed
python -m benchmarks.methods --scenes FOLDER    scenes of a folder

Prints a table of scores with 95 % intervals, seconds for an edit and the memory of the process, the paired differences from
Tune-A-Video, and how well inversions lead back to the source. Writes a picture of one edit and a plot of the latter. Exits
with code 1 if the recommended settings or the best inversion miss a target.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import reconstruction
from benchmarks.measures import Measure, markdown, table, write_measures
from benchmarks.options import add_scene_options, exit_code, scene_runs
from benchmarks.scenes import EditResult, SceneRuns, by_scene, edits_only
from benchmarks.statistics import mean_interval, paired_difference
from benchmarks.toyworld import PLAIN, Score
from tav_model.errors import TavError
from tav_model.files import read_json, write_json

BASELINE = "tune-a-video"
RECOMMENDED = "defaults"
FIXED_POINT = {"invert.method": "fixed-point"}
LAYOUT = {"edit.layout_strength": 1.2}
DDIM = {"edit.sampler": "ddim", "edit.steps": 20}
# Changes of params.yaml by variant.
VARIANTS: dict[str, Mapping[str, Any]] = {
    BASELINE: PLAIN,
    RECOMMENDED: {},
    "50 steps": {**PLAIN, **DDIM, "invert.steps": 50, "edit.steps": 50},
    "fixed point": {**PLAIN, **FIXED_POINT},
    "regularised": {**PLAIN, "invert.regularization": 0.1},
    "layout": {**PLAIN, **LAYOUT},
    "fixed point, layout": {**PLAIN, **FIXED_POINT, **LAYOUT},
    "preset layout": {"edit.preset": "layout"},
    "fixed point, preset layout": {"edit.preset": "layout", **FIXED_POINT},
    "preset layout, mask of words": {"edit.preset": "layout", "edit.mask": "words"},
    "preset layout, mask of differences": {"edit.preset": "layout", "edit.mask": "difference"},
    "defaults, all steps": {"edit.strength": 1.0},
    "defaults, nothing propagated": {"edit.attention_propagation": 0.0, "edit.feature_propagation": 0.0},
    "fatezero": {"edit.preset": "fatezero"},
    "video-p2p": {"edit.preset": "video-p2p"},
    "plug-and-play": {"edit.preset": "plug-and-play"},
    "defaults, DDIM": DDIM,
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
RECONSTRUCTION = "reconstruction"


def measure(runs: SceneRuns, variants: Mapping[str, Mapping[str, Any]]) -> dict[str, list[EditResult]]:
    """Return the edits of every variant. Each runs in a process of its own, whose largest memory is kept.

    Args:
        runs: runs the stages.
        variants: changes of params.yaml by variant; `BASELINE` is the first, and the others use its tuning.
    """
    results = {}
    for variant, changes in variants.items():
        tuned_in = None if variant == BASELINE else BASELINE
        memory = runs.project(variant).parent / MEMORY_FILE
        if not memory.exists():
            child = os.fork()
            if child == 0:
                _run_and_exit(runs, variant, changes, tuned_in)
            _, status, usage = os.wait4(child, 0)
            if status != 0:
                raise TavError(f"{variant}: failed, see above")
            write_json(memory, usage.ru_maxrss)
        results[variant] = edits_only(runs.run(variant, changes, tuned_in))
    return results


def _run_and_exit(runs: SceneRuns, variant: str, changes: Mapping[str, Any], tuned_in: str | None) -> None:
    status = 1
    try:
        runs.run(variant, changes, tuned_in)
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


def targets(runs: SceneRuns, results: Mapping[str, list[EditResult]]) -> list[Measure]:
    """Return what the recommended settings gain over Tune-A-Video, and what they cost."""
    ours, theirs = results[RECOMMENDED], results[BASELINE]
    local = [[edit for edit in edits if edit.category in LOCAL] for edits in (ours, theirs)]
    gain = paired_difference(*(by_scene(_known("psnr_kept", edits), "psnr_kept") for edits in local))
    errors = [mean_interval(by_scene(edits, "track_error")).mean for edits in (ours, theirs)]
    seconds = [_seconds(runs, variant) for variant in (RECOMMENDED, BASELINE)]
    worse = [
        f"{category}: {score.label}"
        for category in sorted({edit.category for edit in ours})
        for score in SCORES
        if _is_worse(score, *([edit for edit in edits if edit.category == category] for edits in (ours, theirs)))
    ]
    return [
        Measure(
            "local edits",
            "gain in PSNR of what stays, dB",
            gain.mean,
            4,
            percent=False,
            interval=(gain.low, gain.high),
        ),
        Measure("all edits", "track error, share of Tune-A-Video's", errors[0] / errors[1], 2 / 3, at_most=True),
        Measure(
            "all edits", "seconds, times Tune-A-Video's", seconds[0] / seconds[1], 1.5, at_most=True, percent=False
        ),
        Measure(
            "by category",
            f"scores worse beyond the interval{': ' if worse else ''}{', '.join(worse)}",
            len(worse),
            0,
            at_most=True,
            percent=False,
        ),
    ]


def _is_worse(score: Score, edits: Sequence[EditResult], others: Sequence[EditResult]) -> bool:
    pair = [by_scene(_known(score.key, some), score.key) for some in (edits, others)]
    if not pair[0]:
        return False
    difference = paired_difference(*pair)
    return difference.low > 0 if score.at_most else difference.high < 0


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
    memory = read_json(runs.project(variant).parent / MEMORY_FILE) / 1024
    return [f"{_seconds(runs, variant):.1f}", f"{memory:.0f}"]


def _seconds(runs: SceneRuns, variant: str) -> float:
    """Return the mean duration of an edit in the runs of the first seed."""
    from tav.config.paths import Project

    project = Project(runs.project(variant))
    # The stage also renders the reconstruction.
    seconds = [read_json(project.timings(scene.name))["edit"] / (len(scene.truth.edits) + 1) for scene in runs.scenes]
    return sum(seconds) / len(seconds)


def picture(runs: SceneRuns, variants: Sequence[str], path: Path) -> None:
    """Write a contact sheet of the first edit of the first scene by all variants."""
    from tav.config.paths import Project
    from tav.media.contact_sheet import write_contact_sheet
    from tav_model.video import read_video

    scene = runs.scenes[0]
    edit = next(iter(scene.truth.edits))
    projects = {variant: Project(runs.project(variant)) for variant in variants}
    rows = [("source", read_video(projects[BASELINE].frames(scene.name) / "source.mp4")[0])]
    for variant, project in projects.items():
        rows.append((variant, read_video(project.edits(scene.name) / f"{edit}.mp4")[0]))
    write_contact_sheet(path, rows)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 if the targets are reached, 1 if not, 2 after invalid arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.methods",
        description=__doc__.partition("\n")[0],
        epilog="Exits with code 1 if a target is missed.",
    )
    choices = "; ".join([*VARIANTS, RECONSTRUCTION])
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"{choices} (default: all)")
    add_scene_options(parser, "methods")
    options = parser.parse_args(arguments)
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> bool:
    """Run the chosen variants, print their results and return whether all targets are reached."""
    if unknown := sorted(set(options.variants) - {*VARIANTS, RECONSTRUCTION}):
        raise TavError(f"variant {unknown[0]!r}: must be one of {'; '.join([*VARIANTS, RECONSTRUCTION])}")
    runs = scene_runs(options)
    # The others use the tuning of the first.
    chosen = [name for name in VARIANTS if name == BASELINE or name in (options.variants or VARIANTS)]
    results = measure(runs, {name: VARIANTS[name] for name in chosen})
    measures = targets(runs, results) if RECOMMENDED in results else []
    parts = [scores_table(runs, results), differences_table(results), "*: the interval excludes 0."]
    pictures = [options.out / "methods.png"]
    picture(runs, chosen, pictures[0])
    if not options.variants or RECONSTRUCTION in options.variants:
        reconstructions = reconstruction.measure(runs, BASELINE)
        measures += reconstruction.targets(reconstructions)
        parts.append(reconstruction.reconstruction_table(reconstructions))
        pictures.append(options.out / "reconstruction.png")
        reconstruction.plot(reconstructions, pictures[1])
    write_measures(options.out / "measures.json", measures)
    print("\n\n".join([*([table(measures)] if measures else []), *parts]))
    print("\npictures:", *pictures)
    return all(one.reached for one in measures)


if __name__ == "__main__":
    sys.exit(main())
