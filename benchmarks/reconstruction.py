"""How well inversions lead back to the source, at several guidance scales: PSNR against the VAE's ceiling, and a plot.

An edit whose prompt is the clip's own caption should return the clip. Guidance steers away from that, except where the
negative prompt is the caption as well (negative-prompt inversion, arXiv 2305.16807).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.measures import Measure, markdown
from benchmarks.scenes import BenchmarkScene, SceneRuns
from benchmarks.statistics import Interval, mean_interval

if TYPE_CHECKING:
    import torch

    from tav_model import TuneAVideoPipeline

GUIDANCE_SCALES = (1.0, 3.5, 7.5, 12.5)
CEILING = "VAE"
TARGET = 0.9  # share of the ceiling that the best inversion reaches at every guidance scale


@dataclass(frozen=True)
class Inversion:
    """An inversion, and what sampling has to know of it.

    Attributes:
        caption: invert under the caption, and use it as the negative prompt, rather than the empty one.
        arguments: of `tav_model.ddim_inversion`.
    """

    caption: bool
    arguments: Mapping[str, Any]


FIXED_POINT = {"iterations": 5}
INVERSIONS = {
    "plain": Inversion(False, {}),
    "fixed point": Inversion(False, FIXED_POINT),
    "regularised": Inversion(False, {"regularization": 0.1}),
    "negative prompt": Inversion(True, {}),
    "fixed point, negative prompt": Inversion(True, FIXED_POINT),
}

Results = dict[str, dict[float, dict[str, list[float]]]]
"""PSNR in dB by inversion, guidance scale and scene; the ceiling's by the same keys."""


def measure(runs: SceneRuns, tuned_in: str) -> Results:
    """Return the PSNR of reconstructions of every scene, with the weights that another variant has tuned.

    Args:
        runs: the runs of the benchmark, in which `tuned_in` has run.
        tuned_in: the variant.
    """
    results: Results = {
        name: {scale: {scene.name: [] for scene in runs.scenes} for scale in GUIDANCE_SCALES}
        for name in (CEILING, *INVERSIONS)
    }
    for number in range(runs.seeds):
        for scene in runs.scenes:
            print(f"  reconstruction, seed-{number}: {scene.name}", file=sys.stderr, flush=True)
            for (name, scale), value in _scene(runs.project(tuned_in, number), scene).items():
                results[name][scale][scene.name].append(value)
    return results


def _scene(project: Path, scene: BenchmarkScene) -> dict[tuple[str, float], float]:
    from tav.config import load_params
    from tav.config.paths import Project, resolve_model
    from tav_model.base_models import load_pipeline
    from tav_model.metrics.preservation import psnr
    from tav_model.tensors import load_tensors

    all_params = load_params(project / "params.yaml")
    params, caption = all_params.for_clip(scene.name), all_params.clip(scene.name).caption
    paths = Project(project)
    frames = load_tensors(paths.frames(scene.name) / "frames.safetensors")[0]["frames"].numpy()
    latents = load_tensors(paths.latents(scene.name) / "latents.safetensors")[0]["mean"]
    pipeline = load_pipeline(
        resolve_model(project, params.base_model),
        paths.tuned(scene.name),
        params.attention.spatial,
        params.attention.temporal,
        "cpu",
        latents.dtype,
    )
    pipeline.set_progress_bar_config(disable=True)
    ceiling = psnr(_frames(pipeline.decode_latents(latents)[0]), frames)
    values = {(CEILING, scale): ceiling for scale in GUIDANCE_SCALES}
    for name, inversion in INVERSIONS.items():
        inverted = _invert(pipeline, latents, caption, inversion, params.invert.steps)
        for scale in GUIDANCE_SCALES:
            video = pipeline(
                caption,
                latents=inverted,
                num_inference_steps=params.invert.steps,
                num_inversion_steps=params.invert.steps,
                guidance_scale=scale,
                negative_prompt=caption if inversion.caption else "",
            ).frames[0]
            values[name, scale] = psnr(_frames(video), frames)
    return values


def _invert(
    pipeline: TuneAVideoPipeline, latents: torch.Tensor, caption: str, inversion: Inversion, num_steps: int
) -> torch.Tensor:
    """Return the inverted latents, `1 c f h w`."""
    from tav_model import ddim_inversion

    prompt = caption if inversion.caption else ""
    embeds, _ = pipeline.encode_prompt([prompt], do_classifier_free_guidance=False)
    return ddim_inversion(pipeline.unet, pipeline.scheduler, latents, embeds, num_steps, **inversion.arguments)[-1]


def _frames(video: np.ndarray) -> np.ndarray:
    """Return frames in [0, 1] in uint8."""
    return (video * 255).round().astype(np.uint8)


def reconstruction_table(results: Results) -> str:
    """Return the mean PSNR by inversion and guidance scale with intervals, as Markdown."""
    rows = [["reconstruction, PSNR in dB", *(f"guidance scale {scale:g}" for scale in GUIDANCE_SCALES)]]
    rows += [
        [name, *(mean_interval(scenes).text("{:.1f}") for scenes in by_scale.values())]
        for name, by_scale in results.items()
    ]
    return markdown(rows)


def targets(results: Results) -> list[Measure]:
    """Return the share of the ceiling that the best inversion reaches at the guidance scale where it reaches least."""

    def share(name: str) -> Interval:
        shares = (_shares(results[name][scale], results[CEILING][scale]) for scale in GUIDANCE_SCALES)
        return min((mean_interval(one) for one in shares), key=lambda interval: interval.mean)

    best = max((share(name) for name in INVERSIONS), key=lambda interval: interval.mean)
    name = "PSNR of the best inversion at any guidance scale, share of the VAE's"
    return [Measure("reconstruction", name, best.mean, TARGET, interval=(best.low, best.high))]


def _shares(values: Mapping[str, Sequence[float]], ceilings: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    return {
        scene: [value / ceiling for value, ceiling in zip(some, ceilings[scene], strict=True)]
        for scene, some in values.items()
    }


def plot(results: Results, path: Path) -> None:
    """Write a plot of PSNR against guidance scale, with intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, by_scale in results.items():
        intervals = [mean_interval(scenes) for scenes in by_scale.values()]
        style = {"color": "black", "linestyle": "--"} if name == CEILING else {"marker": "o"}
        (line,) = axes.plot(GUIDANCE_SCALES, [one.mean for one in intervals], label=name, **style)
        low, high = [one.low for one in intervals], [one.high for one in intervals]
        axes.fill_between(GUIDANCE_SCALES, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="guidance scale", ylabel="PSNR of the reconstruction, dB", xticks=GUIDANCE_SCALES, ylim=(0, None))
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=144)
