"""A tuning that was stopped resumes from its last checkpoint, bit-identical to one that never was."""

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tav_model import TavError, Tuner, TuningConfig
from tav_model.checkpoints import Checkpoints, load_checkpoint, save_checkpoint
from tests.support.models import CONTEXT_DIM, SD2, noise, scheduler, video_unet

MEAN, DEVIATION = noise(1, 4, 2, 8, 8), 0.1 * noise(1, 4, 2, 8, 8, seed=1).abs()
CAPTION = noise(1, 7, CONTEXT_DIM, seed=2)
STEPS = 6


class KilledError(Exception):
    pass


def fresh(**config) -> Tuner:
    """A tuner as a new process makes it, whatever the state of the global generator."""
    shape = SD2 if config.pop("sd2", False) else {}
    base = scheduler(prediction_type="v_prediction" if shape else "epsilon")
    return Tuner(video_unet(**shape), base, TuningConfig(**{"steps": STEPS, "learning_rate": 1e-3} | config))


def run(tuner, checkpoints=None, kill_after=None, every=2, identity="this clip"):
    """Tune; with `kill_after`, the process ends right after that step, whose checkpoint is not written.

    Where the checkpoint is that of a later step, it ends before its first one.
    """

    def on_step(record):
        if record.step == kill_after:
            raise KilledError

    def on_resume(records):
        if kill_after is not None and len(records) >= kill_after:
            raise KilledError

    arguments = {"checkpoints": checkpoints and Checkpoints(checkpoints, identity, every)}
    arguments |= {"on_step": on_step, "on_resume": on_resume}
    if kill_after is None:
        return tuner.fit(MEAN, DEVIATION, CAPTION, **arguments)
    with pytest.raises(KilledError):
        tuner.fit(MEAN, DEVIATION, CAPTION, **arguments)


def checkpoints_in(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_same(one: Tuner, other: Tuner):
    assert repr(one.history) == repr(other.history)  # Which takes NaN, the norm of a skipped step, for equal.
    for name, value in one.parameters.items():
        assert torch.equal(value, other.parameters[name]), name


SETTINGS = [
    {},
    {"learning_rate_schedule": "cosine", "warmup_steps": 2},
    {"accumulation_steps": 2},
    {"precision": "bfloat16"},
    {"precision": "float16", "learning_rate_schedule": "cosine", "warmup_steps": 1, "accumulation_steps": 2},
    {"gradient_checkpointing": True, "learning_rate_schedule": "linear"},
    {"sd2": True, "precision": "float16"},
]


@pytest.mark.parametrize("config", SETTINGS, ids=lambda config: ",".join(map(str, config.values())) or "default")
def test_resumed_is_uninterrupted(tmp_path, config):
    whole = fresh(**config)
    run(whole)
    kill = random.Random(str(config)).choice(range(3, STEPS))
    run(fresh(**config), tmp_path, kill_after=kill)
    torch.manual_seed(kill)  # The new process starts elsewhere.
    resumed = fresh(**config)
    run(resumed, tmp_path)
    assert_same(resumed, whole)


def test_a_step_that_is_interrupted_after_its_end_is_saved(tmp_path, whole):
    def interrupt(record):
        if record.step == 3:
            raise KeyboardInterrupt

    tuner = fresh(learning_rate_schedule="cosine")
    with pytest.raises(KeyboardInterrupt):
        tuner.fit(MEAN, DEVIATION, CAPTION, checkpoints=Checkpoints(tmp_path, "this clip", 100), on_step=interrupt)
    assert checkpoints_in(tmp_path) == ["step-000003.safetensors"]
    resumed = fresh(learning_rate_schedule="cosine")
    assert len(run(resumed, tmp_path, every=100)) == STEPS
    assert_same(resumed, whole)


@pytest.fixture(scope="module")
def whole():
    tuner = fresh(learning_rate_schedule="cosine")
    run(tuner)
    return tuner


@pytest.mark.slow
@settings(max_examples=8)
@given(kills=st.lists(st.integers(1, STEPS), min_size=1, max_size=3), every=st.integers(1, STEPS))
def test_resumed_after_any_number_of_kills(tmp_path_factory, whole, kills, every):
    folder = tmp_path_factory.mktemp("checkpoints")
    for kill in kills:
        run(fresh(learning_rate_schedule="cosine"), folder, kill_after=kill, every=every)
    resumed = fresh(learning_rate_schedule="cosine")
    run(resumed, folder, every=every)
    assert_same(resumed, whole)


def test_float16_resumes_with_the_scale_and_the_steps_to_its_growth(tmp_path):
    def overflowing():
        tuner = fresh(precision="float16")
        tuner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=2)
        return tuner

    whole = overflowing()
    run(whole)
    assert not whole.history[3].updated
    run(overflowing(), tmp_path, kill_after=3)
    resumed = overflowing()
    run(resumed, tmp_path)
    assert_same(resumed, whole)
    assert resumed.scaler.state_dict() == whole.scaler.state_dict()


def test_dropouts_generator_is_restored_too(tmp_path):
    config = {"steps": STEPS, "learning_rate": 1e-3}

    def dropping():
        torch.manual_seed(5)
        return Tuner(video_unet(dropout=0.3), scheduler(), TuningConfig(**config))

    whole = dropping()
    run(whole)
    run(dropping(), tmp_path, kill_after=3)
    resumed = dropping()
    run(resumed, tmp_path)
    assert_same(resumed, whole)


def test_resumed_run_does_only_the_steps_that_were_left(tmp_path):
    run(fresh(), tmp_path, kill_after=5)
    resumed, steps = fresh(), []
    resumed.step = lambda *inputs, step=resumed.step: steps.append(1) or step(*inputs)
    run(resumed, tmp_path)
    assert len(steps) == STEPS - 4


def test_resumed_run_reports_all_steps(tmp_path, whole):
    run(fresh(learning_rate_schedule="cosine"), tmp_path, kill_after=5)
    before, after = [], []
    fresh(learning_rate_schedule="cosine").fit(
        MEAN,
        DEVIATION,
        CAPTION,
        checkpoints=Checkpoints(tmp_path, "this clip"),
        on_step=after.append,
        on_resume=before.extend,
    )
    assert before and after and before + after == whole.history


def test_finished_tuning_has_nothing_left_to_do(tmp_path):
    run(fresh(), tmp_path, every=STEPS)
    resumed = fresh()
    resumed.step = None
    assert len(run(resumed, tmp_path)) == STEPS


def test_two_newest_checkpoints_are_kept(tmp_path):
    run(fresh(), tmp_path, every=1)
    assert checkpoints_in(tmp_path) == ["step-000005.safetensors", "step-000006.safetensors"]


# Checkpoints that do not serve


def test_checkpoint_of_another_identity_is_refused(tmp_path):
    run(fresh(learning_rate=1e-2), tmp_path, kill_after=5, identity="another clip")
    tuner = fresh()
    before = {name: value.clone() for name, value in tuner.parameters.items()}
    assert load_checkpoint(tmp_path / "step-000004.safetensors", "this clip") is None
    assert not Checkpoints(tmp_path, "this clip").restore(tuner)
    assert tuner.history == []
    assert all(torch.equal(value, before[name]) for name, value in tuner.parameters.items())


def test_tuning_beside_checkpoints_of_another_identity_starts_anew(tmp_path):
    whole = fresh()
    run(whole)
    run(fresh(learning_rate=1e-2), tmp_path, kill_after=5, identity="another clip")
    tuner = fresh()
    run(tuner, tmp_path)
    assert_same(tuner, whole)


def test_later_checkpoints_of_another_identity_do_not_push_out_ours(tmp_path):
    run(fresh(learning_rate=1e-2), tmp_path, every=1, identity="another clip")  # It has come to step 6.
    run(fresh(), tmp_path, kill_after=4, every=1)
    resumed = fresh()
    resumed.step = lambda *inputs, step=resumed.step: steps.append(1) or step(*inputs)
    steps = []
    run(resumed, tmp_path)
    assert len(steps) == STEPS - 3


@pytest.mark.parametrize("keep", [0, 7, 100, -1], ids=["empty", "in the length", "in the header", "in the tensors"])
def test_truncated_checkpoint_falls_back_to_the_one_before(tmp_path, keep):
    whole = fresh()
    run(whole)
    run(fresh(), tmp_path, kill_after=5)
    newest = tmp_path / "step-000004.safetensors"
    newest.write_bytes(newest.read_bytes()[:keep])
    resumed = fresh()
    run(resumed, tmp_path)
    assert_same(resumed, whole)


def test_damaged_checkpoint_is_an_error_of_one_line(tmp_path):
    (tmp_path / "step-000004.safetensors").write_bytes(b"no tensors")
    with pytest.raises(TavError, match=r"\A.*step-000004.*\Z"):
        load_checkpoint(tmp_path / "step-000004.safetensors", "this clip")


def test_half_written_checkpoint_is_never_seen(tmp_path, monkeypatch):
    tuner = fresh()
    tuner.step(MEAN, DEVIATION, CAPTION)

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("tav_model.files.os.replace", full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        Checkpoints(tmp_path, "this clip").save(tuner, 1)
    assert checkpoints_in(tmp_path) == []


def test_checkpoint_holds_tensors_and_json_alone(tmp_path):
    tuner = fresh(precision="float16")
    tuner.step(MEAN, DEVIATION, CAPTION)
    save_checkpoint(tmp_path / "step.safetensors", tuner.state_dict(), "this clip")
    with safe_open(tmp_path / "step.safetensors", "pt") as file:
        state = json.loads(file.metadata()["state"])
    assert state["identity"] == "this clip"
    assert state["config"]["precision"] == "float16"


def test_a_state_that_was_read_from_a_file_is_the_one_that_was_written(tmp_path):
    tuner = fresh(learning_rate_schedule="cosine")
    tuner.step(MEAN, DEVIATION, CAPTION)
    state = tuner.state_dict()
    save_checkpoint(tmp_path / "step.safetensors", state, "this clip")
    read = load_checkpoint(tmp_path / "step.safetensors", "this clip")
    assert read.keys() == state.keys()
    torch.testing.assert_close(read["parameters"], state["parameters"], rtol=0, atol=0)
    torch.testing.assert_close(read["generators"], state["generators"], rtol=0, atol=0)
    torch.testing.assert_close(read["optimizer"]["state"], state["optimizer"]["state"], rtol=0, atol=0)
    assert [tuple(record) for record in read["history"]] == tuner.history
    for name in ("schedule", "scaler"):
        assert read[name] == state[name]
