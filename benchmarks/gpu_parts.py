"""The parts of `python -m benchmarks.gpu`. Each runs in a process of its own, and records figures as it goes along."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measures import ROOT, Measure
from benchmarks.speed import (
    TEXT_SHAPES,
    Setting,
    Timing,
    build_unet,
    count_flop,
    embedded_pipeline,
    machine,
    make_edit,
    make_part,
    matrix_rate,
    measure_run,
    peak_gib,
    reset_peak,
    timed,
    unet_config,
)
from tav.runtime.devices import deterministic_gradients
from tav_model.errors import first_line
from tav_model.files import read_json

if TYPE_CHECKING:
    import torch

    from tav_model import UNet3DConditionModel

# The GPUs that the goals of speed were set for.
MEASURED_GPUS = ("H100", "H200")
FORWARD_SHARE = 0.5
TUNING_STEPS, TUNING_SECONDS = 500, 60.0
EDIT_STEPS, EDIT_SECONDS = 50, 6.0

# The largest relative errors that count as parity, by precision: ||a - b|| / ||b||, and |a - b| / |b| of losses. Those of
# float32 are the ones of tests/golden/README.md; a GPU adds in another order than a CPU. Half precision rounds each
# activation to 8 (bfloat16) or 11 (float16) bits.
PARITY_LIMITS = {
    "float32": {"forward": 1e-4, "inversion": 1e-4, "edit": 1e-4, "losses": 1e-5, "gradients": 1e-3, "tuned": 1e-3},
    "bfloat16": {"forward": 3e-2, "inversion": 3e-2, "edit": 6e-2, "losses": 2e-3, "gradients": 5e-2, "tuned": 1e-2},
    "float16": {"forward": 5e-3, "inversion": 5e-3, "edit": 1e-2, "losses": 5e-4, "gradients": 1e-2, "tuned": 5e-3},
}
# Arguments of an edit as params.yaml and its presets have them, by category of the edit. The pipeline's own function for them,
# `tasks.source_settings.source_arguments`, needs packages that a GPU machine may lack; a test compares both.
GUIDANCE_SCALE, SAMPLING_STEPS, INVERSION_STEPS = 3.5, 12, 20
DIFFERENCE_MASK = {"mask": "difference", "difference_threshold": 0.05}
MOMENTS = {"mean_match": 1.0, "deviation_match": 0.25}
DEFAULT_ARGUMENTS: dict[str, dict[str, Any]] = {
    "colour": {
        "cross_attention_kwargs": {
            "edit_type": "auto",
            "n_cross_replace": 0.7,
            "n_self_replace": 0.7,
            "self_replace_layers": "all",
        },
        **DIFFERENCE_MASK,
        "strength": 0.8,
        "guidance_end": 0.6,
    },
    "style": {
        "cross_attention_kwargs": {"edit_type": "auto", "n_cross_replace": 0.2},
        "source_negative": 0.4,
        "attention_propagation": 1.0,
        "strength": 0.9,
    },
    "object": {
        "cross_attention_kwargs": {"edit_type": "auto", "n_cross_replace": 0.2},
        **DIFFERENCE_MASK,
        **MOMENTS,
        "source_negative": 0.8,
        "source_negative_weight": 0.5,
        "attention_propagation": 1.0,
        "feature_propagation": 0.4,
        "strength": 0.8,
        "fresh_noise": 0.5,
        "guidance_end": 0.7,
    },
    "background": {
        **DIFFERENCE_MASK,
        **MOMENTS,
        "source_negative": 0.7,
        "source_negative_weight": 0.5,
        "attention_propagation": 1.0,
    },
    "multiple": {
        **MOMENTS,
        "source_negative": 0.7,
        "source_negative_weight": 0.5,
        "attention_propagation": 1.0,
        "feature_propagation": 0.5,
    },
}

# Side of the matrices that small computations are compared with.
SMALL_MATRIX = 256
# Of another execution of the same operations in half precision.
SAME_COMPUTATION = 2e-2


@dataclass(frozen=True)
class Run:
    """One run of a part.

    Attributes:
        setting: the model, its input, the device and the precision.
        golden: folder of the golden tensors.
        full: measure at full size: repeated runs, complete edits, and the embedded model's complete tuning.
        record: file that figures are appended to, as lines of JSON.
    """

    setting: Setting
    golden: Path
    full: bool
    record: Path

    @property
    def repeats(self) -> int:
        """Return how often a computation is timed."""
        return 5 if self.full else 1

    def measure(self, part: str, call: Callable[[], Any], warm_ups: int = 1, flop: float | None = None) -> Timing:
        """Measure a computation of the setting's device and precision."""
        side = None if self.full else SMALL_MATRIX
        return measure_run(part, call, self.setting, self.repeats, warm_ups, flop, side)

    @property
    def is_cuda(self) -> bool:
        """Return whether the device is a GPU of Nvidia (or, by ROCm, of AMD)."""
        return self.setting.device.startswith("cuda")

    def write(self, value: dict[str, Any]) -> None:
        """Append a line to the record. What was written stays, however the process ends."""
        with self.record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(value) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def figure(
        self,
        part: str,
        name: str,
        value: float,
        target: float | None = None,
        at_most: bool = False,
        percent: bool = False,
    ) -> None:
        """Record a figure."""
        measure = Measure(part, name, value, target, at_most, percent)
        self.write({"measure": dataclasses.asdict(measure) | {"value": value if math.isfinite(value) else None}})

    def timing(self, timing: Timing, share_target: float | None = None) -> None:
        """Record the seconds, the share of the matrix rate and the memory of a timing."""
        self.write({"timing": dataclasses.asdict(timing)})
        self.figure(timing.part, "seconds", timing.seconds)
        self.figure(timing.part, "share of matrix rate", timing.share, share_target, percent=True)
        self.figure(timing.part, "peak, GiB", timing.peak_gib)

    def goal(self, value: float) -> float | None:
        """Return a goal of speed where it applies: on the GPUs and at the size that it was set for."""
        if not (self.full and self.is_cuda):
            return None
        import torch

        setting = self.setting
        fits = (setting.config, setting.frames, setting.size, setting.dtype) == ("sd15", 24, 512, "bfloat16")
        name = torch.cuda.get_device_name(setting.device)
        return value if fits and any(known in name for known in MEASURED_GPUS) else None


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return `||a - b|| / ||b||`; infinity where `a` has a value that is NaN or infinite."""
    ours, theirs = ours.detach().float().cpu(), theirs.detach().float().cpu()
    error = ((ours - theirs).norm() / theirs.norm()).item()
    return error if math.isfinite(error) else math.inf


# Parity


def parity(run: Run) -> None:
    """Compare with what the original Tune-A-Video computed, in three precisions."""
    import torch

    # By default, convolutions on a GPU round their factors to 10 bits (TF32), which is not what float32 means here.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    for precision, limits in PARITY_LIMITS.items():
        for name, error in parity_errors(run.golden, run.setting.device, precision).items():
            run.figure(f"parity, {precision}", name, error, limits[name], at_most=True)
    if run.is_cuda:
        torch.backends.cudnn.allow_tf32 = True
        for name, error in parity_errors(run.golden, run.setting.device, "float32").items():
            run.figure("parity, float32 with TF32 convolutions", name, error)


def parity_errors(folder: Path, device: str, precision: str) -> dict[str, float]:
    """Return the relative errors of a forward pass, an inversion, an edit and four steps of tuning.

    Of several tensors, the largest error counts; of gradients and tuned weights, that of all of them together: single
    tensors may be almost zero.
    """
    import torch
    from diffusers import DDIMScheduler, DDPMScheduler
    from safetensors.torch import load_file

    from tav_model import Tuner, TuningConfig, ddim_inversion

    golden = {name: tensor.to(device) for name, tensor in load_file(folder / "tensors.safetensors").items()}
    config = read_json(folder / "scheduler_config.json")
    dtype = getattr(torch, precision)
    unet = _golden_unet(folder).to(device, dtype).eval()

    with torch.no_grad():
        output = unet(
            golden["forward.sample"].to(dtype), golden["forward.timestep"], golden["forward.context"].to(dtype)
        ).sample
    errors = {"forward": relative(output, golden["forward.output"])}

    inverted = ddim_inversion(unet, DDIMScheduler.from_config(config), golden["x0"], golden["uncond"], num_steps=6)
    pairs = zip(inverted, golden["inversion.trajectory"], strict=True)
    errors["inversion"] = max(relative(ours, theirs) for ours, theirs in pairs)

    edit = make_edit(
        unet,
        golden["inversion.trajectory"][-1],
        golden["cond"],
        device,
        steps=6,
        negative=golden["uncond"],
        guidance_scale=float(golden["edit.guidance_scale"]),
        scheduler_config=config,
    )
    errors["edit"] = relative(edit().frames, golden["edit.trajectory"][-1])

    tuning = TuningConfig(steps=4, learning_rate=1e-3, precision=precision)
    tuner = Tuner(_golden_unet(folder).to(device), DDPMScheduler.from_config(config), tuning)
    losses, gradients = [], {}
    for noise, timestep in zip(golden["tune.noise"], golden["tune.timesteps"], strict=True):
        losses.append(tuner.backward(golden["x0"], noise, timestep[None], golden["cond"]))
        scale = tuner.scaler.get_scale() if tuner.scaler.is_enabled() else 1.0
        gradients = gradients or {name: value.grad / scale for name, value in tuner.parameters.items()}
        tuner.update(losses[-1], float(timestep))
    pairs = zip(losses, golden["tune.losses"].tolist(), strict=True)
    errors["losses"] = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
    for name, prefix, ours in (("gradients", "grad.", gradients), ("tuned", "after.", tuner.parameters)):
        theirs = {
            key.removeprefix(prefix): value
            for key, value in load_file(folder / "tune.safetensors").items()
            if key.startswith(prefix)
        }
        errors[name] = relative(_joined(ours, theirs), _joined(theirs, theirs))
    return errors


def _joined(tensors: dict[str, Any], names: dict[str, Any]) -> torch.Tensor:
    import torch

    return torch.cat([tensors[name].detach().float().cpu().flatten() for name in names])


def _golden_unet(folder: Path) -> UNet3DConditionModel:
    from safetensors.torch import load_file

    from tav_model import UNet3DConditionModel

    unet = UNet3DConditionModel.from_pretrained_2d(folder)
    unet.load_state_dict(load_file(folder / "temporal.safetensors"), strict=False)
    return unet


# Speed and memory


def inputs(setting: Setting, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random latents `1 c f h w` in float32, and text embeddings `1 n d` in the given precision."""
    import torch

    shape = (1, unet_config(setting)["in_channels"], setting.frames, setting.latent_size, setting.latent_size)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(shape, generator=generator).to(setting.device)
    text = torch.randn((1, *TEXT_SHAPES[setting.config]), generator=generator).to(setting.device, dtype)
    return latents, text


def guided_inputs(latents: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the inputs of a forward pass of two videos, as guidance needs it: the sample, the timestep and the texts."""
    import torch

    sample = latents.to(text.dtype).expand(2, -1, -1, -1, -1).clone()
    return sample, torch.tensor(500, device=latents.device), text.expand(2, -1, -1).clone()


def random_unet(setting: Setting) -> tuple[UNet3DConditionModel, torch.dtype]:
    """Return the UNet with random weights, and its precision."""
    import torch

    dtype = getattr(torch, setting.dtype)
    return build_unet(setting, dtype), dtype


def rates(run: Run) -> None:
    """Measure what the device can do: the rate of matrix products in each precision, and that of copies."""
    import torch

    device, side = run.setting.device, None if run.full else SMALL_MATRIX
    for precision in ("bfloat16", "float16", "float32") if run.is_cuda else (run.setting.dtype,):
        rate = statistics.median(matrix_rate(device, precision, side) for _ in range(run.repeats))
        run.figure("device", f"matrix products in {precision}, TFLOP/s", rate / 1e12)
    source = torch.empty(2**31 if run.is_cuda else 2**24, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = min(timed(lambda: target.copy_(source), device) for _ in range(5))
    run.figure("device", "copies, bytes read and written, TB/s", 2 * source.numel() / seconds / 1e12)


def forward(run: Run) -> None:
    """Measure a forward pass: as the pipeline runs it, and under other settings of torch."""
    import torch

    setting = run.setting
    unet, dtype = random_unet(setting)
    latents, text = inputs(setting, dtype)
    sample, timestep = latents.to(dtype), torch.tensor(500, device=setting.device)
    call = torch.no_grad()(lambda: unet(sample, timestep, text).sample)
    timing = run.measure("forward", call)
    run.timing(timing, run.goal(FORWARD_SHARE))
    if run.is_cuda:
        mode = torch.get_deterministic_debug_mode()
        torch.set_deterministic_debug_mode("default")
        run.timing(run.measure("forward, not deterministic", call, flop=timing.flop))
        torch.backends.cudnn.benchmark = True
        run.timing(run.measure("forward, cuDNN's fastest", call, 3, flop=timing.flop))
        torch.backends.cudnn.benchmark = False
        torch.set_deterministic_debug_mode(mode)
    unet.to(memory_format=torch.channels_last)
    run.timing(run.measure("forward, channels last", call, flop=timing.flop))


def edits(run: Run) -> None:
    """Measure edits of one, two and four prompts: sampling with guidance, without the VAE."""
    setting = run.setting
    unet, dtype = random_unet(setting)
    latents, text = inputs(setting, dtype)
    for prompts in (1, 2, 4):
        # A complete edit of one prompt; the others take long, and their steps are all alike.
        steps = (EDIT_STEPS if prompts == 1 else 10) if run.full else 2
        edit = make_edit(unet, latents, text.expand(prompts, -1, -1), setting.device, steps)
        if prompts > 1 or not run.full:
            edit()
        else:
            make_edit(unet, latents, text, setting.device, steps=2)()
        reset_peak(setting.device)
        seconds = timed(edit, setting.device) * EDIT_STEPS / steps
        name = f"edit, {prompts} prompt{'s' if prompts > 1 else ''}"
        goal = run.goal(EDIT_SECONDS) if prompts == 1 else None
        run.figure(name, f"seconds for {EDIT_STEPS} steps", seconds, goal, at_most=True)
        run.figure(name, "peak, GiB", peak_gib(setting.device))


def default_edits(run: Run) -> None:
    """Measure edits with the sampler and the presets of params.yaml: one of each category."""
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    from tav_model.base_models import load_part
    from toyworld import WEIGHTS

    setting = run.setting
    unet, dtype = random_unet(setting)
    latents, _ = inputs(setting, dtype)
    tokenizer = load_part(str(WEIGHTS), "tokenizer")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=TEXT_SHAPES[setting.config][1], **ends)
    text_encoder = CLIPTextModel(config).to(dtype)  # As wide as the UNet expects.
    pipe = embedded_pipeline(unet, setting.device, text_encoder=text_encoder, tokenizer=tokenizer)
    trajectory = torch.randn(INVERSION_STEPS + 1, *latents.shape, generator=torch.Generator().manual_seed(1))
    steps = SAMPLING_STEPS if run.full else 2
    for category, arguments in DEFAULT_ARGUMENTS.items():

        def edit(steps: int = steps, arguments: dict[str, Any] = arguments) -> None:
            pipe(
                "a blue ball on the sand",
                source_prompt="a red ball on the grass",
                trajectory=trajectory,
                num_inference_steps=steps,
                guidance_scale=GUIDANCE_SCALE,
                sampler="dpm-solver++",
                output_type="latent",
                **arguments,
            )

        edit(steps=2)
        reset_peak(setting.device)
        name = f"edit by default, {category}"
        run.figure(name, f"seconds for {steps} steps", timed(edit, setting.device))
        run.figure(name, "peak, GiB", peak_gib(setting.device))


def tuning(run: Run) -> None:
    """Measure a tuning step, without and with gradient checkpointing, and on a GPU with other bits in every run."""
    variants = {"": (False, True), ", checkpointed": (True, True)}
    if run.is_cuda:
        variants[", not deterministic"] = (False, False)
    for suffix, (checkpointing, deterministic) in variants.items():
        setting = dataclasses.replace(run.setting, checkpointing=checkpointing)
        name = f"tuning step{suffix}"
        with deterministic_gradients(setting.device) if deterministic else contextlib.nullcontext():
            timing = run.measure(name, make_part("tuning step", setting))
        run.timing(timing)
        goal = None if suffix else run.goal(TUNING_SECONDS)
        run.figure(name, f"seconds for {TUNING_STEPS} steps", TUNING_STEPS * timing.seconds, goal, at_most=True)


def cuda_graph(run: Run) -> None:
    """Measure a forward pass and an edit whose forward passes replay a CUDA graph."""
    import torch

    from tav_model.networks.unet import UNet3DConditionOutput

    setting = run.setting
    unet, dtype = random_unet(setting)
    latents, text = inputs(setting, dtype)
    pair, timestep, texts = guided_inputs(latents, text)
    eager = torch.no_grad()(lambda: unet(pair, timestep, texts).sample)
    expected = eager()
    flop = count_flop(eager)
    timing = run.measure("forward of 2 videos", eager, flop=flop)
    run.timing(timing)
    if not run.is_cuda:
        return
    replay, output = captured(eager)
    replay()
    run.figure("CUDA graph", "difference from eager", relative(output, expected), SAME_COMPUTATION, at_most=True)
    run.timing(run.measure("forward of 2 videos, CUDA graph", replay, flop=flop))

    forward_as_it_is = unet.forward

    def replayed(sample: torch.Tensor, step: Any, text: torch.Tensor, **others: Any) -> UNet3DConditionOutput:
        if sample.shape != pair.shape or others:  # A step of another kind than the graph's.
            return forward_as_it_is(sample, step, text, **others)
        pair.copy_(sample)
        timestep.copy_(torch.as_tensor(step))
        texts.copy_(text)
        replay()
        return UNet3DConditionOutput(sample=output.clone())

    edit = make_edit(unet, latents, text, setting.device, EDIT_STEPS if run.full else 2)
    unet.forward = replayed  # type: ignore[method-assign]
    seconds = timed(edit, setting.device)
    run.figure("edit, 1 prompt, CUDA graph", f"seconds for {EDIT_STEPS} steps", seconds)


def captured(function: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """Return a function that replays the CUDA graph of `function`, and the tensor that it writes to."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()
    return graph.replay, output


def compiled_forward(run: Run) -> None:
    """Measure a forward pass of two videos, as guidance needs it, and an edit, under `torch.compile`."""
    import torch

    setting, name = run.setting, "forward of 2 videos, compiled"
    unet, dtype = random_unet(setting)
    latents, text = inputs(setting, dtype)
    pair, timestep, texts = guided_inputs(latents, text)
    call = torch.no_grad()(lambda: unet(pair, timestep, texts).sample)
    expected = call()
    flop = count_flop(call)
    unet.compile(backend="inductor" if run.full else "eager")
    seconds = timed(call, setting.device)
    run.figure(name, "seconds to compile", seconds)
    run.figure(name, "difference from eager", relative(call(), expected), SAME_COMPUTATION, at_most=True)
    run.timing(run.measure(name, call, flop=flop), run.goal(FORWARD_SHARE))
    steps = EDIT_STEPS if run.full else 2
    edit = make_edit(unet, latents, text, setting.device, steps)
    make_edit(unet, latents, text, setting.device, steps=2)()
    seconds = timed(edit, setting.device) * EDIT_STEPS / steps
    run.figure(
        "edit, 1 prompt, compiled", f"seconds for {EDIT_STEPS} steps", seconds, run.goal(EDIT_SECONDS), at_most=True
    )


def compiled_tuning(run: Run) -> None:
    """Measure a tuning step under `torch.compile`."""
    setting = run.setting
    step = make_part("tuning step", setting)
    step()
    flop = count_flop(step)
    del step
    backend = "inductor" if run.full else "eager"
    with deterministic_gradients(setting.device):
        step = make_part("tuning step", dataclasses.replace(setting, compile=True), backend)
        seconds = timed(step, setting.device)
        run.figure("tuning step, compiled", "seconds to compile", seconds)
        run.timing(run.measure("tuning step, compiled", step, flop=flop))


# The embedded model, from a rendered clip to scored edits


def embedded_model(run: Run) -> None:
    """Tune the embedded model on a sample clip, invert the clip and render its edits, and score them against the truth."""
    import torch

    from tav_model import (
        Tuner,
        TuningConfig,
        UNet3DConditionModel,
        ddim_inversion,
        encode_frames,
        encode_prompts,
    )
    from tav_model.latents import to_frames
    from tav_model.metrics.clip import ClipScorer
    from toyworld import WEIGHTS
    from toyworld.captions import caption
    from toyworld.judge import Judge
    from toyworld.renderer import render_clip, times
    from toyworld.scenes import load_truth

    device, part = run.setting.device, "toyworld"
    num_frames, tuning_steps = (8, 40) if run.full else (2, 2)
    inversion_steps, sampling_steps = (INVERSION_STEPS, SAMPLING_STEPS) if run.full else (2, 2)
    truth = load_truth(ROOT / "data" / "scenes" / "ball.json")
    edits = truth.edits if run.full else dict(list(truth.edits.items())[:1])
    frames = render_clip(truth.scene, num_frames)
    torch.manual_seed(33)  # For the first weights of the temporal attention.
    unet = UNet3DConditionModel.from_pretrained_2d(str(WEIGHTS)).to(device)
    pipe = embedded_pipeline(unet, device)
    started = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal started
        if run.is_cuda:
            torch.cuda.synchronize(device)
        run.figure(part, f"{name}, seconds", time.perf_counter() - started)
        started = time.perf_counter()

    mean, deviation = encode_frames(pipe.vae, frames)
    text, empty = encode_prompts(pipe.tokenizer, pipe.text_encoder, [caption(truth.scene), ""]).split(1)
    lap("encode")
    config = TuningConfig(
        steps=tuning_steps,
        learning_rate=6e-3,
        learning_rate_schedule="cosine",
        optimizer="muon",
        timestep_sampling="stratified",
    )
    history = Tuner(unet, pipe.scheduler, config).fit(mean, deviation, text)
    lap(f"tune, {tuning_steps} steps")
    last = [record.loss for record in history[-20:]]
    run.figure(part, "loss, mean of the last 20 steps", sum(last) / len(last))
    trajectory = ddim_inversion(unet, pipe.scheduler, mean, empty, num_steps=inversion_steps)
    lap(f"invert, {inversion_steps} steps")
    videos = {
        name: to_frames(
            pipe(
                prompt=caption(edited),
                source_prompt=caption(truth.scene),
                trajectory=trajectory,
                num_inference_steps=sampling_steps,
                guidance_scale=GUIDANCE_SCALE,
                sampler="dpm-solver++",
                output_type="pt",
                **_with_video(DEFAULT_ARGUMENTS[truth.category(name)], frames),
            ).frames[0]
        )
        for name, edited in edits.items()
    }
    lap(f"{len(videos)} edit{'s' if len(videos) > 1 else ''}, {sampling_steps} steps")
    judge = Judge(ClipScorer(WEIGHTS / "scorer"))
    moments = list(times(num_frames))
    verdicts = [judge.verdict(video, truth.scene, edits[name], moments) for name, video in videos.items()]
    for metric, limit, at_most in (
        ("track_error", 0.05, True),
        ("attributes_edited", 0.9, False),
        ("attributes_kept", 0.95, False),
        ("psnr_to_truth", None, False),
    ):
        value = statistics.mean(getattr(verdict, metric) for verdict in verdicts)
        run.figure(part, metric.replace("_", " "), value, limit if run.full else None, at_most=at_most)
    sample, prompt = mean.expand(2, -1, -1, -1, -1).clone(), torch.cat([empty, text])
    timestep = torch.tensor(500, device=device)
    call = torch.no_grad()(lambda: unet(sample, timestep, prompt).sample)
    run.figure(part, "forward, seconds", _median_seconds(call, run))
    if run.is_cuda:
        replay, output = captured(call)
        replay()
        run.figure(part, "CUDA graph, difference", relative(output, call()), 1e-4, at_most=True)
        run.figure(part, "forward, CUDA graph, seconds", _median_seconds(replay, run))


def _with_video(arguments: dict[str, Any], frames: Any) -> dict[str, Any]:
    """Return the arguments of an edit, which keeps the source's pixels where it has a mask."""
    return arguments | ({"video": frames} if "mask" in arguments else {})


def _median_seconds(call: Callable[[], Any], run: Run) -> float:
    call()
    return statistics.median(timed(call, run.setting.device) for _ in range(4 * run.repeats))


PARTS: dict[str, Callable[[Run], None]] = {
    "parity": parity,
    "device": rates,
    "forward": forward,
    "edits": edits,
    "default-edits": default_edits,
    "tuning": tuning,
    "toyworld": embedded_model,
    "cuda-graph": cuda_graph,
    "compiled-forward": compiled_forward,
    "compiled-tuning": compiled_tuning,
}


def measure_part(name: str, run: Run) -> int:
    """Measure a part; 0 if it has completed, 1 if not. Its failure is the last line of the record."""
    try:
        from diffusers.utils import logging

        from tav.runtime.devices import choose_device

        logging.set_verbosity_error()
        choose_device(run.setting.device)
        if name == "device":
            run.write({"machine": machine()})
        PARTS[name](run)
    except Exception as error:
        traceback.print_exc()
        run.write({"failure": f"{type(error).__name__}: {first_line(error)}"})
        return 1
    return 0
