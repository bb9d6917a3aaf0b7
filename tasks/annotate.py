"""Annotate: the conditions that control networks see of a clip, and which networks act in which of the later stages."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.model_loading import MODEL_LOADING
from tasks.stage_control import network_digest
from tav.config import ControlParams, DecodeParams, Params
from tav.config.control import check_control
from tav.config.paths import Project, project_path, resolve_model
from tav.config.stages import CONTROLLED_STAGES
from tav.media.control_frames import driving_section, read_given_frames
from tav.media.decoding import read_frames
from tav.media.frame_selection import fit_image, select_frames
from tav.runtime.devices import retry_with_smaller_batch
from tav.runtime.progress import Progress
from tav.versioning.cache_lookup import previous_output
from tav_model.digests import digest
from tav_model.errors import TavError
from tav_model.files import atomic_folder, write_json
from tav_model.tensors import load_tensors, read_metadata, read_shapes, save_tensors
from tav_model.video import write_video

if TYPE_CHECKING:
    import numpy as np

# Part of every condition's identity: increase it when conditions of the same inputs change.
FORMAT = "1"
CHUNK = 8  # Frames that an annotator's model sees at a time.


def annotate(root: Path, clip: str, params: Params, *, device: str, progress: Progress) -> None:
    """Write the output folder of the stage for one clip.

    For each stage that control may act in, `STAGE.json` lists the networks that act there: `kind`, `model`, `model_digest`,
    `scale`, `start`, `end`, `guess_mode`, `condition` and its `condition_digest`. Without control, these are empty lists and
    all there is. For each network there is a condition, `N-KIND.safetensors` (`frames`: uint8, `f h w c`), and `N-KIND.mp4`
    to look at. A condition that the stage has made before, of the same inputs, is not computed again.

    Args:
        root: the project's folder.
        clip: the clip, which is decoded.
        params: of the project.
        device: the device that annotators' models run on.
        progress: counts the frames of all networks.

    Raises:
        TavError: what the parameters name is missing, does not fit the base model, or does not fit the clip.
    """
    check_control(root, clip, params)
    control = params.for_clip(clip).control
    project = Project(root)
    out = project.control(clip)
    records: list[dict[str, Any]] = []
    with atomic_folder(out) as folder:
        if control:
            frames = project.frames(clip) / "frames.safetensors"
            shapes, metadata = read_shapes(frames)
            shape, fps = tuple(shapes["frames"]), Fraction(metadata["fps"])
            previous = previous_output(root, out.relative_to(root).as_posix())
            progress.total = shape[0] * len(control)
            with progress:
                for place, one in enumerate(control):
                    name = f"{place}-{one.kind}"
                    condition = _Condition(root, clip, params, one, frames)
                    _write_condition(folder / f"{name}.safetensors", condition, shape, previous, device, progress)
                    pixels = load_tensors(folder / f"{name}.safetensors")[0]["frames"].numpy()
                    write_video(folder / f"{name}.mp4", pixels, fps)
                    records.append(_record(root, one, folder / f"{name}.safetensors"))
        for stage in CONTROLLED_STAGES:
            acting = [record for one, record in zip(control, records, strict=True) if stage in one.stages]
            write_json(folder / f"{stage}.json", acting)


def _record(root: Path, one: ControlParams, condition: Path) -> dict[str, Any]:
    return {
        "kind": one.kind,
        "model": one.model,
        "model_digest": network_digest(resolve_model(root, one.model)),
        "scale": one.scale,
        "start": one.start,
        "end": one.end,
        "guess_mode": one.guess_mode,
        "condition": condition.name,
        "condition_digest": digest(condition),
    }


def _write_condition(
    path: Path,
    condition: _Condition,
    shape: tuple[int, ...],
    previous: Mapping[str, Path],
    device: str,
    progress: Progress,
) -> None:
    """Write a condition: one that was made before of the same inputs, or a new one."""
    import torch

    identity = condition.identity()
    for name, file in previous.items():
        if name.endswith(".safetensors"):
            with contextlib.suppress(TavError):  # A damaged one is made again.
                if read_metadata(file).get("identity") == identity:
                    shutil.copyfile(file, path)
                    progress.update(shape[0])
                    return
    before = progress.done

    def compute(size: int) -> np.ndarray:
        progress.update(before - progress.done)  # A retry starts over.
        return condition.frames(device, size, progress.update)

    pixels, _ = retry_with_smaller_batch(compute, CHUNK, "frames at a time")
    progress.update(before + shape[0] - progress.done)
    if pixels.shape != shape:
        (f, h, w, _), (frames, height, width, _) = pixels.shape, shape
        raise TavError(
            f"control: {condition.params.kind}: {f} frames of {w}x{h} pixels, but the clip has {frames} of {width}x{height}"
        )
    metadata = {"stage": "annotate", "shape": "f h w c", "scale": "0..255", "identity": identity}
    save_tensors(path, {"frames": torch.from_numpy(pixels)}, metadata | {"kind": condition.params.kind})


@dataclass(frozen=True)
class _Condition:
    """How one network's condition is made.

    Attributes:
        root: the project's folder.
        clip: the clip that is controlled.
        project: the parameters of all clips.
        params: the network's.
        decoded: the clip's frames.
    """

    root: Path
    clip: str
    project: Params
    params: ControlParams
    decoded: Path

    @property
    def _own_video(self) -> Path:
        return self._video(self.clip)

    def _video(self, clip: str) -> Path:
        return project_path(self.root, self.project.clip(clip).video, f"params.yaml: clips.{clip}.video")

    @property
    def _given(self) -> Path | None:
        given = self.params.given
        return None if given is None else project_path(self.root, given, "params.yaml: control: given")

    @property
    def _decode(self) -> DecodeParams:
        """The section by which frames are selected: the clip's, or that of the clip that drives it."""
        source = self.params.source
        return self._own_decode if source is None else driving_section(self._decode_of(source), self._own_decode)

    @property
    def _own_decode(self) -> DecodeParams:
        return self._decode_of(self.clip)

    def _decode_of(self, clip: str) -> DecodeParams:
        return self.project.for_clip(clip).decode

    @property
    def _scene(self) -> Path | None:
        """The scene file that depth is rendered from."""
        if self.params.kind != "depth" or self.params.annotator is not None:
            return None
        return Project(self.root).scene(self.params.source or self.clip)

    def identity(self) -> str:
        """Return a digest of everything that the condition depends on."""
        parts: list[str | Path] = [FORMAT, self.params.kind, self._own_decode.model_dump_json()]
        if self._given is not None:
            parts += [self._given, self.decoded]
        elif self._scene is not None:
            parts += [self._scene, self._decode.model_dump_json()]
        elif self.params.source is not None:
            parts += [self._video(self.params.source), self._decode.model_dump_json()]
        else:
            parts.append(self.decoded)
        for name in (self.params.annotator, self.params.detector):
            parts.append("" if name is None else network_digest(resolve_model(self.root, name)))
        return digest(*parts)

    def frames(self, device: str, chunk: int, on_chunk: Callable[[int], None]) -> np.ndarray:
        """Return the condition's frames, `f h w 3` in uint8.

        Args:
            device: the device that a model runs on.
            chunk: frames that it sees at a time.
            on_chunk: called after each chunk with its number of frames.
        """
        from tav_model.annotators.annotate import annotate

        if self._given is not None:
            return read_given_frames(self._given, self._own_video, self._own_decode)
        if self._scene is not None:
            return _exact_depth(self._scene, self._decode)
        if self.params.source is not None:
            pixels, _ = read_frames(self._video(self.params.source), self._decode)
        else:
            pixels = load_tensors(self.decoded)[0]["frames"].numpy()
        model, detector = (
            None if name is None else resolve_model(self.root, name)
            for name in (self.params.annotator, self.params.detector)
        )
        with MODEL_LOADING if model else contextlib.nullcontext():
            return annotate(self.params.kind, pixels, model, detector, device, chunk, on_chunk)


def _exact_depth(scene: Path, decode: DecodeParams) -> np.ndarray:
    """Return the depth of a rendered clip, exact, at the frames and the size of the section `decode`."""
    import numpy as np
    from PIL import Image

    from toyworld.depth import render_depth
    from toyworld.scenes import load_truth

    truth = load_truth(scene)
    times = truth.times(select_frames(decode, truth.frames))
    return np.stack([fit_image(Image.fromarray(render_depth(truth.scene, time)), decode) for time in times])
