"""The training of control networks: on a small base model, from what they see to a pipeline that uses them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from tav_model import TavError, UNet3DConditionModel, load_control_network
from tav_model.annotators.edges import canny
from tav_model.control_networks import check_fits
from tav_model.tensors import load_tensors
from tests.support.models import small_base
from toyworld import train
from toyworld.renderer import render_with_mask
from toyworld.scenes import Scene
from toyworld.training import control, latents
from toyworld.training.control import KINDS, ControlPart, condition, small_controlnet
from toyworld.training.loop import Settings, Training

SHORT = Settings(steps=3, batch=2, learning_rate=1e-2)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return small_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    monkeypatch.setattr(latents, "CHUNK", 12)


@pytest.fixture
def short_evaluation(monkeypatch):
    monkeypatch.setattr(control, "EVALUATED", 2)
    monkeypatch.setattr(control, "STEPS", 2)


@pytest.mark.parametrize("predicted", ["sd1", "sd2"])
def test_it_starts_with_the_base_models_prediction(tmp_path, predicted):
    part = ControlPart(SHORT, small_base(tmp_path, predicted), "depth", tmp_path, "cpu")
    batch = part.prepared(part[0])
    states = part.text_encoder(batch["tokens"]).last_hidden_state
    noisy = torch.randn((2, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, plain = (part._predict(noisy, batch["timesteps"], states, c) for c in (batch["conditions"], None))
    assert torch.equal(ours, plain)
    # The residual blocks are the UNet's.
    name = "down_blocks.0.resnets.0.conv1.weight"
    assert torch.equal(part.controlnet.state_dict()[name], part.unet.state_dict()[name])


@pytest.mark.parametrize("kind", KINDS)
def test_batches_depend_on_the_step_alone(base, tmp_path, kind):
    one, two = (ControlPart(SHORT, base, kind, tmp_path, "cpu") for _ in range(2))
    for name, value in one[1].items():
        assert torch.equal(value, two[1][name]), name
    first, second = one.prepared(one[0]), one.prepared(one[1])
    assert first["conditions"].shape == (2, 3, 128, 128) and first["means"].shape == (2, 4, 16, 16)
    assert first["conditions"].min() >= 0 and 0.5 < first["conditions"].max() <= 1
    assert not torch.equal(first["conditions"], second["conditions"])


def test_the_network_sees_the_renderers_depth_and_the_pictures_edges():
    scene = Scene(object="star", motion="swinging")
    picture, mask = render_with_mask(scene, 0.3)
    assert np.array_equal(condition("edges", scene, 0.3), canny(picture[None])[0])
    assert np.array_equal(condition("edges", scene, 0.3, picture), canny(picture[None])[0])
    near = condition("depth", scene, 0.3)[..., 0]
    assert near[mask == 1].min() > near[:70][mask[:70] == 0].max()


@pytest.mark.parametrize(("kind", "share"), [("depth", 0.0), ("depth", 1.0), ("edges", 1.0)])
def test_only_depths_are_of_another_object_and_at_the_same_place(base, tmp_path, monkeypatch, kind, share):
    seen = []
    monkeypatch.setattr(control, "EXCHANGED", share)
    monkeypatch.setattr(control, "condition", lambda kind, *moment: seen.append(moment) or condition(kind, *moment))
    part = ControlPart(Settings(1, 12, 1e-3), base, kind, tmp_path, "cpu")
    shown = [part.latents.pictures.sample(int(i)) for i in part[0]["chosen"]]
    assert len(shown) == len(seen) == 12
    if kind == "edges" or share == 0:
        assert seen == shown
    else:
        assert [(scene.edited(object="ball"), time) for scene, time in seen] == [
            (scene.edited(object="ball"), time) for scene, time in shown
        ]
        assert sum(one.object != other.object for (one, _), (other, _) in zip(seen, shown, strict=True)) > 6


@pytest.mark.slow
@pytest.mark.usefixtures("short_evaluation")
def test_a_few_steps_from_the_command_line(base, tmp_path):
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file() and "controlnet" not in path.parts}
    arguments = ["control", "--steps", "2", "--batch", "2", "--learning-rate", "1e-2", "--device", "cpu"]
    places = ["--base", str(base), "--work", str(tmp_path), "--tracking-uri", "none"]
    assert train.main([*arguments, *places]) == 0
    assert all(path.read_bytes() == content for path, content in before.items()), "the base model has changed"
    unet = UNet3DConditionModel.from_pretrained_2d(base)
    for kind in KINDS:
        folder = base / "controlnet" / kind
        network = load_control_network(folder)
        check_fits(network, unet, 8)
        assert network.controlnet_mid_block.weight.abs().max() > 0, "not trained"
        assert {
            tensor.dtype for tensor in load_tensors(folder / "diffusion_pytorch_model.safetensors")[0].values()
        } == {torch.float16}


@pytest.mark.slow
@pytest.mark.usefixtures("short_evaluation")
def test_training_lowers_the_loss_and_leaves_the_base_model(tmp_path):
    base = small_base(tmp_path / "base")
    part = ControlPart(Settings(steps=12, batch=4, learning_rate=3e-2, averaging=0.5), base, "depth", tmp_path, "cpu")
    unet = {name: value.clone() for name, value in part.unet.state_dict().items()}
    training = Training(part, tmp_path / "work", evaluate_every=1000)
    training.run()
    with training.averaged():
        metrics, sheet = part.evaluate()
    assert metrics["loss_unseen"] < metrics["loss_unseen_without"]  # They were equal before.
    assert 0 <= metrics["track_error"] <= 1
    assert sheet.shape == (3 * 128, 2 * 128, 3) and sheet.dtype == np.uint8
    assert all(torch.equal(value, unet[name]) for name, value in part.unet.state_dict().items())


def test_mistakes_are_one_line(tmp_path, capsys):
    with pytest.raises(TavError, match="control: 'pose' must be one of edges, depth"):
        ControlPart(SHORT, tmp_path, "pose", tmp_path, "cpu")
    places = ["--base", str(tmp_path), "--work", str(tmp_path), "--tracking-uri", "none"]
    assert train.main(["control-depth", "--device", "cpu", *places]) == 2
    assert "no base model; train it first: python -m toyworld.train all" in capsys.readouterr().err


def test_a_control_network_of_the_embedded_model_has_about_half_the_usual_weights():
    unet = UNet2DConditionModel.from_pretrained("toyworld/weights", subfolder="unet", local_files_only=True)
    ours, usual = (
        sum(parameter.numel() for parameter in network.parameters())
        for network in (small_controlnet(unet), ControlNetModel.from_unet(unet))
    )
    assert ours < 0.55 * usual
    check_fits(small_controlnet(unet), UNet3DConditionModel.from_unet2d(unet), 8)
