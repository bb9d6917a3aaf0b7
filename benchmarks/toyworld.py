"""Measure the quality of the embedded base model, and of the method on it, against ground truth.

python -m benchmarks.toyworld                      all parts: a table of figures and their targets
python -m benchmarks.toyworld vae scorer           some parts
python -m benchmarks.toyworld --quick              fewer pictures, scenes and seeds, without ablations: a few minutes
python -m benchmarks.toyworld method --scenes DIR  the method on other scenes

Exits with code 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.measures import ROOT, Measure, markdown, table, write_measures
from benchmarks.options import add_scene_options, exit_code, scene_runs
from benchmarks.scenes import RECONSTRUCTION, BenchmarkScene, EditResult, SceneRuns, by_scene, edits_only
from benchmarks.statistics import Interval, mean_interval, paired_difference
from tav_model.errors import TavError
from tav_model.files import write_json

if TYPE_CHECKING:
    from toyworld.scenes import Scene

UNSEEN, QUICK_UNSEEN = 256, 48  # frames or captions of held-out scenes
SILHOUETTES = 96  # of these
WORST = 8
GUIDANCE_SCALE, STEPS = 5.0, 30
# Edits by Tune-A-Video take nothing over from the source but the first latents.
PLAIN: dict[str, Any] = {"edit.preset": "tune-a-video"}
FULL = "full method"
# The ablations: the project's parameters, changed by these. Those that change nothing are left out.
VARIANTS: dict[str, dict[str, Any]] = {
    FULL: {},
    "without tuning": {"tune.steps": 0},
    "without inversion": {**PLAIN, "edit.start": "random"},
    "plain Tune-A-Video": PLAIN,
    "first, former": {"attention.spatial": ["first", "former"]},
    "self": {"attention.spatial": ["self"]},
    "first": {"attention.spatial": ["first"]},
    "former": {"attention.spatial": ["former"]},
    "self, former": {"attention.spatial": ["self", "former"]},
    "all": {"attention.spatial": ["all"]},
    "without temporal attention": {"attention.temporal": False},
}


@dataclass(frozen=True)
class Score:
    """A score of edits that the benchmark reports.

    Attributes:
        key: name of the metric.
        label: what the tables call it.
        heading: the same in a column's heading.
        target: the value to reach, or None.
        at_most: the target is an upper bound.
        percent: print it in per cent.
        number_format: format of a number that is not in per cent.
    """

    key: str
    label: str
    heading: str
    target: float | None = None
    at_most: bool = False
    percent: bool = True
    number_format: str = "{:.1f}"

    def text(self, value: Interval) -> str:
        """Return a mean and its interval."""
        return value.text("{:.1f}", 100) + " %" if self.percent else value.text(self.number_format)


SCORES = (
    Score("track_error", "track error, share of the width", "track error", 0.03, at_most=True),
    Score("attributes_edited", "edited attributes correct, share of frames", "edited", 0.95),
    Score("attributes_kept", "other attributes preserved, share of frames", "kept", 0.98),
    Score("identity_error", "identity error", "identity error", at_most=True, percent=False, number_format="{:.2f}"),
    Score(
        "consistency_to_truth",
        "frame consistency minus that of the true video",
        "consistency vs. truth",
        percent=False,
        number_format="{:+.3f}",
    ),
    Score("frames_without_object", "frames without their object", "no object", at_most=True),
    Score("psnr_to_truth", "PSNR against the true video, dB", "PSNR, dB", 24, percent=False),
)
PICTURED_EDIT = ("ball", "yellow-star-at-night")


# The base model


def measure_vae(base: Path, count: int) -> Iterator[Measure]:
    """Encode and decode pictures of held-out scenes, and compare."""
    from diffusers import AutoencoderKL

    from toyworld.training.vae import psnr, reconstruct, unseen_pictures

    vae = AutoencoderKL.from_pretrained(base / "vae", local_files_only=True)
    pictures, masks = unseen_pictures(count)
    decoded = reconstruct(vae, pictures)
    yield Measure("VAE", f"PSNR of {count} unseen frames, dB", float(psnr(pictures, decoded).mean()), 34, percent=False)
    error = np.square((pictures.astype(np.float64) - decoded) / 255).mean(-1)
    on_object = float(-10 * np.log10((error * masks).sum() / masks.sum()))
    yield Measure("VAE", "PSNR on the object, dB", on_object, 31, percent=False)


def measure_scorer(base: Path, count: int) -> Iterator[Measure]:
    """Let the scorer choose the caption of a held-out scene among 64, and name its attributes."""
    from tav_model.metrics.clip import ClipScorer
    from toyworld.captions import described, random_caption
    from toyworld.judge import Judge
    from toyworld.renderer import render
    from toyworld.samples import random_scene

    scorer = ClipScorer(base / "scorer")
    rng = np.random.default_rng(1)
    scenes = [random_scene(rng, unseen=True) for _ in range(count)]
    frames = np.stack([render(scene, float(rng.random())) for scene in scenes])
    images, texts = scorer.embed_frames(frames), scorer.embed_texts([random_caption(scene, rng) for scene in scenes])
    correct = []
    for i, scene in enumerate(scenes):
        others = [j for j in range(count) if described(scenes[j]) != described(scene)]
        rivals = rng.choice(others, min(63, len(others)), replace=False)
        correct.append(images[i] @ texts[i] > (texts[rivals] @ images[i]).max())
    yield Measure("scorer", "correct caption among 64, unseen frames", float(np.mean(correct)), 0.90)
    for name, share in Judge(scorer).shares(frames, scenes).items():
        yield Measure("scorer", f"{name} recognised, unseen frames", share, 0.98)


def measure_images(base: Path, count: int, out: Path) -> Iterator[Measure]:
    """Generate pictures from captions whose object, colour and ground never occurred together in training."""
    from PIL import Image

    from tav_model.metrics.clip import ClipScorer
    from toyworld.captions import random_caption
    from toyworld.judge import Judge
    from toyworld.samples import random_scene
    from toyworld.truth import look

    rng = np.random.default_rng(2)
    scenes = [random_scene(rng, unseen=True) for _ in range(count)]
    pictures = text_to_image(base, [random_caption(scene, rng) for scene in scenes])
    out.mkdir(parents=True, exist_ok=True)
    rows = [np.concatenate(list(pictures[start : start + 16]), 1) for start in range(0, min(len(pictures), 96), 16)]
    Image.fromarray(np.concatenate(rows)).save(out / "images.png")
    for name, share in Judge(ClipScorer(base / "scorer")).shares(pictures, scenes).items():
        yield Measure("text to image", f"{name}, by the scorer", share, 0.98)
    observed = [look(picture) for picture in pictures]
    for name in ("colour", "ground", "sky"):
        share = np.mean([getattr(a, name) == getattr(b, name) for a, b in zip(observed, scenes, strict=True)])
        yield Measure("text to image", f"{name}, by the palette", float(share), 0.98)

    yield from _silhouettes(base, pictures[:SILHOUETTES], scenes[:SILHOUETTES])


def _silhouettes(base: Path, pictures: np.ndarray, scenes: Sequence[Scene]) -> Iterator[Measure]:
    """Compare the outlines of generated objects with those of rendered ones after the VAE, which are the ceiling."""
    from diffusers import AutoencoderKL

    from toyworld.renderer import render
    from toyworld.silhouette import silhouette
    from toyworld.training.vae import reconstruct

    rng = np.random.default_rng(3)
    rendered = np.stack([render(scene, float(rng.random())) for scene in scenes])
    decoded = reconstruct(AutoencoderKL.from_pretrained(base / "vae", local_files_only=True), rendered)
    generated, ceiling = (
        float(np.mean([silhouette(picture, scene) for picture, scene in zip(some, scenes, strict=True)]))
        for some in (pictures, decoded)
    )
    yield Measure("text to image", "silhouette, intersection over union", generated, percent=False)
    yield Measure("text to image", "silhouette of rendered pictures after the VAE", ceiling, percent=False)
    yield Measure("text to image", "silhouette, share of the ceiling", generated / ceiling, 0.92)


def text_to_image(base: Path, captions: list[str], chunk: int = 32) -> np.ndarray:
    """Generate a picture for each caption with diffusers' own pipeline: `b h w c` uint8."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(base, local_files_only=True, torch_dtype=torch.float32)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for start in range(0, len(captions), chunk):
        generator = torch.Generator().manual_seed(start)
        pictures.append(
            pipeline(
                captions[start : start + chunk],
                height=128,
                width=128,
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE_SCALE,
                generator=generator,
                output_type="np",
            ).images
        )
        print(f"  {min(start + chunk, len(captions))} of {len(captions)} pictures", file=sys.stderr, flush=True)
    return np.rint(255 * np.concatenate(pictures)).astype(np.uint8)


# The method


def measure_method(runs: SceneRuns) -> Iterator[Measure]:
    """Run the method on the scenes, and compare the edits with the truth."""
    results = edits_only(runs.run(FULL))
    for score in SCORES:
        if score.key == "frames_without_object":
            continue
        value = mean_interval(by_scene(results, score.key))
        yield Measure(
            "method",
            score.label,
            value.mean,
            score.target,
            score.at_most,
            score.percent,
            (value.low, value.high),
        )
        if score.key == "consistency_to_truth":
            # A video that stands still is too consistent.
            name = "frame consistency, distance from that of the true video"
            yield Measure("method", name, abs(value.mean), 0.01, at_most=True, percent=False)
    single = [result for result in results if result.category != "multiple"]
    if single:
        missing = mean_interval(by_scene(single, "frames_without_object"))
        name = "frames without their object, edits of one attribute"
        yield Measure("method", name, missing.mean, 0.0, True, interval=(missing.low, missing.high))


def method_tables(runs: SceneRuns, base: Path) -> str:
    """Return the method's scores beside their ceilings, by category, and the worst edits, as Markdown."""
    results = runs.run(FULL)
    edits = edits_only(results)
    ceiling = truth_after_vae(runs.scenes, base, _frames(runs))
    reconstructions = [result for result in results if result.edit == RECONSTRUCTION]
    rows = [["", *(score.heading for score in SCORES)]]
    for name, some in (
        ("edits", edits),
        ("truth through the VAE", ceiling),
        ("source, inverted and sampled at guidance 1", reconstructions),
    ):
        rows.append([name, *_cells(some)])
    categories = [["category", "edits", *(score.heading for score in SCORES)]]
    for category in sorted({result.category for result in edits}):
        some = [result for result in edits if result.category == category]
        categories.append([category, str(len(some)), *_cells(some)])
    worst = [["worst edits", "seed", *(score.heading for score in SCORES)]]
    for result in sorted(edits, key=_badness, reverse=True)[:WORST]:
        worst.append([f"{result.scene}, {result.edit}", str(result.seed), *_values(result)])
    return "\n\n".join(markdown(rows) for rows in (rows, categories, worst))


def _frames(runs: SceneRuns) -> list[list[float]]:
    """Return the times of the frames that the runs show, by scene."""
    from tav.config import load_params
    from tav.media.scene_truth import load_clip_truth

    project = runs.project(FULL)
    params = load_params(project / "params.yaml")
    return [scene.truth.times(load_clip_truth(project, scene.name, params)[1]) for scene in runs.scenes]


def truth_after_vae(scenes: Sequence[BenchmarkScene], base: Path, times: Sequence[Sequence[float]]) -> list[EditResult]:
    """Return the scores of the rendered truth of every edit, encoded and decoded: what no method can exceed."""
    from diffusers import AutoencoderKL

    from tav_model.metrics.clip import ClipScorer
    from toyworld.judge import Judge
    from toyworld.renderer import render
    from toyworld.training.vae import reconstruct

    vae, judge = AutoencoderKL.from_pretrained(base / "vae", local_files_only=True), Judge(ClipScorer(base / "scorer"))
    results = []
    for scene, instants in zip(scenes, times, strict=True):
        for edit, edited in scene.truth.edits.items():
            decoded = reconstruct(vae, np.stack([render(edited, time) for time in instants]))
            verdict = judge.verdict(decoded, scene.truth.scene, edited, instants)
            results.append(EditResult(scene.name, edit, scene.truth.category(edit), 0, asdict(verdict)))
    return results


def measure_ablations(runs: SceneRuns) -> str:
    """Return the ablations, and their paired differences from the full method, as Markdown tables."""
    results = {name: edits_only(runs.run(name, changes, _tuned_in(changes))) for name, changes in _variants().items()}
    full = results[FULL]
    means, differences = ([["", *(score.heading for score in SCORES)]] for _ in range(2))
    for name, some in results.items():
        means.append([name, *_cells(some)])
        if some is not full:
            pairs = [(by_scene(some, score.key), by_scene(full, score.key)) for score in SCORES]
            cells = [_marked(score, paired_difference(*pair)) for score, pair in zip(SCORES, pairs, strict=True)]
            differences.append([f"{name}, minus full", *cells])
    return f"{markdown(means)}\n\n{markdown(differences)}\n\n*: the interval excludes 0."


def _tuned_in(changes: Mapping[str, Any]) -> str | None:
    """Return the variant whose tuned weights a variant shares; None where it has its own."""
    return FULL if changes and all(key.startswith("edit.") for key in changes) else None


def _variants() -> dict[str, dict[str, Any]]:
    """Return the ablations that differ from the project's parameters."""
    import yaml

    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))

    def same(key: str, value: Any) -> bool:
        section, _, entry = key.partition(".")
        return bool(params[section][entry] == value)

    return {
        name: changes
        for name, changes in VARIANTS.items()
        if not changes or not all(same(key, value) for key, value in changes.items())
    }


def _cells(results: Sequence[EditResult]) -> list[str]:
    return [score.text(mean_interval(by_scene(results, score.key))) for score in SCORES]


def _marked(score: Score, difference: Interval) -> str:
    return score.text(difference) + (" *" if difference.excludes_zero else "")


def _values(result: EditResult) -> list[str]:
    return [
        f"{100 * result.scores[score.key]:.1f} %"
        if score.percent
        else score.number_format.format(result.scores[score.key])
        for score in SCORES
    ]


def _badness(result: EditResult) -> float:
    """Return how far an edit is from being right: attributes that are wrong, missing objects, and the track error."""
    scores = result.scores
    wrong = (1 - scores["attributes_edited"]) + (1 - scores["attributes_kept"])
    return wrong + scores["frames_without_object"] + 2 * scores["track_error"]


def picture(runs: SceneRuns, path: Path) -> bool:
    """Write a contact sheet of one edit by all variants; return False where its scene is not among those that ran."""
    from tav.media.contact_sheet import write_contact_sheet
    from tav_model.video import read_video
    from toyworld.captions import caption
    from toyworld.renderer import render

    clip, name = PICTURED_EDIT
    found = [(scene, times) for scene, times in zip(runs.scenes, _frames(runs), strict=True) if scene.name == clip]
    if not found or name not in found[0][0].truth.edits:
        return False
    (scene, times), edited = found[0], found[0][0].truth.edits[name]
    source, _ = read_video(runs.project(FULL) / "results" / clip / "frames" / "source.mp4")
    rows = [
        (f"source: {caption(scene.truth.scene)}", source),
        (f"truth: {caption(edited)}", np.stack([render(edited, time) for time in times])),
    ]
    for variant in _variants():
        video = runs.project(variant) / "results" / clip / "edits" / f"{name}.mp4"
        rows.append((variant, read_video(video)[0]))
    write_contact_sheet(path, rows)
    return True


MODEL_PARTS: dict[str, Callable[[Path, int, Path], Iterator[Measure]]] = {
    "vae": lambda base, count, out: measure_vae(base, count),
    "scorer": lambda base, count, out: measure_scorer(base, count),
    "images": measure_images,
}
PARTS = (*MODEL_PARTS, "method", "ablations")


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 if all targets are reached, 1 if not, 2 after invalid arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.toyworld",
        description=__doc__.partition("\n")[0],
        epilog="Exits with code 1 if a target is missed.",
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    add_scene_options(parser, "toyworld")
    options = parser.parse_args(arguments)
    return exit_code(lambda: _run(options))


def _run(options: argparse.Namespace) -> bool:
    """Run the chosen parts, print their results and return whether all targets are reached."""
    from toyworld import WEIGHTS

    if unknown := sorted(set(options.parts) - set(PARTS)):
        raise TavError(f"part {unknown[0]!r}: must be one of {', '.join(PARTS)}")
    chosen = options.parts or [part for part in PARTS if not options.quick or part != "ablations"]
    out, runs, count = options.out, scene_runs(options), QUICK_UNSEEN if options.quick else UNSEEN
    measures: list[Measure] = []
    tables: list[str] = []
    for part in chosen:
        print(part, file=sys.stderr, flush=True)
        if part == "ablations":
            tables.append(measure_ablations(runs))
            if picture(runs, out / "ablations.png"):
                tables.append(f"picture: {out / 'ablations.png'}")
        elif part == "method":
            measures += measure_method(runs)
            tables.append(method_tables(runs, WEIGHTS))
            rows = [asdict(result) for result in runs.run(FULL)]
            write_json(out / "edits.json", rows)
        else:
            measures += MODEL_PARTS[part](WEIGHTS, count, out)
    if measures:
        print(table(measures))
        write_measures(out / "measures.json", measures)
    print("\n\n".join(["", *tables]) if tables else "", end="\n" if tables else "")
    return all(measure.reached for measure in measures)


if __name__ == "__main__":
    sys.exit(main())
