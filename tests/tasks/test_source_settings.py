"""What rows take over from the source: presets, masks, and identities that depend on all of it and on nothing else."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tasks.edit import edit
from tasks.rows import RowBatch
from tasks.source_settings import Source, source_arguments
from tav.config import DecodeParams, EditParams, WindowParams
from tav.config.presets import PRESETS
from tav.config.prompts import PromptRow
from tav.config.results import MASK_IMAGE
from tav.reports.videos import read_edit
from tav.runtime.events import Event, EventStream, LoopProgressed
from tav_model.blending import feathered, pixel_masks
from tav_model.errors import TavError
from tav_model.files import read_json, write_json
from tav_model.tensors import save_tensors
from tav_model.video import read_video
from tav_model.vocabulary import Vocabulary
from tests.support.models import noise, pipeline
from tests.support.row_batches import row_batch
from tests.support.videos import write_tone

STEPS = 2
FRAMES = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
DECODE = DecodeParams(frames=3, width=64, height=64)
MASK = np.zeros((64, 64), np.uint8)
MASK[:, :20] = 255
PIPELINE = pipeline()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    trajectory = noise(STEPS + 1, 1, 4, 3, 32, 32)
    inverted = {"latents": trajectory[-1].clone()}
    save_tensors(tmp_path / "inverted/inverted.safetensors", inverted, {"fps": "8", "steps": str(STEPS)})
    save_tensors(tmp_path / "inverted/trajectory.safetensors", {"trajectory": trajectory}, {})
    save_tensors(tmp_path / "frames/frames.safetensors", {"frames": torch.from_numpy(FRAMES)}, {})
    write_json(tmp_path / "tuned/tuned.json", {"sha256": "0"})
    (tmp_path / "base/unet").mkdir(parents=True)
    (tmp_path / "base/unet/config.json").write_text("{}")
    Image.fromarray(MASK).save(tmp_path / "mask.png")
    return tmp_path


def batch_of(
    project: Path,
    *rows: PromptRow,
    caption: str = "a man",
    window: WindowParams | None = None,
    vocabulary: Vocabulary | None = None,
    **params,
) -> RowBatch:
    return row_batch(
        project,
        rows,
        EditParams(**{"steps": STEPS, "guidance_scale": 2.0} | params),
        PIPELINE,
        source=Source(project, project / "inverted", caption, project / "frames", DECODE),
        window=window,
        vocabulary=vocabulary,
    )


def row(prompt: str = "a dog", **changes) -> PromptRow:
    return PromptRow(line=2, prompt=prompt, name=prompt.replace(" ", "-"), **changes)


def frames_of(batch: RowBatch, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The frames of the first row, before they are encoded."""
    kept = []
    store = batch._store
    monkeypatch.setattr(
        batch, "_store", lambda row, parts, mask: store(row, (kept.append(part) or part for part in parts), mask)
    )
    edit(batch, EventStream())
    return np.concatenate(kept)


def identity(project: Path, changed: PromptRow | None = None, **params) -> str:
    return batch_of(project, changed or row(), **params).rows[0].identity


# Rendering


@pytest.mark.parametrize("inverted", [False, True])
def test_frames_are_the_source_outside_of_the_mask_and_its_feather(project, monkeypatch, inverted):
    settings = {"mask_feather": 4.0, "mask_inverted": inverted}
    frames = frames_of(batch_of(project, row(mask="mask.png"), **settings), monkeypatch)
    generated = np.stack([(MASK > 0) != inverted] * 3)
    outside = feathered(generated, 4) == 0
    assert outside.mean() > 0.2
    assert np.array_equal(frames[outside], FRAMES[outside])
    assert not np.array_equal(frames[generated], FRAMES[generated])


def test_frames_are_the_source_outside_of_what_the_prompt_changes(project, monkeypatch):
    threshold = 0.09  # Between the differences of the small network.
    batch = batch_of(project, row(mask="difference"), difference_threshold=threshold, mask_feather=4.0)
    masks = []
    store = batch._decoded
    monkeypatch.setattr(batch, "_decoded", lambda *args: masks.append(args[3]) or store(*args))
    frames = frames_of(batch, monkeypatch)
    generated = pixel_masks(masks[0], 2)
    outside = feathered(generated, 4) == 0
    assert 0 < outside.mean() < 1
    assert np.array_equal(frames[outside], FRAMES[outside])
    assert not np.array_equal(frames[generated > 0], FRAMES[generated > 0])
    record = read_json(project / "edits/a-dog.json")
    assert record["mask"] == "difference" and record["mask_image"].startswith(MASK_IMAGE)


def test_a_prompt_that_changes_nothing_is_named(project, caplog):
    edit(batch_of(project, row("a man", mask="difference")), EventStream())
    assert "a-man: nothing is in the mask 'difference', so that the video is the clip's" in caplog.text
    assert "lower edit.difference_threshold" in caplog.text


def test_strength_is_of_the_preset_or_the_row_and_counts_fewer_steps(project, monkeypatch):
    assert identity(project, strength=1.0) == identity(project)
    assert source_arguments(row(), EditParams(strength=0.5)) == ("tune-a-video", {"strength": 0.5})
    batch = batch_of(project, row(), strength=0.5)
    assert batch.steps_of(batch.rows[0]) == 1
    assert batch.rows[0].identity != identity(project)
    counts = []
    monkeypatch.setattr(batch, "steps_of", lambda one: counts.append(1) or 1)
    half = frames_of(batch, monkeypatch)
    assert counts
    assert not np.array_equal(half, frames_of(batch_of(project, row()), monkeypatch))
    random = batch_of(project, row(), strength=0.5, start="random")
    assert random.steps_of(random.rows[0]) == 2
    assert np.array_equal(
        frames_of(random, monkeypatch), frames_of(batch_of(project, row(), start="random"), monkeypatch)
    )


def test_a_strength_that_leaves_no_step_is_refused(project):
    with pytest.raises(TavError, match=r"^a-dog: strength: 0.1 of 2 steps leaves none; allowed: above 0.25$"):
        edit(batch_of(project, row(), strength=0.1), EventStream())


def test_fresh_noise_is_drawn_with_the_seed_of_each_row(project):
    rows = [row("a dog", seed=1), row("a cat", seed=2), PromptRow(line=4, prompt="a dog", name="other", seed=2)]
    options = {"fresh_noise": 0.5, "mask": "mask.png"}
    batch = batch_of(project, *rows, **options)
    batch.batch_size = 3
    edit(batch, EventStream())
    together = {path.stem: path.read_bytes() for path in (project / "edits").glob("*.mp4")}
    assert len(set(together.values())) == 3
    edit(batch_of(project, rows[2], **options), EventStream())
    assert (project / "edits/other.mp4").read_bytes() == together["other"]


def test_there_is_fresh_noise_only_where_its_place_is_known():
    def share(params: EditParams | None = None, **changes) -> float | None:
        return source_arguments(row(preset="object", **changes), params or EditParams())[1].get("fresh_noise")

    assert share() == share(mask="mask.png") == 0.5
    assert share(mask="words") is None and share(mask="none") is None
    assert share(EditParams(fresh_noise=0.25)) == 0.25 and share(EditParams(fresh_noise=0.25), mask="none") is None
    assert share(EditParams(fresh_noise=0.0)) is None


def test_latents_drawn_at_random_have_no_fresh_noise(project):
    batch = batch_of(project, row(), start="random", fresh_noise=0.5, mask="mask.png")
    assert "fresh_noise" not in batch._first_latents(batch.rows, batch._pipeline_arguments(batch.rows[0]))[1]


def test_a_mask_of_none_turns_off_that_of_the_preset(project):
    assert identity(project, row(mask="none")) == identity(project)
    with_preset, without = row(preset="video-p2p"), row(preset="video-p2p", mask="none")
    assert "mask" in source_arguments(with_preset, EditParams())[1]
    assert "mask" not in source_arguments(without, EditParams())[1]


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"tune-a-video"}))
def test_every_preset_renders_something_else(project, monkeypatch, name):
    plain = frames_of(batch_of(project, row()), monkeypatch)
    assert not np.array_equal(frames_of(batch_of(project, row(preset=name)), monkeypatch), plain)


@pytest.mark.parametrize(
    ("params", "off"),
    [
        ({"guidance_start": 0.5}, {"guidance_start": 0.0}),
        ({"guidance_end": 0.5}, {"guidance_end": 1.0}),
        ({"feature_reuse_interval": 2}, {"feature_reuse_interval": 1}),
    ],
)
def test_cheaper_sampling_is_another_video_and_off_the_same(project, monkeypatch, params, off):
    assert identity(project, **off) == identity(project)
    assert source_arguments(row(), EditParams(**params)) == ("tune-a-video", params)
    assert identity(project, **params) != identity(project)
    plain = frames_of(batch_of(project, row()), monkeypatch)
    assert not np.array_equal(frames_of(batch_of(project, row(), **params), monkeypatch), plain)


def test_preset_of_the_paper_is_no_preset(project):
    assert identity(project, row(preset="tune-a-video")) == identity(project, row())


def test_record_names_preset_and_mask(project):
    edit(batch_of(project, row(mask="mask.png", preset="style")), EventStream())
    record = json.loads((project / "edits/a-dog.json").read_text())
    assert (record["preset"], record["mask"], record["mask_feather"]) == ("style", "mask.png", 8)
    picture = Image.open(io.BytesIO(base64.b64decode(record["mask_image"].removeprefix(MASK_IMAGE))))
    assert np.array_equal(np.asarray(picture), MASK[::2, ::2] > 0)
    assert read_edit(project / "edits/a-dog.mp4", "a-dog", "a man").mask == record["mask_image"]


def test_a_picture_of_a_mask_from_elsewhere_is_not_shown(project):
    edit(batch_of(project, row(mask="mask.png")), EventStream())
    path = project / "edits/a-dog.json"
    write_json(path, read_json(path) | {"mask_image": "https://example.com/mask.png"})
    assert read_edit(path.with_suffix(".mp4"), "a-dog", "a man").mask == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": "missing.png"}, r"missing.png: no such file"),
        ({"prompt": "a man", "mask": "words"}, r"has no word that differs"),
    ],
)
def test_a_row_whose_mask_cannot_be_made_fails_alone(project, changes, message):
    with pytest.raises(TavError, match=rf"1 of 2 rows failed: .*{message}.*1 done and kept"):
        edit(batch_of(project, row(**{"prompt": "a dog"} | changes), row("a cat")), EventStream())


def test_inversion_without_trajectory_is_named_with_the_way_out(project):
    (project / "inverted/trajectory.safetensors").unlink()
    with pytest.raises(TavError, match=r"trajectory.safetensors: no such file; .* invert again"):
        edit(batch_of(project, row(preset="style")), EventStream())
    edit(batch_of(project, row()), EventStream())


def test_sampling_starts_where_the_inversion_ended(project):
    seen = []
    hook = PIPELINE.unet.register_forward_pre_hook(lambda _, inputs: seen.append(int(inputs[1])))
    edit(batch_of(project, row(steps=3)), EventStream())
    hook.remove()
    assert seen == [
        501,
        251,
        1,
    ]  # The inversion has two steps, to 1 and 501; three of the scheduler's own begin at 667.


# Identity


def test_without_anything_taken_over_the_source_does_not_matter(project):
    before = identity(project)
    (project / "inverted/trajectory.safetensors").unlink()
    Image.fromarray(255 - MASK).save(project / "mask.png")
    assert identity(project, caption="a woman") == before
    assert identity(project, mask_feather=3.0) == before  # There is no mask.


def test_identity_depends_on_what_a_row_reads(project):
    pixels, words, style = row(mask="mask.png"), row(mask="words"), row(preset="style")
    identities = [identity(project, one) for one in (row(), pixels, words, style)]
    identities += [identity(project, row(preset="object")), identity(project, layout_strength=1.0)]
    identities += [identity(project, sampler="dpm-solver++"), identity(project, pixels, mask_feather=3.0)]
    identities += [identity(project, words, caption="a woman"), identity(project, style, caption="a woman")]
    difference = row(mask="difference")
    identities += [identity(project, difference), identity(project, difference, mask_feather=3.0)]
    identities += [
        identity(project, difference, caption="a woman"),
        identity(project, difference, difference_threshold=0.5),
    ]
    Image.fromarray(255 - MASK).save(project / "mask.png")
    save_tensors(project / "frames/frames.safetensors", {"frames": torch.from_numpy(255 - FRAMES)}, {})
    identities += [identity(project, pixels), identity(project, difference)]
    assert len(set(identities)) == len(identities)


def test_category_chooses_the_preset_where_params_say_so(project):
    colour = batch_of(project, row(category="colour"), preset="category").rows[0]
    assert colour.preset == "attribute" and colour.mask == "difference"
    for others in (row(), row(category="multiple")):
        assert batch_of(project, others, preset="category").rows[0].preset == "layout"
    assert batch_of(project, row(category="colour")).rows[0].preset == "tune-a-video"
    assert identity(project, row(category="colour"), preset="category") == identity(project, row(preset="attribute"))


def test_words_that_the_base_model_knows_tell_the_category(project):
    meanings = {"red": ("colour", "red"), "blue": ("colour", "blue")}
    words = Vocabulary("", "", meanings, frozenset(meanings), {"colour": "colour"})

    def preset(one: PromptRow, **params) -> str | None:
        batch = batch_of(project, one, caption="a red man", vocabulary=words, **{"preset": "category"} | params)
        return batch.rows[0].preset

    assert preset(row("a blue man")) == "attribute"
    assert preset(row("a red woman")) == "layout"
    assert preset(row("a blue man", category="background")) == "background"
    assert preset(row("a blue man"), preset="style") == "style"


def test_shares_replace_those_of_the_preset():
    others = {"source_negative": 0.0, "strength": 1.0, "guidance_end": 1.0}
    params = EditParams(cross_replace=0.0, self_replace=0.25, **others)
    _, arguments = source_arguments(row(preset="attribute", mask="none"), params)
    assert arguments == {"cross_attention_kwargs": {"n_self_replace": 0.25, "self_replace_layers": "all"}}
    assert source_arguments(row(), EditParams(source_negative=0.5)) == ("tune-a-video", {"source_negative": 0.5})
    weighted = EditParams(source_negative=0.5, source_negative_weight=0.25)
    assert source_arguments(row(), weighted)[1] == {"source_negative": 0.5, "source_negative_weight": 0.25}
    assert source_arguments(row(), EditParams(source_negative_weight=0.25)) == ("tune-a-video", {})
    assert source_arguments(row(preset="object"), EditParams())[1]["source_negative_weight"] == 0.5
    propagated = {"attention_propagation": 0.5, "feature_propagation": 0.25}
    assert source_arguments(row(), EditParams(**propagated)) == ("tune-a-video", propagated)
    assert source_arguments(row(preset="object"), EditParams())[1]["attention_propagation"] == 1.0
    assert not source_arguments(row(preset="object"), EditParams(start="random"))[1].keys() & propagated.keys()
    assert source_arguments(row(), EditParams(start="random", **propagated))[1] == propagated
    off = EditParams(attention_propagation=0.0, feature_propagation=0.0)
    assert not source_arguments(row(preset="object"), off)[1].keys() & propagated.keys()
    assert source_arguments(row(), EditParams()) == ("tune-a-video", {})


def test_a_row_guided_away_from_the_caption_needs_no_trajectory(project):
    (project / "inverted/trajectory.safetensors").unlink()
    identities = [identity(project, **{"source_negative": 0.5} | changes) for changes in ({}, {"caption": "a woman"})]
    assert len({identity(project), *identities}) == 3
    videos = []
    for changes in ({"source_negative": 1.0}, {"negative_prompt": "a man"}, {}):
        edit(batch_of(project, row(), **changes), EventStream(lambda _: None))
        videos.append((project / "edits/a-dog.mp4").read_bytes())
    assert videos[0] == videos[1] != videos[2]


def test_rows_of_one_batch_have_the_same_preset_and_mask(project):
    rows = [row("a dog"), row("a cat", preset="style"), row("a cow", mask="mask.png"), row("an ox")]
    batch = batch_of(project, *rows)
    batch.batch_size = 9
    assert [one.prompt for one in batch.first_group(batch.rows)] == ["a dog", "an ox"]


# Long clips


@pytest.mark.parametrize("settings", [{}, {"mask": "mask.png", "fresh_noise": 0.5}, {"layout_strength": 0.5}])
def test_an_interrupted_autoregressive_row_resumes_bit_identically(project, monkeypatch, settings):
    options = {"window": WindowParams(context_length=2), "autoregressive": True, **settings}
    complete = batch_of(project, row(), **options)
    assert complete.rows[0].identity != identity(project, window=options["window"], **settings)
    received: list[Event] = []
    edit(complete, EventStream(received.append))
    steps = [event.done for event in received if isinstance(event, LoopProgressed) and event.row is None]
    assert steps == list(range(1, 2 * STEPS + 1))  # Two windows.
    video = (project / "edits/a-dog.mp4").read_bytes()
    assert json.loads((project / "edits/a-dog.json").read_text())["frames"] == 3
    shutil.rmtree(project / "edits")
    shutil.rmtree(project / "store")

    calls = []

    def stop(event: Event) -> None:
        if isinstance(event, LoopProgressed) and event.row is None:
            calls.append(event.done)
            if len(calls) == STEPS + 1:
                raise KeyboardInterrupt

    batch = batch_of(project, row(), **options)
    with pytest.raises(KeyboardInterrupt):
        edit(batch, EventStream(stop))
    (preview,) = (project / "store").glob("*.partial/preview.mp4")
    assert len(read_video(preview)[0]) == 2
    calls.clear()
    calls.extend([0] * 99)
    edit(batch_of(project, row(), **options), EventStream(stop))
    assert calls[99:] == [STEPS, *range(STEPS + 1, 2 * STEPS + 1)]
    assert (project / "edits/a-dog.mp4").read_bytes() == video
    assert [path.suffix for path in (project / "store").iterdir()] == [""]


def test_sound_of_the_clip_is_in_the_edit(project):
    silent = identity(project)
    write_tone(project / "frames/audio.m4a")
    assert identity(project) != silent == identity(project, audio=False)
    edit(batch_of(project, row()), EventStream())
    with av.open(str(project / "edits/a-dog.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video", "audio"]
    edit(batch_of(project, row(), audio=False), EventStream())
    with av.open(str(project / "edits/a-dog.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video"]
