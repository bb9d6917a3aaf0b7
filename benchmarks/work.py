"""Compare how much work the same edits take: operations and seconds of tuning, inversion and five edits, with their quality.

python -m benchmarks.work                    all variants, on all scenes
python -m benchmarks.work --quick            three scenes, one seed
python -m benchmarks.work --scenes FOLDER    scenes of a folder
python -m benchmarks.work candidate          only this variant and the reference

The reference tunes for 400 steps of AdamW and samples 20 steps of DDIM in float32, as the first edition did, with today's
presets and guidance; the candidate has the defaults of params.yaml. Prints a table of operations, seconds and scores with 95 %
intervals, and the paired differences from the reference. Writes a plot of quality against operations. Exits with code 1 if the
candidate needs more than a quarter of the operations, or if one of its scores is worse beyond the interval.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measures import Measure, markdown, table, write_measures
from benchmarks.options import add_scene_options, exit_code, scene_runs
from benchmarks.scenes import BenchmarkScene, EditResult, SceneRuns, by_scene, edits_only
from benchmarks.speed import count_flop
from benchmarks.statistics import mean_interval, paired_difference
from benchmarks.toyworld import SCORES, Score
from tav_model.errors import TavError
from tav_model.files import read_json, write_json

REFERENCE, CANDIDATE = "reference", "candidate"
EDITS = 5
COUNTED_SEED = 2**31 - 1  # of the edit whose operations are counted; no run uses it
SHARE = 0.25  # of the reference's operations, at most
# Tuning and sampling of the first edition; edits keep of the clip what they keep by default.
FULL: dict[str, Any] = {
    "tune.steps": 400,
    "tune.learning_rate": 1e-3,
    "tune.optimizer": "adamw",
    "tune.timestep_sampling": "uniform",
    **{f"{stage}.precision": "float32" for stage in ("tune", "invert", "edit")},
    "edit.sampler": "ddim",
    "edit.steps": 20,
}
STRATIFIED = {"tune.timestep_sampling": "stratified"}
SHORT = {**FULL, "tune.steps": 100, **STRATIFIED}
FEW_STEPS = {"edit.sampler": "dpm-solver++", "edit.steps": 12}
# Changes of params.yaml by variant.
VARIANTS: dict[str, Mapping[str, Any]] = {
    REFERENCE: FULL,
    "100 DDIM steps": {**FULL, "edit.steps": 100},
    "dpm-solver++, 12 steps": {**FULL, **FEW_STEPS},
    "guidance up to 0.6": {**FULL, "edit.guidance_end": 0.6},
    "guidance from 0.2": {**FULL, "edit.guidance_start": 0.2},
    "features of every 2nd step": {**FULL, "edit.feature_reuse_interval": 2},
    "features of every 3rd step": {**FULL, "edit.feature_reuse_interval": 3},
    "tune 100": {**FULL, "tune.steps": 100},
    "tune 100, stratified": SHORT,
    "tune 100, cubic": {**SHORT, "tune.timestep_sampling": "cubic"},
    "tune 100, muon": {**SHORT, "tune.optimizer": "muon", "tune.learning_rate": 3e-3},
    "tune 40, muon": {**SHORT, "tune.optimizer": "muon", "tune.steps": 40, "tune.learning_rate": 6e-3},
    "tune 100, motion": {**SHORT, "tune.motion_weight": 0.5},
    "LoRA of rank 16": {**FULL, "tune.lora_rank": 16},
    "early stopping": {**FULL, **STRATIFIED, "tune.early_stopping": 60},
    CANDIDATE: {},
}


@dataclass(frozen=True)
class Work:
    """What tuning, inverting and five edits of a clip take.

    Attributes:
        tuning: floating-point operations of the tuning.
        inversion: of the inversion.
        edits: of the edits, with their decoding.
        tuning_steps: mean number of steps of the tunings.
        seconds: mean duration of all three.
    """

    tuning: float
    inversion: float
    edits: float
    tuning_steps: float
    seconds: float

    @property
    def total(self) -> float:
        """All operations."""
        return self.tuning + self.inversion + self.edits


def tuned_in(variant: str) -> str | None:
    """Return the variant whose tuning another one uses; None if it has its own."""
    own, shared = (
        {key: value for key, value in VARIANTS[name].items() if key.startswith("tune.")}
        for name in (variant, REFERENCE)
    )
    return REFERENCE if own == shared and variant != REFERENCE else None


def measure_work(runs: SceneRuns, variant: str) -> Work:
    """Count the operations of a variant that has run, on its first scene; steps and seconds are means over all runs."""
    from tav.config.paths import Project
    from tav_model.tuned_weights import read_info

    steps, seconds = [], []
    for number in range(runs.seeds):
        project, tuned = (Project(runs.project(name, number)) for name in (variant, tuned_in(variant) or variant))
        for scene in runs.scenes:
            steps.append(read_info(project.tuned(scene.name))["steps"])
            timings = read_json(project.timings(scene.name))
            # The stage `edit` also renders the reconstruction.
            edits = EDITS * timings["edit"] / (len(scene.truth.edits) + 1)
            seconds.append(read_json(tuned.timings(scene.name))["tune"] + timings["invert"] + edits)
    means = (sum(values) / len(values) for values in (steps, seconds))
    return _count(runs.project(variant), runs.scenes[0], *means)


def _count(project: Path, scene: BenchmarkScene, steps: float, seconds: float) -> Work:
    """Count the operations of one step of tuning, of the inversion and of one edit, in the files of a run."""
    from tasks.clip_stages import ClipStages
    from tasks.invert import invert
    from tav.config import load_params
    from tav.config.paths import Project
    from tav.runtime.events import EventStream
    from tav.runtime.progress import Progress
    from tav_model.tuning import HELD_OUT_EVERY

    stages, paths = ClipStages(project, scene.name), Project(project)
    params = load_params(project / "params.yaml").for_clip(scene.name)
    step, held_out = _tuning_operations(stages.base, paths.latents(scene.name), params)
    measured = steps // HELD_OUT_EVERY if params.tune.early_stopping else 0
    with tempfile.TemporaryDirectory() as folder:
        inversion = count_flop(
            lambda: invert(
                paths.latents(scene.name),
                paths.tuned(scene.name),
                Path(folder) / "inverted",
                base=stages.base,
                attention=params.attention,
                params=params.invert,
                device="cpu",
                progress=Progress(EventStream(), stage="invert"),
            )
        )
    row = dataclasses.replace(stages.prompt_rows()[0], name="counted", seed=COUNTED_SEED)
    batch = stages.quick_batch([row], "cpu")
    for counted in batch.rows:
        shutil.rmtree(batch.store / counted.identity, ignore_errors=True)  # Rendered in a count that was interrupted.
    batch.pipeline  # noqa: B018 (loaded before anything is counted)
    edit = count_flop(lambda: batch.render(batch.rows, lambda *_: None))
    return Work(step * steps + held_out * measured, inversion, EDITS * edit, steps, seconds)


def _tuning_operations(base: str, latents: Path, params: Any) -> tuple[float, float]:
    """Return the operations of a step of tuning, and of one measurement of the held-out loss."""
    from tav.runtime.devices import resolve_precision
    from tav_model import Tuner, TuningConfig, UNet3DConditionModel
    from tav_model.base_models import load_part
    from tav_model.tensors import load_tensors

    tensors = load_tensors(latents / "latents.safetensors")[0]
    caption = load_tensors(latents / "text.safetensors")[0]["caption"]
    attention = params.attention
    unet = UNet3DConditionModel.from_pretrained_2d(base, attention=attention.spatial, temporal=attention.temporal)
    settings = params.tune.model_dump() | {"precision": resolve_precision(params.tune.precision, "cpu")}
    tuner = Tuner(unet, load_part(base, "scheduler"), TuningConfig(**settings, seed=params.seed))
    step = count_flop(lambda: tuner.step(tensors["mean"], tensors["deviation"], caption))
    return step, count_flop(lambda: tuner.measure_held_out(tensors["mean"], caption))


def measure(runs: SceneRuns, variants: Sequence[str]) -> tuple[dict[str, list[EditResult]], dict[str, Work]]:
    """Run the variants; returns their edits and their work."""
    results, works = {}, {}
    for variant in variants:
        results[variant] = edits_only(runs.run(variant, VARIANTS[variant], tuned_in(variant)))
        known = runs.project(variant).parent / "work.json"
        done = [read_json(runs.project(variant) / "done" / f"{scene.name}.json")["identity"] for scene in runs.scenes]
        record = read_json(known) if known.exists() else {}
        if record.get("runs") != done:
            record = {"runs": done, "work": dataclasses.asdict(measure_work(runs, variant))}
            write_json(known, record)
        works[variant] = Work(**record["work"])
    return results, works


def work_table(results: Mapping[str, list[EditResult]], works: Mapping[str, Work]) -> str:
    """Return operations, seconds and scores of every variant, as Markdown."""
    rows = [
        ["", "tuning steps", "tuning", "inversion", f"{EDITS} edits", "all, TFLOP", "share", "seconds"]
        + [score.heading for score in SCORES]
    ]
    for name, work in works.items():
        operations = [f"{value / 1e12:.2f}" for value in (work.tuning, work.inversion, work.edits, work.total)]
        share = f"{100 * work.total / works[REFERENCE].total:.0f} %"
        scores = [score.text(mean_interval(by_scene(results[name], score.key))) for score in SCORES]
        rows.append([name, f"{work.tuning_steps:.0f}", *operations, share, f"{work.seconds:.0f}", *scores])
    return markdown(rows)


def differences_table(results: Mapping[str, list[EditResult]]) -> str:
    """Return the paired differences from the reference, as Markdown; an asterisk marks intervals that exclude 0."""
    rows = [["", *(score.heading for score in SCORES)]]
    for name, edits in results.items():
        if name != REFERENCE:
            differences = [
                paired_difference(by_scene(edits, score.key), by_scene(results[REFERENCE], score.key))
                for score in SCORES
            ]
            cells = [
                score.text(one) + (" *" if one.excludes_zero else "")
                for score, one in zip(SCORES, differences, strict=True)
            ]
            rows.append([f"{name}, minus {REFERENCE}", *cells])
    return markdown(rows)


def worse_scores(edits: Sequence[EditResult], others: Sequence[EditResult]) -> list[str]:
    """Return the scores by which edits are worse than others, beyond the interval of the difference."""
    return [score.heading for score in SCORES if _is_worse(score, edits, others)]


def _is_worse(score: Score, edits: Sequence[EditResult], others: Sequence[EditResult]) -> bool:
    difference = paired_difference(by_scene(edits, score.key), by_scene(others, score.key))
    return difference.low > 0 if score.at_most else difference.high < 0


def targets(results: Mapping[str, list[EditResult]], works: Mapping[str, Work]) -> list[Measure]:
    """Return what the candidate saves, and by which scores it is worse than the reference."""
    worse = worse_scores(results[CANDIDATE], results[REFERENCE])
    share = works[CANDIDATE].total / works[REFERENCE].total
    name = f"scores worse beyond the interval{': ' if worse else ''}{', '.join(worse)}"
    return [
        Measure(CANDIDATE, "operations, share of the reference's", share, SHARE, at_most=True),
        Measure(CANDIDATE, name, len(worse), 0, at_most=True, percent=False),
    ]


def plot(results: Mapping[str, list[EditResult]], works: Mapping[str, Work], path: Path) -> None:
    """Write a plot of three scores against the operations of every variant, with intervals."""
    from matplotlib.figure import Figure

    shown = [score for score in SCORES if score.key in ("track_error", "attributes_edited", "psnr_to_truth")]
    figure = Figure(figsize=(5 * len(shown), 5), layout="constrained")
    for axes, score in zip(figure.subplots(1, len(shown)), shown, strict=True):
        for name, work in works.items():
            value = mean_interval(by_scene(results[name], score.key))
            factor = 100 if score.percent else 1
            bars = [[factor * (value.mean - value.low)], [factor * (value.high - value.mean)]]
            marker = {REFERENCE: "s", CANDIDATE: "*"}.get(name, "o")
            axes.errorbar(work.total / 1e12, factor * value.mean, bars, marker=marker, capsize=2, label=name)
        axes.set(xlabel=f"TFLOP of tuning, inversion and {EDITS} edits", xlim=(0, None))
        axes.set_title(f"{score.heading}{', %' if score.percent else ''}{' (lower is better)' * score.at_most}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=144)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 if the targets are reached, 1 if not, 2 after invalid arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.work",
        description=__doc__.partition("\n")[0],
        epilog="Exits with code 1 if a target is missed.",
    )
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help=f"{'; '.join(VARIANTS)} (default: all)")
    add_scene_options(parser, "work")
    options = parser.parse_args(arguments)
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> bool:
    """Run the chosen variants, print their results and return whether all targets are reached."""
    if unknown := sorted(set(options.variants) - set(VARIANTS)):
        raise TavError(f"variant {unknown[0]!r}: must be one of {'; '.join(VARIANTS)}")
    runs = scene_runs(options)
    chosen = [name for name in VARIANTS if name == REFERENCE or name in (options.variants or VARIANTS)]
    results, works = measure(runs, chosen)
    measures = targets(results, works) if CANDIDATE in chosen else []
    picture = options.out / "work.png"
    plot(results, works, picture)
    write_measures(options.out / "measures.json", measures)
    write_json(options.out / "work.json", {name: dataclasses.asdict(work) for name, work in works.items()})
    parts = [work_table(results, works), differences_table(results), "*: the interval excludes 0."]
    print("\n\n".join([*([table(measures)] if measures else []), *parts]))
    print("\npicture:", picture)
    return all(one.reached for one in measures)


if __name__ == "__main__":
    sys.exit(main())
