"""Measure long clips: the memory and time of every stage by number of frames, and the quality of windows.

python -m benchmarks.length                     all parts, quality on all scenes
python -m benchmarks.length memory              memory alone, of the embedded base model
python -m benchmarks.length full-size           memory at Stable Diffusion 1.5's size, with random weights
python -m benchmarks.length quality --quick     quality on three scenes, one seed
python -m benchmarks.length --scenes FOLDER     scenes of a folder

Where memory is measured, each stage of each length runs in a process of its own, with one step. Prints tables, and writes a
plot of the drift: how much the object's appearance differs between frames, by their distance in time. Exits with code 1 if
a target is missed.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measures import ROOT, Measure, markdown, table, write_measures
from benchmarks.options import add_scene_options, exit_code, scene_runs
from benchmarks.scenes import BenchmarkScene, EditResult, SceneRuns, by_scene, edits_only, load_scenes
from benchmarks.statistics import mean_interval
from benchmarks.toyworld import Score
from tav_model.errors import TavError
from tav_model.files import read_json, write_json
from toyworld.backdrops import SIDE
from toyworld.scenes import Truth

if TYPE_CHECKING:
    import numpy as np

PARTS = ("memory", "full-size", "quality")
QUICK_PARTS = ("memory", "quality")
LENGTHS, QUICK_LENGTHS = (16, 64, 256, 1024), (16, 64)
FULL_SIZE_LENGTHS = (8, 16, 32, 64)
FLAT = 0.10  # by how much memory may grow beyond two windows
QUALITY_LENGTHS, QUICK_QUALITY_LENGTHS = (64, 256), (64,)
SHORT = 8  # frames that quality is compared with: those that the other benchmarks use
FRAMES_PER_PASS = 32  # in which the object travels its path once, so that long clips have several bounces
SEAM = 1.2  # warping error at the borders of windows, at most, relative to that inside
# Changes of params.yaml by variant. Pieces neither overlap nor have an anchor.
VARIANTS: dict[str, Mapping[str, Any]] = {
    "windows": {},
    "autoregressive": {"edit.autoregressive": True},
    "pieces": {"window.context_stride": SHORT, "window.anchor": False},
}
SCORES = (
    Score("track_error", "track error", "track error", at_most=True),
    Score("attributes_edited", "edited", "edited"),
    Score("attributes_kept", "kept", "kept"),
    Score("identity_error", "identity error", "identity error", at_most=True, percent=False, number_format="{:.2f}"),
)
BASE = (
    "import sys; from pathlib import Path; from benchmarks.full_size import write_base; write_base(Path(sys.argv[1]))"
)
STAGE = "import sys; from benchmarks.length import run_stage; run_stage(*sys.argv[1:])"


# Memory


@dataclass(frozen=True)
class MemorySetting:
    """What the memory is measured of.

    Attributes:
        base: the base model, as in params.yaml.
        size: width and height of the frames in pixels.
        context: frames of a window.
        preset: of the edit.
    """

    base: str
    size: int
    context: int
    preset: str


TOYWORLD = MemorySetting("toyworld", SIDE, 16, "category")
# With one step, other presets take four times as long: their masks need six predictions.
FULL_SIZE = MemorySetting("full-size", 256, 8, "tune-a-video")


def measure_memory(
    out: Path, lengths: Sequence[int], scene: BenchmarkScene, setting: MemorySetting = TOYWORLD
) -> dict[str, dict[int, float]]:
    """Return the largest memory of each stage in megabytes, by number of frames; what was measured before is kept.

    Args:
        out: folder of the projects that are measured.
        lengths: numbers of frames.
        scene: the clip, and its first edit.
        setting: the base model and the size of the frames and windows.
    """
    from tav.config.stages import STAGES

    measured: dict[str, dict[int, float]] = {stage: {} for stage in STAGES}
    for frames in lengths:
        project = out / str(frames)
        record = project / "memory.json"
        if not record.exists():
            print(f"  memory: {setting.base}, {frames} frames", file=sys.stderr, flush=True)
            shutil.rmtree(project, ignore_errors=True)
            _memory_project(project, scene, frames, setting)
            write_json(record, {stage: _stage_memory(project, stage, out) for stage in STAGES})
        for stage, megabytes in read_json(record).items():
            measured[stage][frames] = megabytes
    return measured


def _memory_project(project: Path, scene: BenchmarkScene, frames: int, setting: MemorySetting) -> None:
    """Write a project with a clip of so many frames, one edit, and one step of everything."""
    import yaml

    from tav_model.video import video_writer
    from toyworld.captions import caption
    from toyworld.renderer import render

    edit, edited = next(iter(scene.truth.edits.items()))
    truth = dataclasses.replace(scene.truth, frames=frames, edits={edit: edited})
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    files = {"video": "data/clip.mp4", "prompts": "data/clip.csv"}
    params |= {"base_model": setting.base, "clips": {"clip": {**files, "caption": caption(truth.scene)}}}
    params["decode"] |= {"frames": "all", "width": setting.size, "height": setting.size}
    params["window"]["context_length"] = setting.context
    params["edit"]["preset"] = setting.preset
    params["tracking"]["uri"] = None
    for section in ("tune", "invert", "edit"):
        params[section]["steps"] = 1
    (project / "data").mkdir(parents=True)
    (project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    with video_writer(project / files["video"], 24) as video:
        for time in truth.times(range(frames)):
            video.write(render(truth.scene, time)[None])
    with (project / files["prompts"]).open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("prompt", "name"), (caption(edited), edit)])


def _write_full_size_base(folder: Path) -> None:
    """Write the base model in a process of its own: the memory of this one would count as that of the stages it starts."""
    if subprocess.run([sys.executable, "-c", BASE, str(folder)], cwd=ROOT).returncode:
        raise TavError(f"{folder}: the base model cannot be written, see above")


def _stage_memory(project: Path, stage: str, models: Path) -> float:
    """Run a stage in a process of its own, and return its largest memory, or its decoder's, in megabytes.

    Args:
        project: the project.
        stage: of its clip.
        models: a folder with base models, beside those that the user has.
    """
    command = [sys.executable, "-c", STAGE, str(project), stage]
    folders = os.pathsep.join(filter(None, (str(models.resolve()), os.environ.get("TAV_MODELS"))))
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TAV_MODELS": folders}, text=True, stdout=subprocess.PIPE
    )
    if done.returncode:
        raise TavError(f"{stage}: failed, see above")
    return float(done.stdout.splitlines()[-1])


def run_stage(project: str, stage: str) -> None:
    """Run a stage of the clip in a project, and print the largest memory in megabytes."""
    import resource

    from tasks.clip_stages import ClipStages

    ClipStages(Path(project), "clip").run(stage)
    largest = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(largest / 1024)


def memory_table(measured: Mapping[str, Mapping[int, float]]) -> str:
    """Return the memory of every stage by number of frames, as Markdown."""
    lengths = list(next(iter(measured.values())))
    rows = [["memory, MB", *(f"{frames} frames" for frames in lengths)]]
    rows += [[stage, *(f"{values[frames]:.0f}" for frames in lengths)] for stage, values in measured.items()]
    return markdown(rows)


def time_table(out: Path, lengths: Sequence[int]) -> str:
    """Return the seconds of every stage by number of frames, with the loading of the model, as Markdown."""
    from tav.config.paths import Project

    timings = {frames: read_json(Project(out / str(frames)).timings("clip")) for frames in lengths}
    rows = [["seconds", *(f"{frames} frames" for frames in lengths)]]
    rows += [[stage, *(f"{timings[n][stage]:.1f}" for n in lengths)] for stage in timings[lengths[0]]]
    return markdown(rows)


def memory_targets(
    measured: Mapping[str, Mapping[int, float]], context: int = TOYWORLD.context, prefix: str = ""
) -> list[Measure]:
    """Return by how much the memory of each stage grows beyond two windows."""
    targets = []
    for stage, values in measured.items():
        long = [megabytes for frames, megabytes in values.items() if frames > 2 * context]
        if long:
            growth = max(long) / long[0] - 1
            targets.append(Measure(prefix + stage, "growth of memory beyond two windows", growth, FLAT, at_most=True))
    return targets


# Quality


def measure_quality(runs: SceneRuns, lengths: Sequence[int]) -> dict[str, list[EditResult]]:
    """Return the edits of every variant and length, and of the short clips that they are compared with."""
    results = {f"{SHORT} frames": edits_only(runs.run(f"{SHORT} frames", {"decode.frames": SHORT}))}
    for frames in lengths:
        first = f"{next(iter(VARIANTS))}, {frames} frames"
        long = _longer(runs, frames)
        for variant, changes in VARIANTS.items():
            name = f"{variant}, {frames} frames"
            settings = {"decode.frames": "all", "window.context_length": SHORT, **changes}
            tuned_in = first if changes.keys() <= {"edit.autoregressive"} and name != first else None
            results[name] = edits_only(long.run(name, settings, tuned_in))
    return results


def _longer(runs: SceneRuns, frames: int) -> SceneRuns:
    """Return runs on the same scenes, each rendered in so many frames, in which the object goes back and forth."""
    scenes = [BenchmarkScene(one.name, _longer_truth(one.truth, frames)) for one in runs.scenes]
    return SceneRuns(runs.out, scenes, runs.seeds, runs.changes)


def _longer_truth(truth: Truth, frames: int) -> Truth:
    passes = max(truth.scene.passes, frames / FRAMES_PER_PASS)
    edits = {name: dataclasses.replace(edited, passes=passes) for name, edited in truth.edits.items()}
    return Truth(dataclasses.replace(truth.scene, passes=passes), frames, edits)


def quality_table(results: Mapping[str, Sequence[EditResult]]) -> str:
    """Return the mean scores of every variant with their intervals, as Markdown."""
    rows = [["", *(score.heading for score in SCORES)]]
    for name, edits in results.items():
        rows.append([name, *(score.text(mean_interval(by_scene(edits, score.key))) for score in SCORES)])
    return markdown(rows)


def quality_targets(results: Mapping[str, Sequence[EditResult]]) -> list[Measure]:
    """Return the scores of windows, each with the end of the interval of short clips as its target."""
    short = results[f"{SHORT} frames"]
    targets = []
    for name, edits in results.items():
        if not name.startswith("windows"):
            continue
        for score in SCORES:
            value = mean_interval(by_scene(edits, score.key))
            interval = mean_interval(by_scene(short, score.key))
            limit = interval.high if score.at_most else interval.low
            targets.append(
                Measure(name, score.heading, value.mean, limit, score.at_most, score.percent, (value.low, value.high))
            )
    return targets


def seam_ratio(errors: Sequence[float], borders: set[int]) -> float:
    """Return the mean warping error at the borders of windows, divided by that of the other pairs of frames.

    Args:
        errors: of each frame and the next.
        borders: indexes of the frames that begin where a window begins or ends, not 0.
    """
    at_border = [error for i, error in enumerate(errors) if i + 1 in borders]
    inside = [error for i, error in enumerate(errors) if i + 1 not in borders]
    return (sum(at_border) / len(at_border)) / max(sum(inside) / len(inside), 1e-12)


def borders_of(frames: int, options: Any) -> set[int]:
    """Return the frames at which a window begins or ends, without both ends of the clip."""
    windows = options.windows(frames)
    return ({window.start for window in windows} | {window.stop for window in windows}) - {0, frames}


def seams(runs: SceneRuns, lengths: Sequence[int]) -> list[Measure]:
    """Return the warping error at the borders of windows relative to that inside, over all edits."""
    import numpy as np

    from tav.config import load_params
    from tav.config.paths import Project
    from tav_model.metrics.temporal import estimate_motion, warping_errors
    from tav_model.video import read_video

    measures = []
    for frames in lengths:
        ratios = []
        project = Project(runs.project(f"windows, {frames} frames"))
        options = load_params(project.root / "params.yaml").window.options(frames)
        for scene in runs.scenes:
            motion = estimate_motion(read_video(project.frames(scene.name) / "source.mp4")[0])
            for edit in scene.truth.edits:
                video = read_video(project.edits(scene.name) / f"{edit}.mp4")[0]
                ratios.append(seam_ratio(warping_errors(video, motion), borders_of(frames, options)))
        measures.append(
            Measure(f"windows, {frames} frames", "warping error at seams", float(np.mean(ratios)), SEAM, True, False)
        )
    return measures


# Drift


def drift(frames: np.ndarray, truth: Any, times: Sequence[float], distances: Sequence[int]) -> dict[int, float]:
    """Return the identity error of pairs of frames, by their distance in frames: the mean over a few pairs.

    Args:
        frames: of an edit, `f h w 3` in uint8.
        truth: scene of the true edit.
        times: of each frame, 0 to 1.
        distances: in frames.
    """
    import numpy as np

    from toyworld.identity import identity_error

    result = {}
    for distance in distances:
        starts = np.linspace(0, len(frames) - 1 - distance, 4).round().astype(int)
        pairs = [(int(start), int(start) + distance) for start in starts]
        errors = [identity_error(frames[list(pair)], truth, [times[i] for i in pair]) for pair in pairs]
        result[distance] = float(np.mean(errors))
    return result


def plot_drift(runs: SceneRuns, frames: int, path: Path) -> dict[str, dict[int, float]]:
    """Plot the drift of every variant at one length, over all edits, and return it."""
    import matplotlib
    import numpy as np

    from tav.config.paths import Project
    from tav_model.video import read_video

    matplotlib.use("Agg")
    from matplotlib import pyplot

    distances = [distance for distance in (1, 2, 4, 8, 16, 32, 64, 128) if distance <= frames // 2]
    curves = {}
    for variant in VARIANTS:
        project = Project(runs.project(f"{variant}, {frames} frames"))
        rows = []
        for scene in runs.scenes:
            truth = _longer_truth(scene.truth, frames)
            for edit, edited in truth.edits.items():
                video = read_video(project.edits(scene.name) / f"{edit}.mp4")[0]
                rows.append(drift(video, edited, truth.times(range(frames)), distances))
        curves[variant] = {distance: float(np.mean([row[distance] for row in rows])) for distance in distances}
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for variant, curve in curves.items():
        axes.plot(list(curve), list(curve.values()), marker="o", label=variant)
    axes.set(xscale="log", xlabel="distance in frames", ylabel="identity error", title=f"Drift over {frames} frames")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return curves


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 if the targets are reached, 1 if not, 2 after invalid arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.length",
        description=__doc__.partition("\n")[0],
        epilog="Exits with code 1 if a target is missed.",
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    add_scene_options(parser, "length")
    options = parser.parse_args(arguments)
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> bool:
    """Measure and print what the options ask for, and return whether all targets are reached."""
    if unknown := sorted(set(options.parts) - set(PARTS)):
        raise TavError(f"part {unknown[0]!r}: must be one of {', '.join(PARTS)}")
    measures: list[Measure] = []
    texts = []
    runs = scene_runs(options)
    parts = options.parts or (QUICK_PARTS if options.quick else PARTS)
    scene = runs.scenes[0] if options.scenes else load_scenes([ROOT / "data" / "scenes"])[0]
    if "memory" in parts:
        lengths, out = QUICK_LENGTHS if options.quick else LENGTHS, options.out / "memory"
        measured = measure_memory(out, lengths, scene)
        measures += memory_targets(measured)
        texts += [memory_table(measured), time_table(out, lengths)]
    if "full-size" in parts:
        out = options.out / "full-size"
        _write_full_size_base(out / FULL_SIZE.base)
        measured = measure_memory(out, FULL_SIZE_LENGTHS, scene, FULL_SIZE)
        measures += memory_targets(measured, FULL_SIZE.context, "full size, ")
        texts += [memory_table(measured), time_table(out, FULL_SIZE_LENGTHS)]
    if "quality" in parts:
        lengths = QUICK_QUALITY_LENGTHS if options.quick else QUALITY_LENGTHS
        results = measure_quality(runs, lengths)
        measures += quality_targets(results) + seams(runs, lengths)
        curves = plot_drift(runs, lengths[-1], options.out / "drift.png")
        write_json(options.out / "drift.json", curves)
        texts += [quality_table(results), f"plot: {options.out / 'drift.png'}"]
    write_measures(options.out / "measures.json", measures)
    print("\n\n".join([*([table(measures)] if measures else []), *texts]))
    return all(one.reached for one in measures)


if __name__ == "__main__":
    sys.exit(main())
