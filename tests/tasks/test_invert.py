"""The stage invert: the trajectory that it stores, by each method and in each precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tasks.invert
from tasks.invert import invert
from tav.config import AttentionParams, InvertParams, WindowParams
from tav.runtime.events import EventStream
from tav.runtime.progress import Progress
from tav_model import WindowOptions, ddim_inversion
from tav_model.digests import digest
from tav_model.errors import TavError
from tav_model.tensors import load_tensors, save_tensors
from tests.support.models import CONTEXT_DIM, noise, scheduler, video_unet

LATENTS = 0.5 * noise(1, 4, 3, 8, 8)
TEXT = noise(1, 7, CONTEXT_DIM)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_tensors(tmp_path / "latents/latents.safetensors", {"mean": LATENTS}, {"fps": "8", "scale": "1"})
    save_tensors(tmp_path / "latents/text.safetensors", {"empty": TEXT}, {})
    info = {"clip_digest": digest(tmp_path / "latents"), "sha256": "0"}
    monkeypatch.setattr(tasks.invert, "load_tuned_unet", lambda *_: (video_unet(), info))
    monkeypatch.setattr(tasks.invert, "load_part", lambda *_: scheduler())
    return tmp_path


def run(project: Path, window: WindowParams | None = None, **params) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverted latents and the trajectory."""
    invert(
        project / "latents",
        project / "tuned",
        project / "inverted",
        base="base",
        attention=AttentionParams(),
        params=InvertParams(**{"steps": 3} | params),
        device="cpu",
        progress=Progress(EventStream(), stage="invert", clip="ball", total=3),
        window=window,
    )
    inverted, metadata = load_tensors(project / "inverted/inverted.safetensors")
    assert metadata["steps"] == "3" and metadata["stage"] == "invert"
    return inverted["latents"], load_tensors(project / "inverted/trajectory.safetensors")[0]["trajectory"]


@pytest.mark.parametrize(
    ("params", "options"),
    [
        ({}, {}),
        ({"iterations": 9, "tolerance": 1e-2}, {}),  # They matter only with fixed points.
        ({"method": "fixed-point", "iterations": 4}, {"iterations": 4}),
        ({"regularization": 0.1}, {"regularization": 0.1}),
    ],
)
def test_trajectory_is_that_of_the_method(project, params, options):
    latents, trajectory = run(project, **params)
    expected = ddim_inversion(video_unet(), scheduler(), LATENTS, TEXT, 3, **options)
    assert torch.equal(trajectory, expected) and torch.equal(latents, expected[-1])


def test_precision_of_the_trajectory_leaves_the_inverted_latents(project):
    exact, trajectory = run(project)
    latents, half = run(project, trajectory="float16")
    assert torch.equal(latents, exact) and torch.equal(half, trajectory.half())


def test_automatic_precision_is_that_of_the_hardware(project, monkeypatch):
    loaded = []
    monkeypatch.setattr(tasks.invert, "resolve_precision", lambda setting, device: {"auto": "bfloat16"}[setting])
    load = tasks.invert.load_tuned_unet
    monkeypatch.setattr(tasks.invert, "load_tuned_unet", lambda *given: loaded.append(given[-1]) or load(*given))
    run(project, precision="auto")
    assert loaded == [torch.bfloat16]


def test_steps_that_do_not_converge_are_logged(project, caplog):
    run(project, method="fixed-point", iterations=2, tolerance=1e-6)
    assert "fixed-point inversion: the latents still changed" in caplog.text
    caplog.clear()
    run(project, method="fixed-point", iterations=50, tolerance=1e-3)
    assert not caplog.text


def test_windows_of_a_longer_clip(project):
    latents, trajectory = run(project, WindowParams(context_length=2))
    expected = ddim_inversion(video_unet(), scheduler(), LATENTS, TEXT, 3, window=WindowOptions(2, 1))
    assert torch.equal(trajectory, expected) and torch.equal(latents, expected[-1])
    assert not torch.equal(latents, run(project)[0])
    assert torch.equal(run(project, WindowParams(context_length=3))[0], run(project)[0])


def test_latents_that_are_not_finite_leave_nothing(project, monkeypatch):
    before = run(project)[0]
    monkeypatch.setattr(tasks.invert, "load_part", lambda *_: scheduler(beta_end=float("nan")))
    with pytest.raises(TavError, match=r"not finite; set invert\.precision to float32"):
        run(project)
    assert torch.equal(load_tensors(project / "inverted/inverted.safetensors")[0]["latents"], before)
    assert sorted(path.name for path in project.iterdir()) == ["inverted", "latents"]
