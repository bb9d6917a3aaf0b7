"""How fast and how lean: forward pass, tuning, inversion and edit steps, against the matrix products of the same machine.

python -m benchmarks.speed                                              the embedded base model, on the CPU
python -m benchmarks.speed --config sd15 --frames 8 --size 256 --dtype bfloat16
python -m benchmarks.speed --config sd15 --device cuda --dtype bfloat16 --frames 24 --size 512 --compile
python -m benchmarks.speed --config sd15 --fit                          how the cost grows with frames, size and prompts
python -m benchmarks.speed --config sd15 --attention                    sparse against full attention, with a picture

Weights are random. The rate of matrix products is measured between the runs, so that other work on the machine weighs on
both. The memory is the process's own peak (on a GPU: that of torch's allocator), everything that is loaded included.
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
from benchmarks.toyworld import ROOT, markdown
from tav_model.errors import TavError
from tav_model.files import read_json, write_json

if TYPE_CHECKING:
    import torch

    from tav_model import UNet3DConditionModel

FACTOR = 8  # of the VAE, in all three configurations
SIZES = {"sd15": 256, "sd21": 256, "toyworld": 128}
PARTS = ("forward", "tuning step", "inversion step", "edit step", "edit step, 4 prompts")
SD = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
}
TEXT = {"sd15": (77, 768), "sd21": (77, 1024), "toyworld": (32, 128)}
# The original code on two cores of an AMD EPYC: SD 1.x, 8 frames of 32x32 latents, with torch 2.13. Seconds, and the
# rate of matrix products in the same sitting, by which another machine's figures can be read against these.
ORIGINAL = {
    ("forward", "float32"): (11.7, 174e9),
    ("tuning step", "float32"): (28.6, 174e9),
    ("forward", "bfloat16"): (6.7, 365e9),
    ("tuning step", "bfloat16"): (15.4, 365e9),
}


@dataclass(frozen=True)
class Setting:
    """What is measured, and on what."""

    config: str
    frames: int
    size: int
    device: str
    dtype: str
    compile: bool = False
    checkpointing: bool = False
    attention: tuple[str, ...] = ("first", "former")

    @property
    def latent_size(self) -> int:
        return self.size // FACTOR


@dataclass(frozen=True)
class Timing:
    """Seconds of several runs after a warm-up; the share is of the matrix products' rate around the same runs."""

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
        return self.flop / self.seconds


# What is measured


def build_unet(setting: Setting, dtype: torch.dtype) -> UNet3DConditionModel:
    """The inflated UNet with random weights, made where it is used and never in another precision."""
    import torch

    from tav_model import UNet3DConditionModel
    from tav_model.networks.unet import inflate_config

    shape = SD.get(setting.config)
    if shape is None:
        shape = inflate_config(read_json(ROOT / "toyworld" / "weights" / "unet" / "config.json"))
    with torch.device("meta"):
        unet = UNet3DConditionModel.from_config({**shape, "attention": list(setting.attention)}).to(dtype)
    unet.to_empty(device=setting.device)
    for name, parameter in unet.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        elif parameter.ndim == 1:
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.uniform_(parameter, -0.02, 0.02)
    return unet.eval()


def scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(read_json(ROOT / "toyworld" / "weights" / "scheduler" / "scheduler_config.json"))


def make_part(part: str, setting: Setting) -> Callable[[], Any]:
    """A function that does the part once, on a model that is ready."""
    import torch

    from tav_model.tuning import Tuner, TuningConfig

    dtype = getattr(torch, setting.dtype)
    tuning = part == "tuning step"
    unet = build_unet(setting, dtype)  # What is trained, the tuner takes to float32.
    words, width = TEXT[setting.config]
    generator = torch.Generator().manual_seed(0)
    shape = (1, 4, setting.frames, setting.latent_size, setting.latent_size)
    latents = torch.randn(shape, generator=generator).to(setting.device)
    text = torch.randn((1, words, width), generator=generator).to(setting.device)
    if tuning:
        config = TuningConfig(precision=setting.dtype, gradient_checkpointing=setting.checkpointing)
        tuner = Tuner(unet, scheduler(), config)
        if setting.compile:
            tuner.unet.compile()
        deviation = torch.full_like(latents, 0.1)
        return lambda: tuner.step(latents, deviation, text)
    if setting.compile:
        unet.compile()
    text = text.to(dtype)
    if part == "forward":
        sample = latents.to(dtype)
        return torch.no_grad()(lambda: unet(sample, 500, text).sample)
    if part == "inversion step":
        from tav_model import ddim_inversion

        return lambda: ddim_inversion(unet, scheduler(), latents, text, 1)
    prompts = 4 if part.endswith("4 prompts") else 1
    return _edit_step(unet, latents, text.expand(prompts, -1, -1), setting.device)


def _edit_step(unet: UNet3DConditionModel, latents: torch.Tensor, text: torch.Tensor, device: str) -> Callable[[], Any]:
    """One step of the pipeline's sampling with guidance; the embedded VAE and text encoder stand by, and do nothing."""
    from tav_model import TuneAVideoPipeline
    from tav_model.base_models import load_part

    base = str(ROOT / "toyworld" / "weights")
    pipeline = TuneAVideoPipeline(
        vae=load_part(base, "vae").to(device),
        text_encoder=load_part(base, "text_encoder").to(device),
        tokenizer=load_part(base, "tokenizer"),
        unet=unet,
        scheduler=scheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return lambda: pipeline(
        prompt_embeds=text,
        negative_prompt_embeds=text,
        latents=latents,
        num_inference_steps=1,
        guidance_scale=7.5,
        output_type="latent",
    )


# How it is measured


def measure(part: str, setting: Setting, repeats: int) -> Timing:
    """The part after one run of warm-up (two where it is compiled), each run between two measurements of the rate."""
    run = make_part(part, setting)
    for _ in range(2 if setting.compile else 1):
        run()
    reset_peak(setting.device)
    seconds, rates = [], []
    rate = matrix_rate(setting.device, setting.dtype)
    for _ in range(repeats):
        taken = timed(run, setting.device)
        before, rate = rate, matrix_rate(setting.device, setting.dtype)
        seconds.append(taken)
        rates.append((before + rate) / 2)
    peak = peak_gib(setting.device)
    flop = count_flop(run)  # Last, for the counter itself holds memory.
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
    """Seconds of one run, to the end of what it started on the device."""
    import torch

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


_matrices: dict[tuple[str, str], torch.Tensor] = {}


def matrix_rate(device: str, dtype: str) -> float:
    """FLOP/s of a product of two matrices, 4096 (on a GPU 8192) a side."""
    import torch

    cuda = device.startswith("cuda")
    side = 8192 if cuda else 4096
    if (device, dtype) not in _matrices:
        matrix = torch.randn(side, side).to(device, getattr(torch, dtype))
        _matrices[device, dtype] = matrix
        timed(lambda: matrix @ matrix, device)
    matrix = _matrices[device, dtype]
    times = 20 if cuda else 1
    return times * 2 * side**3 / timed(lambda: [matrix @ matrix for _ in range(times)], device)


def count_flop(run: Callable[[], Any]) -> float:
    """The floating-point operations of a run, by `torch.utils.flop_counter`."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    # Torch counts these of a GPU only.
    ours = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=ours) as counter:
        run()
    return float(counter.get_total_flops())


def reset_peak(device: str) -> None:
    import torch

    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib(device: str) -> float:
    """Since `reset_peak`; where the system cannot reset it, since the process began."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


# What is shown


def timing_table(timings: Sequence[Timing], setting: Setting) -> str:
    rows = [
        ["part", "seconds", "spread", "TFLOP", "TFLOP/s", "of the matrix rate", "peak, GiB", "faster than the original"]
    ]
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
                f"{speedup:.2f}x" if (speedup := _speedup(timing, setting)) else "",
            ]
        )
    return markdown(rows)


def _speedup(timing: Timing, setting: Setting) -> float | None:
    """Against the original on this shape, both in units of the machine's matrix products."""
    known = ORIGINAL.get((timing.part, setting.dtype))
    if known is None or (setting.config, setting.frames, setting.size, setting.device) != ("sd15", 8, 256, "cpu"):
        return None
    seconds, rate = known
    return seconds * rate / (timing.seconds * timing.rate)


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """P of the power law y = a x^p, by least squares on the logarithms."""
    lx, ly = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mx, my = statistics.fmean(lx), statistics.fmean(ly)
    return sum((x - mx) * (y - my) for x, y in zip(lx, ly, strict=True)) / sum((x - mx) ** 2 for x in lx)


def fit(setting: Setting, repeats: int) -> list[dict[str, Any]]:
    """How the forward pass grows with the frames and the size, and an edit with the prompts, one at a time."""
    import dataclasses

    found = []
    sizes = [setting.size // 2, setting.size, 2 * setting.size]
    for name, values in (("frames", [4, 8, 16, 32]), ("size", sizes)):
        timings = [measure("forward", dataclasses.replace(setting, **{name: value}), repeats) for value in values]
        found.append(_growth(name, values, timings))
    edits = [measure(part, setting, repeats) for part in PARTS[3:]]
    found.append(_growth("prompts", [1, 4], edits))
    return found


def _growth(name: str, values: Sequence[int], timings: Sequence[Timing]) -> dict[str, Any]:
    seconds = [timing.seconds for timing in timings]
    return {
        "of": name,
        "values": list(values),
        "seconds": seconds,
        "peak_gib": [timing.peak_gib for timing in timings],
        "exponent": exponent(values, seconds),
    }


def fit_table(found: Sequence[dict[str, Any]]) -> str:
    rows = [["with", "seconds", "peak, GiB", "grows with the power"]]
    for one in found:
        pairs = zip(one["values"], one["seconds"], strict=True)
        rows.append(
            [
                one["of"],
                ", ".join(f"{value}: {seconds:.3g}" for value, seconds in pairs),
                ", ".join(f"{peak:.2f}" for peak in one["peak_gib"]),
                f"{one['exponent']:.2f}",
            ]
        )
    return markdown(rows)


def compare_attention(setting: Setting, repeats: int, picture: Path) -> list[dict[str, Any]]:
    """One layer of attention at the largest size: Tune-A-Video's frames against all, at 8, 16 and 32 frames."""
    import torch

    from tav_model.networks.attention import SparseCausalAttention

    channels, heads = (64, 2) if setting.config == "toyworld" else (320, 8 if setting.config == "sd15" else 5)
    found = []
    for names in (("first", "former"), ("all",)):
        layer = SparseCausalAttention(channels, names, heads=heads, dim_head=channels // heads)
        layer = layer.to(setting.device, getattr(torch, setting.dtype)).eval()
        seconds = {}
        for frames in (8, 16, 32):
            tokens = torch.randn(frames, setting.latent_size**2, channels).to(setting.device, layer.to_q.weight.dtype)
            run = torch.no_grad()(lambda layer=layer, tokens=tokens, frames=frames: layer(tokens, frames))
            run()
            seconds[frames] = statistics.median(timed(run, setting.device) for _ in range(repeats))
        found.append({"attention": list(names), "seconds": seconds, "exponent": exponent(*zip(*seconds.items()))})  # noqa: B905
    _draw_attention(found, setting, picture)
    return found


def _draw_attention(found: Sequence[dict[str, Any]], setting: Setting, picture: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for one, colour in zip(found, ("#0072b2", "#d55e00"), strict=True):
        frames, seconds = zip(*one["seconds"].items(), strict=True)
        label = f"{', '.join(one['attention'])}: grows with the power {one['exponent']:.2f}"
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.partition("\n")[0])
    parser.add_argument("--config", choices=sorted(TEXT), default="toyworld")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, help="pixels a side (default: 256, toyworld 128)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--checkpointing", action="store_true", help="tune with gradient checkpointing")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--fit", action="store_true", help="how the cost grows with frames, size and prompts")
    parser.add_argument("--attention", action="store_true", help="sparse against full attention, with a picture")
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks/speed"), metavar="DIR")
    chosen = parser.parse_args(arguments)
    size = chosen.size or SIZES[chosen.config]
    try:
        if chosen.frames < 1 or chosen.repeats < 1 or size < FACTOR or size % FACTOR:
            raise TavError(f"--frames and --repeats must be at least 1, and --size a multiple of {FACTOR}")
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
            _measure_and_show(setting, chosen)
    except TavError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _measure_and_show(setting: Setting, chosen: argparse.Namespace) -> None:
    record: dict[str, Any] = {"machine": machine(), "setting": asdict(setting)}
    print(json.dumps(record["machine"] | record["setting"]))
    name = f"{setting.config}-{setting.frames}x{setting.size}-{setting.device}-{setting.dtype}"
    if chosen.fit:
        record["growth"] = fit(setting, chosen.repeats)
        text, name = fit_table(record["growth"]), f"{name}-growth"
    elif chosen.attention:
        name = f"{name}-attention"
        record["attention"] = compare_attention(setting, chosen.repeats, chosen.out / f"{name}.png")
        rows = [["attention", "8 frames", "16 frames", "32 frames", "grows with the power"]]
        for one in record["attention"]:
            seconds = [f"{value:.3g} s" for value in one["seconds"].values()]
            rows.append([", ".join(one["attention"]), *seconds, f"{one['exponent']:.2f}"])
        text = markdown(rows)
    else:
        timings = []
        for part in chosen.parts:
            timings.append(measure(part, setting, chosen.repeats))
            print(f"{part}: {timings[-1].seconds:.3g} s", file=sys.stderr)
        record["timings"] = [asdict(timing) for timing in timings]
        text = timing_table(timings, setting)
    print(text)
    chosen.out.mkdir(parents=True, exist_ok=True)
    write_json(chosen.out / f"{name}.json", record)
    print(f"{chosen.out / name}.json")


if __name__ == "__main__":
    sys.exit(main())
