"""Tuning: the loss by hand, what is drawn, what is trained, learning-rate schedules, and the errors."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from tav_model import TavError, Tuner, TuningConfig, tuning
from tav_model.allocator import FreedMemory
from tav_model.checkpoints import Checkpoints
from tav_model.networks import memory_efficient
from tav_model.networks.resnet import ResnetBlock3D
from tav_model.networks.transformer import Transformer3DModel
from tav_model.tuning import diffusion_loss
from tests.support.models import CONTEXT_DIM, SCHEDULER, SD2, noise, relative, scheduler, seeded, video_unet
from tests.support.stopped_tuning import stop_after

MEAN, DEVIATION = noise(1, 4, 3, 8, 8), 0.1 * noise(1, 4, 3, 8, 8, seed=1).abs()
CAPTION = noise(1, 7, CONTEXT_DIM, seed=2)


def tuner(unet=None, base=None, **config) -> Tuner:
    return Tuner(
        unet or video_unet(), base or scheduler(), TuningConfig(**{"steps": 3, "learning_rate": 1e-3} | config)
    )


# The loss


def loss_by_hand(unet, alphas, kind, latents, noise, timesteps, text):
    squares = []
    for x, e, t, words in zip(latents, noise, timesteps.tolist(), text, strict=True):
        signal, spread = math.sqrt(alphas[t]), math.sqrt(1 - alphas[t])
        target = e if kind == "epsilon" else signal * e - spread * x
        predicted = unet((signal * x + spread * e)[None], t, words[None]).sample[0]
        squares += ((predicted - target) ** 2).flatten().tolist()
    return sum(squares) / len(squares)


@pytest.mark.parametrize(("kind", "shape"), [("epsilon", {}), ("v_prediction", SD2)], ids=["sd1", "sd2"])
@pytest.mark.parametrize("base_class", [type(scheduler()), DDPMScheduler], ids=["DDIM", "DDPM"])
@torch.no_grad()
def test_loss(kind, shape, base_class):
    unet, base = video_unet(**shape), base_class.from_config({**SCHEDULER, "prediction_type": kind})
    latents, added = noise(2, 4, 3, 8, 8), noise(2, 4, 3, 8, 8, seed=1)
    text, timesteps = noise(2, 7, CONTEXT_DIM), torch.tensor([3, 900])
    alphas = base.alphas_cumprod.tolist()
    expected = loss_by_hand(unet, alphas, kind, latents, added, timesteps, text)
    assert diffusion_loss(unet, base, latents, added, timesteps, text).item() == pytest.approx(expected, rel=1e-5)


def test_prediction_type_that_cannot_be_tuned_is_refused():
    with pytest.raises(TavError, match=r"\Aprediction_type: 'sample' .*epsilon, v_prediction\Z"):
        tuner(base=scheduler(prediction_type="sample")).step(MEAN, DEVIATION, CAPTION)


# What a step draws


def test_draws_are_samples_of_the_posterior():
    one = tuner()
    samples = torch.stack([one.draw(MEAN, DEVIATION)[0] for _ in range(800)])
    assert (samples.mean(0) - MEAN).abs().mean() < 0.05 * DEVIATION.mean()
    assert relative(samples.std(0), DEVIATION) < 0.05


def test_draws_are_other_noise_and_timesteps_each_time():
    one = tuner()
    draws = [one.draw(MEAN, DEVIATION) for _ in range(50)]
    assert len({float(noise.sum()) for _, noise, _ in draws}) == 50
    timesteps = torch.cat([timestep for *_, timestep in draws])
    assert timesteps.min() >= 0 and timesteps.max() < 1000 and len(timesteps.unique()) > 40


def test_timesteps_of_a_batch_are_drawn_for_each_video():
    *_, timesteps = tuner().draw(MEAN.repeat(8, 1, 1, 1, 1), DEVIATION.repeat(8, 1, 1, 1, 1))
    assert timesteps.shape == (8,) and len(timesteps.unique()) > 1


def test_same_seed_same_weights_other_seed_other_weights():
    def weights(seed):
        one = tuner(seed=seed)
        for _ in range(2):
            one.step(MEAN, DEVIATION, CAPTION)
        return torch.cat([value.detach().flatten() for value in one.parameters.values()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_draws_do_not_depend_on_the_global_generator():
    torch.manual_seed(0)
    one = tuner().draw(MEAN, DEVIATION)
    torch.manual_seed(1)
    two = tuner().draw(MEAN, DEVIATION)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# What is trained


def test_only_the_trained_weights_change():
    unet = video_unet()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    one = tuner(unet)
    one.step(MEAN, DEVIATION, CAPTION)
    changed = {name for name, value in unet.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == one.parameters.keys()


@pytest.mark.slow
def test_tuning_lowers_the_loss_on_its_clip():
    unet, base = video_unet(), scheduler()
    draws = [(noise(1, 4, 3, 8, 8, seed=i), torch.tensor([100 * i])) for i in range(1, 9)]

    @torch.no_grad()
    def loss():
        return sum(diffusion_loss(unet, base, MEAN, e, t, CAPTION).item() for e, t in draws) / len(draws)

    before = loss()
    tuner(unet, base, steps=30, learning_rate=3e-3).fit(MEAN, DEVIATION, CAPTION)
    assert loss() < 0.97 * before


def test_accumulated_step_is_one_step_on_the_mean_loss():
    # With no weight decay and a huge epsilon, AdamW's first update is as linear in the gradient as that of SGD.
    settings = {"weight_decay": 0.0, "adam_epsilon": 1e3, "learning_rate": 1e3, "max_gradient_norm": 1e9}
    accumulated = tuner(accumulation_steps=2, **settings)
    record = accumulated.step(MEAN, DEVIATION, CAPTION)
    by_hand = tuner(**settings)
    draws = [by_hand.draw(MEAN, DEVIATION) for _ in range(2)]
    losses = [diffusion_loss(by_hand.unet, by_hand.scheduler, *draw, CAPTION) for draw in draws]
    gradients = torch.autograd.grad(sum(losses) / 2, list(by_hand.parameters.values()))
    for (name, start), gradient in zip(by_hand.parameters.items(), gradients, strict=True):
        torch.testing.assert_close(accumulated.parameters[name], start - gradient, rtol=1e-3, atol=1e-6)
    assert record.loss == pytest.approx(sum(losses).item() / 2)
    assert record.timestep == pytest.approx(sum(t.item() for *_, t in draws) / 2)


def test_gradient_norm_is_recorded_before_it_is_clipped():
    free, clipped = tuner(max_gradient_norm=1e9), tuner(max_gradient_norm=1e-3)
    assert free.step(MEAN, DEVIATION, CAPTION).gradient_norm == clipped.step(MEAN, DEVIATION, CAPTION).gradient_norm
    assert free.history[0].gradient_norm > 1e-3


@pytest.mark.parametrize(
    ("schedule", "warmup", "rates"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("constant_with_warmup", 2, [0, 0.5, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("cosine", 0, [1, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 - math.cos(math.pi / 4)) / 2]),
        ("cosine", 2, [0, 0.5, 1, 0.5]),
    ],
)
def test_learning_rates_of_a_schedule(schedule, warmup, rates):
    one = tuner(steps=4, learning_rate=1e-2, learning_rate_schedule=schedule, warmup_steps=warmup)
    history = one.fit(MEAN, DEVIATION, CAPTION)
    assert [record.learning_rate for record in history] == pytest.approx([1e-2 * rate for rate in rates])


def test_records_count_the_steps_and_are_reported_as_they_come():
    reported = []
    history = tuner().fit(MEAN, DEVIATION, CAPTION, on_step=reported.append)
    assert reported == history
    assert [record.step for record in history] == [1, 2, 3]
    assert all(math.isfinite(record.loss) and record.updated for record in history)


def test_model_is_in_eval_mode_after_tuning():
    one = tuner()
    one.fit(MEAN, DEVIATION, CAPTION)
    assert not one.unet.training


# Errors


def test_unknown_precision_is_refused():
    with pytest.raises(TavError, match=r"\Aprecision: 'float8' .*float32, bfloat16, float16\Z"):
        tuner(precision="float8")


def test_loss_that_is_not_finite_ends_the_tuning_with_what_to_change():
    with pytest.raises(TavError, match=r"\Atune: the loss of step 1 is nan; .*learning_rate.*\Z"):
        tuner().step(MEAN * math.nan, DEVIATION, CAPTION)


def test_gradient_that_is_not_finite_ends_the_tuning_and_leaves_the_weights():
    one = tuner()
    before = {name: value.clone() for name, value in one.parameters.items()}
    loss = one.backward(*one.draw(MEAN, DEVIATION), CAPTION)
    next(iter(one.parameters.values())).grad.fill_(math.inf)
    with pytest.raises(TavError, match=r"\Atune: the gradient of step 1 is (inf|nan); .*learning_rate\Z"):
        one.update(loss, 1.0)
    assert all(torch.equal(value, before[name]) for name, value in one.parameters.items())


def test_base_in_half_precision_is_tuned_as_any_other():
    full, half = video_unet(), video_unet().half()
    losses = [tuner(unet).step(MEAN, DEVIATION, CAPTION).loss for unet in (full, half)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


# Gradient checkpointing


def saved_bytes(unet, checkpointing):
    """What autograd keeps for the backward pass of one loss, and the gradients."""
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    generator = seeded(0)
    for parameter in unet.trainable_parameters().values():
        parameter.grad = None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        e = torch.randn(MEAN.shape, generator=generator)
        loss = diffusion_loss(unet, scheduler(), MEAN, e, torch.tensor([500]), CAPTION)
    kept_bytes = sum(kept.values())
    loss.backward()
    return kept_bytes, {name: value.grad.clone() for name, value in unet.trainable_parameters().items()}


@pytest.mark.parametrize("shape", [{}, SD2], ids=["sd1", "sd2"])
def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradients(shape):
    all_kept, gradients = saved_bytes(video_unet(layers_per_block=2, **shape), checkpointing=False)
    less_kept, same = saved_bytes(video_unet(layers_per_block=2, **shape), checkpointing=True)
    assert less_kept < all_kept / 2
    assert gradients.keys() == same.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gradient_checkpointing_gives_the_same_history(precision):
    histories = [
        tuner(precision=precision, gradient_checkpointing=checkpointing).fit(MEAN, DEVIATION, CAPTION)
        for checkpointing in (False, True)
    ]
    for plain, checkpointed in zip(*histories, strict=True):
        assert checkpointed == pytest.approx(plain, rel=1e-5)


# Half precision


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize(("kind", "shape"), [("epsilon", {}), ("v_prediction", SD2)], ids=["sd1", "sd2"])
def test_half_precision_losses_are_finite_and_nearly_those_of_float32(precision, kind, shape):
    def losses(precision):
        one = tuner(video_unet(**shape), scheduler(prediction_type=kind), precision=precision, steps=5)
        return [record.loss for record in one.fit(MEAN, DEVIATION, CAPTION)]

    half = losses(precision)
    assert all(math.isfinite(loss) for loss in half)
    assert half == pytest.approx(losses("float32"), rel=3e-3 if precision == "float16" else 3e-2)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_keeps_trained_weights_and_norms_in_float32(precision):
    one = tuner(precision=precision)
    one.step(MEAN, DEVIATION, CAPTION)
    dtypes = {name: value.dtype for name, value in one.unet.named_parameters()}
    full = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert one.parameters.keys() <= full
    assert all("norm" in name for name in full - one.parameters.keys())
    assert {dtypes[name] for name in dtypes.keys() - full} == {getattr(torch, precision)}


def test_small_gradients_do_not_vanish_in_float16():
    # Of the size of 1e-9, below what float16 can hold, were the loss not scaled.
    unets = [video_unet() for _ in range(2)]
    for unet in unets:
        unet.conv_out.weight.data *= 1e-6
    norms = [
        tuner(unet, precision=precision).step(MEAN, DEVIATION, CAPTION).gradient_norm
        for unet, precision in zip(unets, ("float32", "float16"), strict=True)
    ]
    assert norms[0] > 0
    assert norms[1] == pytest.approx(norms[0], rel=0.2)


@pytest.mark.slow
def test_float16_overflow_skips_the_update_and_halves_the_scale():
    one = tuner(precision="float16", steps=30)
    one.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = {name: value.clone() for name, value in one.parameters.items()}
    record = one.step(MEAN, DEVIATION, CAPTION)
    assert not record.updated
    assert one.scaler.get_scale() == 2.0**39
    assert all(torch.equal(value, before[name]) for name, value in one.parameters.items())
    records = [one.step(MEAN, DEVIATION, CAPTION) for _ in range(29)]
    assert records[-1].updated and math.isfinite(records[-1].gradient_norm)


def test_float16_that_overflows_at_any_scale_ends_the_tuning():
    one = tuner(precision="float16")
    one.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-14)
    one.backward(*one.draw(MEAN, DEVIATION), CAPTION)
    next(iter(one.parameters.values())).grad.fill_(math.inf)
    with pytest.raises(TavError, match=r"\Atune: float16 overflows .*bfloat16 or float32\Z"):
        one.update(1.0, 1.0)


# Less work: optimizers, timesteps, the loss of motion, early stopping


def drawn(sampling, number=2000, **config):
    one = tuner(timestep_sampling=sampling, **config)
    return torch.cat([one.draw(MEAN[:, :, :1, :1, :1], DEVIATION[:, :, :1, :1, :1])[2] for _ in range(number)])


def test_timesteps_more_at_high_noise_or_in_the_middle():
    uniform, cubic, middle = (drawn(name).double() / 1000 for name in ("uniform", "cubic", "logit-normal"))
    assert uniform.mean() == pytest.approx(0.5, abs=0.03) and uniform.std() == pytest.approx(12**-0.5, abs=0.02)
    assert cubic.mean() == pytest.approx(0.75, abs=0.03)  # The mean of 1 - u^3.
    assert middle.mean() == pytest.approx(0.5, abs=0.03) and middle.std() == pytest.approx(0.208, abs=0.02)
    for timesteps in (uniform, cubic, middle):
        assert timesteps.min() >= 0 and timesteps.max() < 1


@pytest.mark.parametrize(("number", "seed"), [(10, 0), (50, 1), (100, 2)])
def test_stratified_timesteps_are_evenly_spread_however_many_there_are(number, seed):
    timesteps = drawn("stratified", number, seed=seed).sort().values
    gaps = torch.diff(timesteps, prepend=timesteps[-1:] - 1000)
    assert gaps.max() < 3 * 1000 / number and gaps.min() > 0.3 * 1000 / number - 1


def test_stratified_timesteps_of_a_batch_and_of_accumulated_steps_follow_one_another():
    alone = drawn("stratified", 6)
    one = tuner(timestep_sampling="stratified")
    assert torch.equal(torch.cat([one.draw(MEAN.repeat(3, 1, 1, 1, 1), DEVIATION)[2] for _ in range(2)]), alone)
    accumulated = tuner(timestep_sampling="stratified", accumulation_steps=3)
    records = [accumulated.step(MEAN, DEVIATION, CAPTION) for _ in range(2)]
    means = [alone[:3].double().mean().item(), alone[3:].double().mean().item()]
    assert [record.timestep for record in records] == pytest.approx(means)


@torch.no_grad()
def test_loss_of_motion_leaves_out_what_all_frames_share():
    unet, base, timesteps = video_unet(), scheduler(), torch.tensor([400])
    added = noise(1, 4, 3, 8, 8, seed=1)
    prediction = unet(base.add_noise(MEAN, added, timesteps), timesteps, CAPTION).sample
    error = added - prediction

    def loss(weight, anchor=0):
        inputs = (unet, base, MEAN, added, timesteps, CAPTION, None, weight, anchor)
        return diffusion_loss(*inputs).item()

    plain = error.square().mean().item()
    motion = (math.sqrt(2) * error - error[:, :, 2:3]).square().mean().item()
    assert loss(0.0) == pytest.approx(plain, rel=1e-5)
    assert loss(1.0, 2) == pytest.approx(motion, rel=1e-5)
    assert loss(0.25, 2) == pytest.approx(0.75 * plain + 0.25 * motion, rel=1e-5)


def resumed(folder, **config):
    """A tuning that was stopped after its second step and resumed, and one that was not."""
    whole = tuner(steps=5, **config)
    whole.fit(MEAN, DEVIATION, CAPTION)

    stop_after(2, tuner(steps=5, **config), (MEAN, DEVIATION, CAPTION), Checkpoints(folder))
    again = tuner(steps=5, **config)
    again.fit(MEAN, DEVIATION, CAPTION, Checkpoints(folder))
    return whole, again


@pytest.mark.parametrize(
    "config",
    [
        {"optimizer": "muon"},
        {"optimizer": "muon", "precision": "float16", "lora_rank": 2},
        {"timestep_sampling": "stratified", "accumulation_steps": 2},
        {"timestep_sampling": "cubic", "motion_weight": 0.5},
        {"early_stopping": 100, "held_out_every": 1},
    ],
    ids=str,
)
def test_resumed_tuning_is_bit_identical_with_every_option(tmp_path, monkeypatch, config):
    monkeypatch.setattr(tuning, "HELD_OUT_EVERY", config.pop("held_out_every", 20))
    whole, again = resumed(tmp_path, **config)
    assert whole.history == again.history and whole.held_out == again.held_out
    assert all(torch.equal(value, again.parameters[name]) for name, value in whole.parameters.items())
    assert bool(whole.held_out) == ("early_stopping" in config)


def test_muon_lowers_the_loss():
    one = tuner(optimizer="muon", steps=8, learning_rate=1e-2)
    before = one.measure_held_out(MEAN, CAPTION)
    one.fit(MEAN, DEVIATION, CAPTION)
    assert one.measure_held_out(MEAN, CAPTION) < before


def test_held_out_loss_is_the_same_each_time_and_draws_nothing():
    one, other = tuner(), tuner()
    assert one.measure_held_out(MEAN, CAPTION) == one.measure_held_out(MEAN, CAPTION)
    one.fit(MEAN, DEVIATION, CAPTION)
    other.fit(MEAN, DEVIATION, CAPTION)
    assert one.history == other.history


@pytest.mark.parametrize(
    ("losses", "stops"),
    [
        ([1.0, 0.5, 0.4, 0.3, 0.2], None),
        ([1.0, 0.5, 0.499, 0.498, 0.497], 4),
        ([1.0, 0.5, 0.6, 0.48, 0.5], None),
        ([1.0, 1.1, 1.2, 0.1, 0.1], 3),
    ],
)
def test_tuning_ends_where_the_held_out_loss_is_flat(monkeypatch, losses, stops):
    monkeypatch.setattr(tuning, "HELD_OUT_EVERY", 1)
    one, measured = tuner(steps=5, early_stopping=2), iter(losses)
    monkeypatch.setattr(one, "measure_held_out", lambda *_: next(measured))
    one.fit(MEAN, DEVIATION, CAPTION)
    assert len(one.history) == (stops or 5) and one.is_flat == (stops is not None)


@pytest.mark.parametrize("setting", ["precision", "optimizer", "timestep_sampling"])
def test_settings_that_do_not_exist_are_named(setting):
    with pytest.raises(TavError, match=rf"\A{setting}: 'none' must be one of "):
        tuner(**{setting: "none"})


# Memory


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_large_models_are_tuned_in_less_memory_with_the_same_bits(monkeypatch, precision, checkpointing):
    def tuned():
        one = tuner(video_unet(), precision=precision, gradient_checkpointing=checkpointing, accumulation_steps=2)
        for _ in range(2):
            one.step(MEAN, DEVIATION, CAPTION)
        return one.history, [value.detach().clone() for value in one.parameters.values()]

    history, weights = tuned()
    returned = []
    monkeypatch.setattr(memory_efficient, "LARGE_BYTES", 0)
    monkeypatch.setattr(FreedMemory, "give_back", lambda _: returned.append(1))
    same_history, same_weights = tuned()
    assert history == same_history
    assert all(torch.equal(one, other) for one, other in zip(weights, same_weights, strict=True))
    layers = [module for module in video_unet().modules() if isinstance(module, ResnetBlock3D | Transformer3DModel)]
    # Two steps of two passes, after and before each layer. Before the first one, nothing is trained.
    assert 2 * 2 * (2 * len(layers) - 1) <= len(returned) <= 2 * 2 * 2 * len(layers)


def test_weights_that_took_no_part_decay():
    one = tuner(weight_decay=0.1, learning_rate=0.1)
    value = next(iter(one.parameters.values()))
    before = value.detach().clone()
    loss = one.backward(*one.draw(MEAN, DEVIATION), CAPTION)
    value.grad = None
    one.update(loss, 1.0)
    torch.testing.assert_close(value.detach(), 0.99 * before)
