"""Measure the speed and memory of forward passes, tuning, inversion and editing, relative to plain matrix products.

python -m benchmarks.speed                                              the embedded base model, on the CPU
python -m benchmarks.speed --config sd15 --frames 8 --size 256 --dtype bfloat16
python -m benchmarks.speed --config sd15 --device cuda --dtype bfloat16 --frames 24 --size 512 --compile
python -m benchmarks.speed --config sd15 --fit                          how the cost grows with frames, size and prompts
python -m benchmarks.speed --config sd15 --attention                    sparse and full attention, with a plot

Weights are random. The rate of matrix products is measured between the runs, so that other work on the machine affects both.
The memory is the peak of the process (on a GPU, of torch's allocator), including everything that is loaded. Where
benchmarks/README.md states a figure for the same setting, the benchmark exits with code 1 if it is missed.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tasks  # noqa: F401  (the settings of the allocator, before torch is imported)
from benchmarks.measures import ROOT, Measure, markdown, table
from tav_model.errors import TavError
from tav_model.files import read_json, write_json

if TYPE_CHECKING:
    import torch

    from tav_model import TuneAVideoPipeline, UNet3DConditionModel

VAE_FACTOR = 8  # pixels per latent, in all three configurations
DEFAULT_SIZES = {"sd15": 256, "sd21": 256, "toyworld": 128}
PARTS = ("forward", "tuning step", "inversion step", "edit step", "edit step, 4 prompts")
UNET_CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {"in_channels": 4, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {
        "in_channels": 4,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
}
TEXT_SHAPES = {"sd15": (77, 768), "sd21": (77, 1024), "toyworld": (32, 128)}
# The original code with torch 2.13 on two cores of an AMD EPYC, for SD 1.x and 8 frames of 32x32 latents: seconds, and the
# rate of matrix products (FLOP/s) at the same time, which relates these figures to those of another machine.
ORIGINAL_PROCESSOR = "EPYC"
ORIGINAL = {
    ("forward", "float32"): (11.7, 174e9),
    ("tuning step", "float32"): (28.6, 174e9),
    ("forward", "bfloat16"): (6.7, 365e9),
    ("tuning step", "bfloat16"): (15.4, 365e9),
}
# What benchmarks/README.md states for the same setting: the peak in GiB, by part, precision and checkpointing.
STATED_PEAKS = {
    ("forward", "float32", False): 4.4,
    ("tuning step", "float32", False): 6.4,
    ("forward", "bfloat16", False): 2.5,
    ("tuning step", "bfloat16", False): 5.1,
    ("tuning step", "bfloat16", True): 3.5,
}
PEAK_TOLERANCE = 1.05
# The cost of sparse attention grows about linearly with the frames: the exponent of a power law is near 1.
MOST_SPARSE_GROWTH = 1.3


@dataclass(frozen=True)
class Setting:
    """A model, its input and the device that it runs on."""

    config: str
    frames: int
    size: int
    device: str
    dtype: str
    compile: bool = False
    checkpointing: bool = False
    attention: tuple[str, ...] = ("first", "former")

    @property
    def is_stated(self) -> bool:
        """Return whether benchmarks/README.md has figures for the model, its input and the device."""
        return (self.config, self.frames, self.size, self.device) == ("sd15", 8, 256, "cpu") and not self.compile

    @property
    def latent_size(self) -> int:
        """Return the width and height of the latents."""
        return self.size // VAE_FACTOR


@dataclass(frozen=True)
class Timing:
    """The measurements of one part.

    Attributes:
        seconds: the median of several runs after a warm-up.
        flop: floating-point operations of a run.
        rate: of matrix products around the same runs, in FLOP/s.
        share: of that rate, reached by the part.
        peak_gib: peak memory.
    """

    part: str
    seconds: float
    fastest: float
    slowest: float
    flop: float
    rate: float
    share: float
    peak_gib: float

    @property
    def flop_rate(self) -> float:
        """Return the operations per second."""
        return self.flop / self.seconds


# What to measure


def unet_config(setting: Setting) -> dict[str, Any]:
    """Return the config of the inflated UNet, as far as it differs from the defaults."""
    from tav_model import UNet3DConditionModel
    from tav_model.networks.inflation import inflate_config

    if setting.config in UNET_CONFIGS:
        return UNET_CONFIGS[setting.config]
    embedded = ROOT / "toyworld" / "weights" / "unet" / "config.json"
    return inflate_config(UNet3DConditionModel, read_json(embedded))


def build_unet(setting: Setting, dtype: torch.dtype) -> UNet3DConditionModel:
    """Build the inflated UNet with random weights, directly on its device and in its precision."""
    import torch

    from tav_model import UNet3DConditionModel

    with torch.device("meta"):
        config = unet_config(setting) | {"attention": list(setting.attention)}
        unet = UNet3DConditionModel.from_config(config).to(dtype)
    unet.to_empty(device=setting.device)
    for name, parameter in unet.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        elif parameter.ndim == 1:
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.uniform_(parameter, -0.02, 0.02)
    return unet.eval()


def scheduler(config: dict[str, Any] | None = None) -> Any:
    """Return a DDIM scheduler, by default that of the embedded base model."""
    from diffusers import DDIMScheduler

    embedded = ROOT / "toyworld" / "weights" / "scheduler" / "scheduler_config.json"
    return DDIMScheduler.from_config(read_json(embedded) if config is None else config)


def make_part(part: str, setting: Setting, backend: str = "inductor") -> Callable[[], Any]:
    """Return a function that runs the part once, on a model that is ready; `backend` is that of `torch.compile`."""
    import torch

    from tav_model.tuning import Tuner, TuningConfig

    dtype = getattr(torch, setting.dtype)
    tuning = part == "tuning step"
    unet = build_unet(setting, dtype)  # The tuner converts the trained weights to float32.
    tokens, width = TEXT_SHAPES[setting.config]
    generator = torch.Generator().manual_seed(0)
    shape = (1, unet.config.in_channels, setting.frames, setting.latent_size, setting.latent_size)
    latents = torch.randn(shape, generator=generator).to(setting.device)
    text = torch.randn((1, tokens, width), generator=generator).to(setting.device)
    if tuning:
        config = TuningConfig(precision=setting.dtype, gradient_checkpointing=setting.checkpointing)
        tuner = Tuner(unet, scheduler(), config)
        if setting.compile:
            tuner.unet.compile(backend=backend)
        deviation = torch.full_like(latents, 0.1)
        return lambda: tuner.step(latents, deviation, text)
    if setting.compile:
        unet.compile(backend=backend)
    text = text.to(dtype)
    if part == "forward":
        sample = latents.to(dtype)
        return torch.no_grad()(lambda: unet(sample, 500, text).sample)
    if part == "inversion step":
        from tav_model import ddim_inversion

        return lambda: ddim_inversion(unet, scheduler(), latents, text, 1)
    prompts = 4 if part.endswith("4 prompts") else 1
    return make_edit(unet, latents, text.expand(prompts, -1, -1), setting.device, steps=1)


def embedded_pipeline(unet: UNet3DConditionModel, device: str, **parts: Any) -> TuneAVideoPipeline:
    """Return a pipeline without a progress bar: a UNet with the other parts of the embedded base model, or with `parts`."""
    from tav_model import TuneAVideoPipeline
    from tav_model.base_models import load_part

    base = str(ROOT / "toyworld" / "weights")
    for name in {"vae", "text_encoder", "tokenizer", "scheduler"} - parts.keys():
        parts[name] = load_part(base, name)
    pipeline = TuneAVideoPipeline(unet=unet, **parts).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_edit(
    unet: UNet3DConditionModel,
    latents: torch.Tensor,
    text: torch.Tensor,
    device: str,
    steps: int,
    negative: torch.Tensor | None = None,
    guidance_scale: float = 7.5,
    scheduler_config: dict[str, Any] | None = None,
) -> Callable[[], Any]:
    """Return the pipeline's sampling with guidance; the VAE and the text encoder are loaded but not used."""
    pipeline = embedded_pipeline(unet, device, scheduler=scheduler(scheduler_config))
    return lambda: pipeline(
        prompt_embeds=text,
        negative_prompt_embeds=text if negative is None else negative,
        latents=latents,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        output_type="latent",
    )


# How to measure it


def measure(part: str, setting: Setting, repeats: int) -> Timing:
    """Measure the part after a warm-up run (two if compiled), each run between two measurements of the matrix rate."""
    return measure_run(part, make_part(part, setting), setting, repeats, warm_ups=2 if setting.compile else 1)


def measure_run(
    part: str,
    run: Callable[[], Any],
    setting: Setting,
    repeats: int,
    warm_ups: int = 1,
    flop: float | None = None,
    matrix_side: int | None = None,
) -> Timing:
    """Measure a function, each run between two measurements of the matrix rate.

    Args:
        part: the name of the timing.
        run: what to measure.
        setting: the device that it runs on, and its precision.
        repeats: number of runs.
        warm_ups: number of runs before.
        flop: floating-point operations of a run; None: they are counted in one more run.
        matrix_side: see `matrix_rate`.
    """
    for _ in range(warm_ups):
        run()
    reset_peak(setting.device)
    seconds, rates = [], []
    rate = matrix_rate(setting.device, setting.dtype, matrix_side)
    for _ in range(repeats):
        taken = timed(run, setting.device)
        before, rate = rate, matrix_rate(setting.device, setting.dtype, matrix_side)
        seconds.append(taken)
        rates.append((before + rate) / 2)
    peak = peak_gib(setting.device)
    if flop is None:
        flop = count_flop(run)  # Last, because the counter itself holds memory.
    del run
    gc.collect()
    return Timing(
        part=part,
        seconds=statistics.median(seconds),
        fastest=min(seconds),
        slowest=max(seconds),
        flop=flop,
        rate=statistics.median(rates),
        share=statistics.median(flop / taken / rate for taken, rate in zip(seconds, rates, strict=True)),
        peak_gib=peak,
    )


def timed(run: Callable[[], Any], device: str) -> float:
    """Return the seconds of one run, including the work that it started on the device."""
    import torch

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def matrix_rate(device: str, dtype: str, side: int | None = None) -> float:
    """Return the FLOP/s of a product of two square matrices of size `side`, by default 4096 (on a GPU, 8192).

    The matrix is made anew each time. Otherwise it would be part of the peak memory.
    """
    import torch

    cuda = device.startswith("cuda")
    side, times = side or (8192 if cuda else 4096), 20 if cuda else 1
    matrix = torch.randn(side, side, device=device).to(getattr(torch, dtype))
    product = torch.empty_like(matrix)
    warm_up = side if cuda else side // 4
    torch.mm(matrix[:warm_up], matrix, out=product[:warm_up])
    return times * 2 * side**3 / timed(lambda: [torch.mm(matrix, matrix, out=product) for _ in range(times)], device)


def count_flop(run: Callable[[], Any]) -> float:
    """Count the floating-point operations of a run with `torch.utils.flop_counter`."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    # torch only counts the GPU variants of these.
    cpu_attention = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=cpu_attention) as counter:
        run()
    return float(counter.get_total_flops())


def reset_peak(device: str) -> None:
    """Start measuring the peak memory anew, where the system can."""
    import torch

    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib(device: str) -> float:
    """Return the peak since `reset_peak`, or since the process started where the system cannot reset it."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


# How to report it


def timing_table(timings: Sequence[Timing], setting: Setting) -> str:
    """Return the timings as a Markdown table."""
    rows = [["part", "seconds", "range", "TFLOP", "TFLOP/s", "share of matrix rate", "peak, GiB", "vs. original"]]
    for timing in timings:
        rows.append(
            [
                timing.part,
                f"{timing.seconds:.3g}",
                f"{timing.fastest:.3g} to {timing.slowest:.3g}",
                f"{timing.flop / 1e12:.3g}",
                f"{timing.flop_rate / 1e12:.3g}",
                f"{100 * timing.share:.0f} %",
                f"{timing.peak_gib:.2f}",
                f"{ratio:.2f}x" if (ratio := speedup(timing, setting)) else "",
            ]
        )
    return markdown(rows)


def speedup(timing: Timing, setting: Setting) -> float | None:
    """Return how many times faster than the original the part is, both in units of the machine's matrix products.

    None where the original was not measured.
    """
    original = ORIGINAL.get((timing.part, setting.dtype))
    if original is None or not setting.is_stated or setting.checkpointing:
        return None
    seconds, rate = original
    return seconds * rate / (timing.seconds * timing.rate)


def stated_figures(timings: Sequence[Timing], setting: Setting, processor: str) -> list[Measure]:
    """Compare the timings with the figures in benchmarks/README.md, where it has some for the setting.

    Speed is compared with the original's on the kind of processor that it was measured on: others differ in more than the
    rate of their matrix products.
    """
    measures = []
    for timing in timings if setting.is_stated else ():
        ratio = speedup(timing, setting)
        if ratio is not None and ORIGINAL_PROCESSOR in processor:
            measures.append(Measure(timing.part, "times as fast as the original", ratio, 1.0, percent=False))
        if stated := STATED_PEAKS.get((timing.part, setting.dtype, setting.checkpointing)):
            peak = Measure(
                timing.part, "peak, GiB", timing.peak_gib, PEAK_TOLERANCE * stated, at_most=True, percent=False
            )
            measures.append(peak)
    return measures


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Fit the power law y = a x^p by least squares on the logarithms, and return p."""
    return statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys]).slope


def fit(setting: Setting, repeats: int) -> list[dict[str, Any]]:
    """Measure how a forward pass grows with the frames and the size, and an edit with the prompts, one at a time."""
    import dataclasses

    growths = []
    sizes = [setting.size // 2, setting.size, 2 * setting.size]
    for name, values in (("frames", [4, 8, 16, 32]), ("size", sizes)):
        timings = [measure("forward", dataclasses.replace(setting, **{name: value}), repeats) for value in values]
        growths.append(_growth(name, values, timings))
    edits = [measure(part, setting, repeats) for part in PARTS[3:]]
    growths.append(_growth("prompts", [1, 4], edits))
    return growths


def _growth(name: str, values: Sequence[int], timings: Sequence[Timing]) -> dict[str, Any]:
    seconds = [timing.seconds for timing in timings]
    return {
        "of": name,
        "values": list(values),
        "seconds": seconds,
        "peak_gib": [timing.peak_gib for timing in timings],
        "exponent": exponent(values, seconds),
    }


def fit_table(growths: Sequence[dict[str, Any]]) -> str:
    """Return the growths as a Markdown table."""
    rows = [["varied", "seconds", "peak, GiB", "exponent"]]
    for growth in growths:
        pairs = zip(growth["values"], growth["seconds"], strict=True)
        rows.append(
            [
                growth["of"],
                ", ".join(f"{value}: {seconds:.3g}" for value, seconds in pairs),
                ", ".join(f"{peak:.2f}" for peak in growth["peak_gib"]),
                f"{growth['exponent']:.2f}",
            ]
        )
    return markdown(rows)


def compare_attention(setting: Setting, repeats: int, picture: Path) -> list[dict[str, Any]]:
    """Measure one attention layer at the largest size with 8, 16 and 32 frames: sparse, and attending to all frames."""
    import torch

    from tav_model.networks.attention import SparseCausalAttention

    channels, heads = (64, 2) if setting.config == "toyworld" else (320, 8 if setting.config == "sd15" else 5)
    results = []
    for names in (("first", "former"), ("all",)):
        layer = SparseCausalAttention(channels, names, heads=heads, dim_head=channels // heads)
        layer = layer.to(setting.device, getattr(torch, setting.dtype)).eval()
        seconds = {}
        for frames in (8, 16, 32):
            tokens = torch.randn(frames, setting.latent_size**2, channels).to(setting.device, layer.to_q.weight.dtype)
            run = torch.no_grad()(lambda layer=layer, tokens=tokens, frames=frames: layer(tokens, frames))
            run()
            seconds[frames] = statistics.median(timed(run, setting.device) for _ in range(repeats))
        growth = exponent(list(seconds), list(seconds.values()))
        results.append({"attention": list(names), "seconds": seconds, "exponent": growth})
    _draw_attention(results, setting, picture)
    return results


def _draw_attention(results: Sequence[dict[str, Any]], setting: Setting, picture: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for result, colour in zip(results, ("#0072b2", "#d55e00"), strict=True):
        frames, seconds = zip(*result["seconds"].items(), strict=True)
        label = f"{', '.join(result['attention'])}: exponent {result['exponent']:.2f}"
        axes.plot(frames, seconds, "o-", color=colour, label=label)
    axes.set(xlabel="frames", ylabel="seconds", xticks=(8, 16, 32), ylim=(0, None))
    axes.set_title(
        f"One attention layer, {setting.latent_size}x{setting.latent_size} positions, {setting.dtype}, {setting.device}"
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=140)


def machine() -> dict[str, Any]:
    """Describe the processor, the GPU and the versions."""
    import torch

    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


@contextmanager
def _no_warnings() -> Any:
    import warnings

    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; 0 if no stated figure is missed, 1 if one is, 2 after invalid arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__.partition("\n")[0],
        epilog="Exits with code 1 if a figure that benchmarks/README.md states for the same setting is missed.",
    )
    parser.add_argument(
        "--config", choices=sorted(TEXT_SHAPES), default="toyworld", help="model (default: %(default)s)"
    )
    parser.add_argument("--frames", type=int, default=8, metavar="N", help="frames (default: %(default)s)")
    parser.add_argument(
        "--size", type=int, metavar="N", help="width and height in pixels (default: 256; toyworld: 128)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="precision")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    parser.add_argument("--checkpointing", action="store_true", help="tune with gradient checkpointing")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"what to measure: {'; '.join(PARTS)}"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="runs of each part (default: %(default)s)")
    parser.add_argument("--fit", action="store_true", help="measure how the cost grows with frames, size and prompts")
    parser.add_argument("--attention", action="store_true", help="compare sparse and full attention, with a plot")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("results/benchmarks/speed"),
        metavar="DIR",
        help="folder for results (default: %(default)s)",
    )
    chosen = parser.parse_args(arguments)
    size = chosen.size or DEFAULT_SIZES[chosen.config]
    try:
        if chosen.frames < 1 or chosen.repeats < 1 or size < VAE_FACTOR or size % VAE_FACTOR:
            raise TavError(f"--frames and --repeats must be at least 1, and --size a multiple of {VAE_FACTOR}")
        from tav.runtime.devices import choose_device

        setting = Setting(
            config=chosen.config,
            frames=chosen.frames,
            size=size,
            device=choose_device(chosen.device),
            dtype=chosen.dtype,
            compile=chosen.compile,
            checkpointing=chosen.checkpointing,
        )
        with _no_warnings():
            stated = _measure_and_print(setting, chosen)
    except TavError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if stated:
        print(f"\n{table(stated)}")
    return 0 if all(measure.reached for measure in stated) else 1


def _measure_and_print(setting: Setting, chosen: argparse.Namespace) -> list[Measure]:
    """Measure what was chosen, print and write it, and return the comparison with the stated figures."""
    record: dict[str, Any] = {"machine": machine(), "setting": asdict(setting)}
    print(json.dumps(record["machine"] | record["setting"]))
    name = f"{setting.config}-{setting.frames}x{setting.size}-{setting.device}-{setting.dtype}"
    stated = []
    if chosen.fit:
        name = f"{name}-growth"
        record["growth"] = fit(setting, chosen.repeats)
        text = fit_table(record["growth"])
    elif chosen.attention:
        name = f"{name}-attention"
        record["attention"] = compare_attention(setting, chosen.repeats, chosen.out / f"{name}.png")
        text = attention_table(record["attention"])
        if setting.is_stated:
            growth = record["attention"][0]["exponent"]
            stated = [Measure("sparse attention", "exponent", growth, MOST_SPARSE_GROWTH, at_most=True, percent=False)]
    else:
        timings = []
        for part in chosen.parts:
            timings.append(measure(part, setting, chosen.repeats))
            print(f"{part}: {timings[-1].seconds:.3g} s", file=sys.stderr)
        record["timings"] = [asdict(timing) for timing in timings]
        text = timing_table(timings, setting)
        stated = stated_figures(timings, setting, _processor())
    print(text)
    chosen.out.mkdir(parents=True, exist_ok=True)
    write_json(chosen.out / f"{name}.json", record)
    print(f"{chosen.out / name}.json")
    return stated


def attention_table(results: Sequence[dict[str, Any]]) -> str:
    """Return the results of `compare_attention` as a Markdown table."""
    rows = [["attention", *(f"{frames} frames" for frames in results[0]["seconds"]), "exponent"]]
    for result in results:
        seconds = [f"{value:.3g} s" for value in result["seconds"].values()]
        rows.append([", ".join(result["attention"]), *seconds, f"{result['exponent']:.2f}"])
    return markdown(rows)


if __name__ == "__main__":
    sys.exit(main())
