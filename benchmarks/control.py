"""Measure control networks on scenes whose correct edits are known: edges and depth, with and without inversion.

python -m benchmarks.control                    all parts, on all scenes
python -m benchmarks.control noise driven       some parts
python -m benchmarks.control --quick            three scenes, one seed
python -m benchmarks.control --scenes FOLDER    scenes of a folder
python -m benchmarks.control --networks FOLDER  other networks, in its folders edges and depth

The parts: `noise`, plain edits from random noise; `inversion`, edits from the inverted latents, plain and with presets;
`scale`, a curve of scales from 0 to 1.5; `driven`, each clip's object on the path of the next clip's; `cost`, time and memory.
Exits with code 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measures import ROOT, Measure, markdown, table, write_measures
from benchmarks.methods import BASELINE, SCORES, differences_table, measure, scores_table
from benchmarks.options import add_scene_options, exit_code, scene_runs
from benchmarks.scenes import EditResult, SceneRuns, by_scene
from benchmarks.statistics import mean_interval, paired_difference
from benchmarks.toyworld import PLAIN
from tav.config.presets import BY_CATEGORY
from tav_model.errors import TavError
from toyworld.scenes import Scene

NETWORKS = ("edges", "depth")
KINDS = {"edges": "canny", "depth": "depth"}
FOLDER = "controlnet"  # of the networks in the projects of the runs
SCALES = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
RANDOM = {"edit.start": "random"}
PARTS = ("noise", "inversion", "scale", "driven", "cost")
# What a clip's object takes over from the one that drives it.
PATH = ("motion", "radius", "start", "end")
REPETITIONS = 3
# A process that renders one edit: its arguments are the project's folder and the clip.
RENDER = """
import sys
from pathlib import Path
from benchmarks.control import edit_renderer
edit_renderer(Path(sys.argv[1]), sys.argv[2])()
"""


def control(network: str, **settings: Any) -> dict[str, Any]:
    """Return the change of params.yaml that turns on a network, in the edits alone unless `stages` names others."""
    return {"control": [{"kind": KINDS[network], "model": f"{FOLDER}/{network}", "stages": ["edit"], **settings}]}


BOTH: dict[str, Any] = {"stages": ["invert", "edit"]}
# Each edit with the preset of its category, in place of plain edits.
PRESETS: dict[str, Any] = {"edit.preset": BY_CATEGORY}
NOISE = {
    "random": RANDOM,
    "random, edges": RANDOM | control("edges"),
    "random, depth": RANDOM | control("depth"),
}
INVERSION = {
    "edges": control("edges", **BOTH),
    "depth": control("depth", **BOTH),
    "edges, half of the steps": control("edges", end=0.5, **BOTH),
    "depth, half of the steps": control("depth", end=0.5, **BOTH),
    "presets": PRESETS,
    "presets, edges": PRESETS | control("edges", **BOTH),
    "presets, depth": PRESETS | control("depth", **BOTH),
}
# What each variant with control is compared with.
UNCONTROLLED = {
    variant: "presets" if variant.startswith("presets") else BASELINE for variant in INVERSION if variant != "presets"
}
CURVE = {f"random, depth, scale {scale:g}": RANDOM | control("depth", scale=scale) for scale in SCALES if scale != 1}
DRIVEN = "driven by the next clip"


def variants_of(parts: Sequence[str], scenes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the changes of params.yaml by variant for some parts, the plain method first.

    Args:
        parts: of `PARTS`.
        scenes: their names.
    """
    variants: dict[str, dict[str, Any]] = {BASELINE: {}}
    if {"noise", "scale"}.intersection(parts):
        variants |= NOISE
    if "inversion" in parts:
        variants |= INVERSION
    elif "cost" in parts:
        variants["depth"] = INVERSION["depth"]
    if "scale" in parts:
        variants |= CURVE
    if "driven" in parts:
        following = zip(scenes, [*scenes[1:], *scenes[:1]], strict=True)
        own = {f"clips.{one}.control": control("depth", source=other)["control"] for one, other in following}
        variants[DRIVEN] = RANDOM | own
    return {variant: PLAIN | changes for variant, changes in variants.items()}


# Parts


def noise_measures(results: Mapping[str, Sequence[EditResult]]) -> Iterator[Measure]:
    """Yield the track errors of edits from random noise."""
    for variant in NOISE:
        target = 0.03 if variant == "random, depth" else None
        value = mean_interval(by_scene(results[variant], "track_error"))
        yield Measure(variant, "track error", value.mean, target, True, interval=(value.low, value.high))


def swap_measures(
    results: Mapping[str, Sequence[EditResult]], silhouettes: Mapping[str, Sequence[EditResult]]
) -> Iterator[Measure]:
    """Yield what control gains where an object is exchanged, over the same without it, in pairs of the same edits."""
    for variant, uncontrolled in UNCONTROLLED.items():
        for some, metric, name in (
            (results, "attributes_edited", "gain in edited attributes"),
            (silhouettes, "silhouette", "gain in silhouette"),
        ):
            gain = paired_difference(
                *(
                    by_scene([one for one in some[key] if one.category == "object"], metric)
                    for key in (variant, uncontrolled)
                )
            )
            part = f"object swaps, {variant}"
            yield Measure(part, name, gain.mean, percent=False, interval=(gain.low, gain.high))
            if variant in ("depth", "presets, depth"):
                yield Measure(part, f"{name}, lower end of the interval", gain.low, 0.0, percent=False)


def driven_measures(results: Sequence[EditResult]) -> Iterator[Measure]:
    """Yield the track error of clips that are driven by others, against the rendered truth."""
    value = mean_interval(by_scene(results, "track_error"))
    yield Measure(DRIVEN, "track error", value.mean, 0.04, True, interval=(value.low, value.high))


def curve_table(results: Mapping[str, Sequence[EditResult]]) -> str:
    """Return scores by scale, from no control to 1.5, as Markdown."""
    curve = {0.0: "random", **{scale: f"random, depth, scale {scale:g}" for scale in SCALES}, 1.0: "random, depth"}
    rows = [["scale", *(score.heading for score in SCORES)]]
    for scale in sorted(curve):
        edits = results[curve[scale]]
        known = [[edit for edit in edits if score.key in edit.scores] for score in SCORES]
        cells = [
            score.text(mean_interval(by_scene(some, score.key))) if some else ""
            for score, some in zip(SCORES, known, strict=True)
        ]
        rows.append([f"{scale:g}", *cells])
    return markdown(rows)


def silhouette_results(runs: SceneRuns, variant: str) -> list[EditResult]:
    """Return how well the outlines of exchanged objects are drawn, as the score `silhouette`."""
    from toyworld.silhouette import silhouette

    def judge(frames: np.ndarray, source: Scene, edited: Scene, times: Sequence[float]) -> dict[str, float]:
        return {"silhouette": float(np.mean([silhouette(frame, edited) for frame in frames]))}

    return _judged(runs, variant, judge, category="object")


def driven_results(runs: SceneRuns) -> list[EditResult]:
    """Return the scores of driven clips against their truth: the edited object on the path of the next clip's."""
    from tav_model.metrics.clip import ClipScorer
    from toyworld import WEIGHTS
    from toyworld.judge import Judge

    scenes = [scene.truth.scene for scene in runs.scenes]
    drivers = dict(zip(scenes, [*scenes[1:], *scenes[:1]], strict=True))
    judge = Judge(ClipScorer(WEIGHTS / "scorer"))

    def verdict(frames: np.ndarray, source: Scene, edited: Scene, times: Sequence[float]) -> dict[str, float]:
        moved = replace(edited, **{name: getattr(drivers[source], name) for name in PATH})
        return asdict(judge.verdict(frames, source, moved, times))

    return _judged(runs, DRIVEN, verdict)


def _judged(
    runs: SceneRuns,
    variant: str,
    judge: Callable[[np.ndarray, Scene, Scene, Sequence[float]], dict[str, float]],
    category: str | None = None,
) -> list[EditResult]:
    """Return the scores that `judge` gives to the videos of a variant, of one category or all."""
    from tav.config import load_params
    from tav.media.scene_truth import load_clip_truth
    from tav_model.video import read_video

    results = []
    for number in range(runs.seeds):
        project = runs.project(variant, number)
        params = load_params(project / "params.yaml")
        for scene in runs.scenes:
            times = scene.truth.times(load_clip_truth(project, scene.name, params)[1])
            for edit, edited in scene.truth.edits.items():
                kind = scene.truth.category(edit)
                if category in (None, kind):
                    frames, _ = read_video(project / "results" / scene.name / "edits" / f"{edit}.mp4")
                    scores = judge(frames, scene.truth.scene, edited, times)
                    results.append(EditResult(scene.name, edit, kind, params.seed, scores))
    return results


def cost_measures(runs: SceneRuns) -> Iterator[Measure]:
    """Yield the time and the memory of a controlled edit, as multiples of those of a plain one."""
    clip, projects = runs.scenes[0].name, [runs.project(variant) for variant in (BASELINE, "depth")]
    plain, controlled = edit_seconds(projects, clip)
    yield Measure("cost", "time of an edit, of the plain edit's", controlled / plain, 1.5, True, percent=False)
    plain, controlled = (edit_memory(project, clip) for project in projects)
    yield Measure("cost", "memory of an edit, of the plain edit's", controlled / plain, 1.3, True, percent=False)


def edit_seconds(projects: Sequence[Path], clip: str) -> list[float]:
    """Return the seconds for an edit of a clip in each project, without loading: the fastest of some, in turns."""
    renderers = [edit_renderer(project, clip) for project in projects]
    fastest = [float("inf")] * len(projects)
    for _ in range(REPETITIONS):
        for place, render in enumerate(renderers):
            start = time.perf_counter()
            render()
            fastest[place] = min(fastest[place], time.perf_counter() - start)
    return fastest


def edit_memory(project: Path, clip: str) -> float:
    """Return the largest memory, in KiB, of a process that renders an edit of a clip."""
    child = subprocess.Popen([sys.executable, "-c", RENDER, str(project.resolve()), clip], cwd=ROOT)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise TavError(f"{project}: an edit of {clip} failed, see above")
    return float(usage.ru_maxrss)


def edit_renderer(project: Path, clip: str) -> Callable[[], Any]:
    """Return a function that renders the first edit of a clip, with the model loaded."""
    from tasks.clip_stages import ClipStages

    batch = ClipStages(project, clip).edit_batch("cpu")
    batch.pipeline  # noqa: B018 (loaded here, outside of what is measured)
    return partial(batch.render, batch.rows[:1], lambda rows, steps: None)


# The command


def find_networks(folder: Path) -> None:
    """Check that a folder has the networks.

    Raises:
        TavError: one is missing.
    """
    missing = [name for name in NETWORKS if not (folder / name / "config.json").is_file()]
    if missing:
        raise TavError(
            f"{folder}: no control network {missing[0]!r}; train it (python -m toyworld.train control), or name a folder "
            "with edges and depth: --networks"
        )


def _copy_networks(networks: Path, project: Path) -> None:
    for name in NETWORKS:
        shutil.copytree(networks / name, project / FOLDER / name, dirs_exist_ok=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 if the targets are reached, 1 if not, 2 after invalid arguments or without networks."""
    from toyworld import WEIGHTS

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.control",
        description=__doc__.partition("\n")[0],
        epilog="Exits with code 1 if a target is missed.",
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument(
        "--networks",
        type=Path,
        default=WEIGHTS / "controlnet",
        metavar="FOLDER",
        help="folder of the control networks, with edges and depth (default: those of the embedded base model)",
    )
    add_scene_options(parser, "control")
    options = parser.parse_args(arguments)
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> bool:
    """Run the chosen parts, print their results and return whether all targets are reached."""
    if unknown := sorted(set(options.parts) - set(PARTS)):
        raise TavError(f"part {unknown[0]!r}: must be one of {', '.join(PARTS)}")
    find_networks(options.networks)
    runs = scene_runs(options, prepare=partial(_copy_networks, options.networks))
    parts = options.parts or PARTS
    if "driven" in parts and len(runs.scenes) < 2:
        raise TavError("part 'driven': needs at least two scenes")
    results = measure(runs, variants_of(parts, [scene.name for scene in runs.scenes]))
    measures = list(_measures(parts, runs, results))
    shown = {variant: edits for variant, edits in results.items() if variant != DRIVEN}
    texts = [table(measures)] if measures else []
    texts += [scores_table(runs, shown), differences_table(shown)] if len(shown) > 1 else []
    texts += [curve_table(results)] if "scale" in parts else []
    write_measures(options.out / "measures.json", measures)
    print("\n\n".join([*texts, "*: the interval excludes 0."]))
    return all(one.reached for one in measures)


def _measures(parts: Sequence[str], runs: SceneRuns, results: Mapping[str, Sequence[EditResult]]) -> Iterator[Measure]:
    if "noise" in parts:
        yield from noise_measures(results)
    if "inversion" in parts:
        silhouettes = {variant: silhouette_results(runs, variant) for variant in (BASELINE, *INVERSION)}
        yield from swap_measures(results, silhouettes)
    if "driven" in parts:
        yield from driven_measures(driven_results(runs))
    if "cost" in parts:
        yield from cost_measures(runs)


if __name__ == "__main__":
    sys.exit(main())
