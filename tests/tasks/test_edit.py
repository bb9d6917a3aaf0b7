"""Rows as the unit of work: each is rendered once, and one that fails fails alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tasks.edit import edit
from tasks.rows import RowBatch
from tav.config import EditParams, WindowParams
from tav.config.prompts import PromptRow
from tav.runtime.events import EventStream
from tav_model.base_models import base_digest
from tav_model.errors import TavError
from tav_model.files import write_json
from tav_model.tensors import save_tensors
from tests.support.row_batches import row_batch


class Pictures:
    """In the VAE's place: latents are pictures already, and only so many are decoded at a time."""

    dtype = torch.float32
    config = SimpleNamespace(scaling_factor=1)

    def __init__(self, most: int) -> None:
        self.most = most

    def decode(self, latents: torch.Tensor) -> SimpleNamespace:
        if len(latents) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return SimpleNamespace(sample=latents)


class Renderer:
    """In the pipeline's place: colours each video by its prompt, and notes what it was asked for.

    `most` prompts have room in its memory, and `frames` in its VAE's.
    """

    def __init__(self, broken: str | None = None, most: int = 99, frames: int = 99) -> None:
        self.calls: list[list[str]] = []
        self.latents: list[torch.Tensor] = []
        self.broken, self.most, self.vae = broken, most, Pictures(frames)

    def __call__(self, prompts, *, latents, num_inference_steps, callback_on_step_end, **settings):
        self.calls.append(list(prompts))
        self.latents.append(latents)
        if self.broken in prompts:
            raise RuntimeError(f"cannot draw {self.broken}")
        if len(prompts) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        for step in range(num_inference_steps):
            callback_on_step_end(self, step, None, {})
        colours = [sum(prompt.encode()) % 200 / 255 for prompt in prompts]
        video = torch.stack([torch.full((3, 3, 16, 16), 2 * colour - 1) for colour in colours])
        return SimpleNamespace(frames=video, masks=None)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    latents = torch.arange(4 * 3 * 2 * 2, dtype=torch.float32).reshape(1, 4, 3, 2, 2)
    save_tensors(tmp_path / "inverted/inverted.safetensors", {"latents": latents}, {"fps": "8", "steps": "2"})
    write_json(tmp_path / "tuned/tuned.json", {"sha256": "0"})
    (tmp_path / "base/unet").mkdir(parents=True)
    (tmp_path / "base/unet/config.json").write_text("{}")
    return tmp_path


def batch_of(project: Path, *prompts: str, renderer: Renderer | None = None, size: int = 1, **changes) -> RowBatch:
    rows = [PromptRow(line=i + 2, prompt=prompt, name=prompt.replace(" ", "-")) for i, prompt in enumerate(prompts)]
    return batch_of_rows(project, rows, renderer=renderer, size=size, **changes)


def batch_of_rows(
    project: Path, rows, renderer: Renderer | None = None, size: int = 1, look=None, **changes
) -> RowBatch:
    settings = {"steps": 2, "guidance_scale": 7.5, "negative_prompt": "", "start": "inverted", "precision": "float32"}
    params = EditParams(**settings | changes)
    return row_batch(project, rows, params, renderer or Renderer(), batch_size=size, **(look or {}))


def render(batch: RowBatch) -> Renderer:
    edit(batch, EventStream())
    return batch.pipeline


def files(project: Path) -> list[str]:
    return sorted(path.name for path in (project / "edits").iterdir())


def test_every_row_leaves_its_files(project: Path) -> None:
    assert render(batch_of(project, "a cat", "a dog")).calls == [["a cat"], ["a dog"]]
    assert files(project) == [f"a-{animal}.{kind}" for animal in ("cat", "dog") for kind in ("json", "mp4", "webp")]
    record = json.loads((project / "edits/a-cat.json").read_text())
    assert (record["prompt"], record["steps"], record["frames"], record["fps"]) == ("a cat", 2, 3, "8")


def test_windows_decide_a_video_of_a_longer_clip(project: Path) -> None:
    plain = batch_of(project, "a cat").rows[0].identity
    identities = {}
    for length in (2, 3):  # The clip has three frames.
        batch = batch_of(project, "a cat", look={"window": WindowParams(context_length=length)})
        identities[length] = batch.rows[0].identity
        arguments = batch._pipeline_arguments(batch.rows[0])
        assert arguments.get("context_length") == (2 if length == 2 else None)
    assert identities[3] == plain != identities[2]


def test_a_row_that_is_done_is_not_rendered_again(project: Path) -> None:
    render(batch_of(project, "a cat", "a dog"))
    before = {path.name: path.read_bytes() for path in (project / "edits").iterdir()}
    assert render(batch_of(project, "a dog", "a cat")).calls == []
    assert {path.name: path.read_bytes() for path in (project / "edits").iterdir()} == before


def test_a_row_more_renders_one_row_and_a_row_less_goes(project: Path) -> None:
    render(batch_of(project, "a cat", "a dog"))
    assert render(batch_of(project, "a cat", "a dog", "a fish")).calls == [["a fish"]]
    assert render(batch_of(project, "a fish")).calls == []
    assert files(project) == ["a-fish.json", "a-fish.mp4", "a-fish.webp"]
    assert len(list((project / "store").iterdir())) == 1


def test_a_row_with_another_name_keeps_its_video(project: Path) -> None:
    render(batch_of(project, "a cat"))
    renamed = batch_of_rows(project, [PromptRow(line=2, prompt="a cat", name="felix", category="object")])
    assert render(renamed).calls == []
    assert files(project) == ["felix.json", "felix.mp4", "felix.webp"]
    record = json.loads((project / "edits/felix.json").read_text())
    assert (record["name"], record["category"]) == ("felix", "object")


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 3},
        {"guidance_scale": 8.0},
        {"negative_prompt": "grey"},
        {"start": "random"},
        {"precision": "bfloat16"},
    ],
)
def test_another_setting_renders_again(project: Path, changes: dict) -> None:
    render(batch_of(project, "a cat"))
    assert render(batch_of(project, "a cat", **changes)).calls == [["a cat"]]


def test_other_inputs_render_again(project: Path) -> None:
    render(batch_of(project, "a cat"))
    write_json(project / "tuned/tuned.json", {"sha256": "1"})
    assert render(batch_of(project, "a cat")).calls == [["a cat"]]


def test_a_row_that_fails_fails_alone(project: Path) -> None:
    failing = batch_of(project, "a cat", "a dog", "a fish", renderer=Renderer(broken="a dog"))
    with pytest.raises(TavError, match=r"1 of 3 rows failed: a-dog \(cannot draw a dog\)\. 2 done and kept"):
        render(failing)
    assert not (project / "edits").exists()
    assert render(batch_of(project, "a cat", "a dog", "a fish")).calls == [["a dog"]]
    assert len(files(project)) == 9


def test_rows_in_the_results_are_found_without_the_store(project: Path) -> None:
    render(batch_of(project, "a cat", "a dog"))
    shutil.rmtree(project / "store")
    assert render(batch_of(project, "a cat", "a dog", "a fish")).calls == [["a fish"]]


def test_a_damaged_video_in_the_store_is_rendered_again(project: Path) -> None:
    render(batch_of(project, "a cat"))
    shutil.rmtree(project / "edits")
    (video,) = (project / "store").glob("*/edit.mp4")
    video.write_bytes(video.read_bytes()[:100])
    assert render(batch_of(project, "a cat")).calls == [["a cat"]]


def test_batches_hold_rows_that_agree_in_their_settings(project: Path) -> None:
    rows = [PromptRow(line=i, prompt=f"cat {i}", name=f"cat-{i}", steps=2 + i % 2) for i in range(5)]
    rendered = render(batch_of_rows(project, rows, size=2))
    assert rendered.calls == [["cat 0", "cat 2"], ["cat 1", "cat 3"], ["cat 4"]]
    assert len(files(project)) == 15


def test_random_starts_are_drawn_per_row(project: Path) -> None:
    rows = [PromptRow(line=i, prompt=f"cat {i}", name=f"cat-{i}", seed=i) for i in range(2)]
    (together,) = render(batch_of_rows(project, rows, size=2, start="random")).latents
    shutil.rmtree(project / "store")
    shutil.rmtree(project / "edits")
    alone = render(batch_of_rows(project, rows, size=1, start="random")).latents
    np.testing.assert_array_equal(together, torch.cat(alone))
    assert not torch.equal(alone[0], alone[1])


@pytest.mark.slow
def test_out_of_memory_renders_fewer_at_a_time(project: Path) -> None:
    prompts = [f"cat {i}" for i in range(5)]
    rendered = render(batch_of(project, *prompts, renderer=Renderer(most=1, frames=2), size=4))
    assert rendered.calls == [prompts[:4], prompts[:2], prompts[:1], *([prompt] for prompt in prompts[1:])]
    videos = {path.stem: path.read_bytes() for path in (project / "edits").glob("*.mp4")}
    shutil.rmtree(project / "store")
    shutil.rmtree(project / "edits")
    assert render(batch_of(project, *prompts, size=4)).calls == [prompts[:4], prompts[4:]]
    assert videos == {path.stem: path.read_bytes() for path in (project / "edits").glob("*.mp4")}


def test_one_prompt_that_is_too_much_fails_with_the_reason(project: Path) -> None:
    with pytest.raises(TavError, match=r"1 of 1 rows failed: a-cat \(.*out of memory"):
        render(batch_of(project, "a cat", renderer=Renderer(most=0)))


def test_looking_finds_what_lies_elsewhere_and_leaves_the_store(project: Path) -> None:
    rows = [PromptRow(line=1, prompt="a cat", name="cat"), PromptRow(line=2, prompt="a dog", name="dog")]
    render(batch_of_rows(project, rows[:1]))
    shutil.rmtree(project / "store")
    look = {"adopt": False, "base_identity": base_digest(str(project / "base"))}
    batch = batch_of_rows(project, rows, look=look)
    assert [edit.name for edit in batch.todo()] == ["cat", "dog"]
    assert [edit.name for edit in batch.to_render()] == ["dog"]
    assert not (project / "store").exists()
    (project / "edits").rename(project / "others")
    assert len(batch_of_rows(project, rows, look=look).to_render()) == 2
    assert [edit.name for edit in batch_of_rows(project, rows, look={"found_in": [project / "others"]}).todo()] == [
        "dog"
    ]
