"""Score: metrics of every edit of a clip, and of the clip itself as their reference."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.model_loading import MODEL_LOADING
from tav_model.errors import TavError
from tav_model.files import atomic_folder, read_json, write_json, write_text
from tav_model.tensors import StoredTensor

if TYPE_CHECKING:
    import numpy as np

    from tav.config import ScoreParams
    from tav.runtime.progress import Progress
    from tav_model.metrics.clip import ClipScorer
    from tav_model.metrics.temporal import Motion
    from toyworld.scenes import Truth

DECIMALS = 6
PART = 64  # frames in memory at a time
SMALLEST_KEPT = 0.01  # the share of pixels below which nothing is said of what should stay
SAME_COLOUR = 2  # of 255; larger differences are seen
PICTURE_DECIMALS = 4  # of what is looked at and not computed with
PICTURE_FRAMES = 128  # whose similarities are kept: all pairs of a long clip would be millions


def score(
    frames: Path,
    edits: Path,
    out: Path,
    *,
    caption: str,
    params: ScoreParams,
    resolve_model: Callable[[str], str],
    device: str = "cpu",
    truth: Truth | None = None,
    indexes: Sequence[int] = (),
    progress: Progress | None = None,
    kept: Callable[[Path], np.ndarray | None] = lambda _: None,
) -> dict[str, Any]:
    """Write ``metrics.json`` (source and mean) and ``scores.csv`` (each edit) into ``out``, and return what both hold.

    A third file, ``consistency.json``, holds the cosine similarities of all pairs of frames (of a long clip: of 128 frames,
    evenly spaced), whose mean is the frame consistency, as ``{"source": ROWS, "edits": {NAME: ROWS}}``. Without a CLIP
    model: ``{"source": null, "edits": {}}``.

    Args:
        frames: folder of the source clip: ``frames.safetensors``, and ``source.mp4`` with the same frames.
        edits: folder of ``NAME.mp4`` with ``NAME.json`` (prompt and category), with the source's number and size of frames.
        out: folder to write; an existing one is replaced.
        caption: the prompt that describes the source.
        params: the models that score; None leaves out one.
        device: the device that the models run on.
        resolve_model: turns the name of a model in the parameters into a folder or hub id.
        truth: the ground truth of a rendered clip. With a CLIP model, edits that it knows are also compared with it.
        indexes: the indexes of the frames in the complete clip; needed with ``truth``.
        progress: updated after each video; this function sets its total.
        kept: returns the pixels that an edit's mask leaves, `f H W` bool, for its video; None where it has none. Where the
            truth is known, the pixels count in which it equals the source.

    Returns:
        ``{"source": {METRIC: number}, "mean": {METRIC: number}, "edits": {NAME: {METRIC: number}}}``, rounded to six
        decimals; ``mean`` is over the edits. The metrics are named and defined in `tav_model.metrics.temporal` (always),
        `tav_model.metrics.clip` (with a model) and `toyworld.judge` (with the truth). ``excess_flicker`` is an edit's flicker
        less its source's, and ``alignment_gain`` its textual alignment less that of the source with the same prompt. The
        source has neither of them nor ``frame_accuracy``, which compare an edit with it.

    Raises:
        TavError: no edit; an edit without its JSON, without a prompt, or of another length or size than the source;
            a model that is missing or returns NaN.
    """
    import pandas as pd

    paths = sorted(path for path in edits.glob("*.mp4") if not path.name.startswith("."))
    if not paths:
        raise TavError(f"{edits}: no edit to score; at least one NAME.mp4 must be there")
    prompts = {path: _read_prompt(path.with_suffix(".json")) for path in paths}

    judge = load_judge(frames, caption, params, resolve_model, device, truth, indexes, kept)
    if progress is not None:
        progress.total = 1 + len(paths)

    with progress or contextlib.nullcontext():
        source = judge.measure_source(frames / "source.mp4", progress)
        measured = {path.stem: judge.measure(path, prompts[path]["prompt"], progress, source) for path in paths}

    consistency = {
        "source": source.similarities,
        "edits": {name: edit.similarities for name, edit in measured.items() if edit.similarities is not None},
    }
    table = pd.DataFrame.from_dict({name: edit.scores for name, edit in measured.items()}, orient="index")
    metrics: dict[str, Any] = {
        "source": rounded(source.scores),
        "mean": rounded(table.mean()),
        "edits": {name: rounded(edit.scores) for name, edit in measured.items()},
    }
    with atomic_folder(out) as folder:
        # Few numbers, so that `dvc metrics show` fits on a screen; the table has those of each edit.
        write_json(folder / "metrics.json", {"source": metrics["source"], "mean": metrics["mean"]})
        rows = [{"name": path.stem, **prompts[path], **metrics["edits"][path.stem]} for path in paths]
        pd.DataFrame(rows).to_csv(folder / "scores.csv", index=False, lineterminator="\n")
        write_text(folder / "consistency.json", json.dumps(consistency, ensure_ascii=False, allow_nan=False) + "\n")
    return metrics


def load_judge(
    frames: Path,
    caption: str,
    params: ScoreParams,
    resolve_model: Callable[[str], str],
    device: str,
    truth: Truth | None,
    indexes: Sequence[int],
    kept: Callable[[Path], np.ndarray | None] = lambda _: None,
) -> Judge:
    """Load what measures the videos of a clip; the arguments are those of `score`.

    Raises:
        TavError: a model or the source's frames are missing.
    """
    from tav_model.metrics.clip import ClipScorer

    def load(name: str | None) -> ClipScorer | None:
        return ClipScorer(resolve_model(name), device) if name else None

    with MODEL_LOADING:
        clip, pickscore = load(params.clip_model), load(params.pickscore_model)
    motion = SourceMotion(StoredTensor(frames / "frames.safetensors", "frames"))
    return Judge(caption, motion, clip, pickscore, truth, indexes, kept)


@dataclass(frozen=True)
class Measured:
    """What was measured of one video.

    Attributes:
        scores: by metric.
        similarities: the cosine similarities of all pairs of at most 128 frames; None without a CLIP model.
        images: the frames' embeddings, `f d`; None without a CLIP model.
        path: of the video.
    """

    scores: dict[str, float]
    similarities: list[list[float]] | None
    images: np.ndarray | None
    path: Path


class SourceMotion:
    """The motion of the source in parts of `PART` frames, each with the last frame of the former part before it.

    It is estimated once. That of a long clip is kept in temporary files, because it is many times as large as the clip.
    """

    def __init__(self, frames: StoredTensor) -> None:
        self.frames = frames
        self._folder = tempfile.TemporaryDirectory(prefix="tav-")
        self._only: Motion | None = None

    def part(self, start: int) -> Motion:
        """Return the motion of the part whose first new frame is `start`."""
        import numpy as np

        from tav_model.metrics.temporal import Motion, estimate_motion

        def estimated() -> Motion:
            return estimate_motion(self.frames[max(start - 1, 0) : start + PART].numpy())

        if len(self.frames) <= PART:
            self._only = self._only or estimated()
            return self._only
        path = Path(self._folder.name) / f"{start}.npz"
        if not path.exists():
            motion = estimated()
            np.savez(path, flow=motion.flow, visible=motion.visible)
            return motion
        with np.load(path, allow_pickle=False) as stored:
            return Motion(stored["flow"], stored["visible"])


@dataclass(frozen=True)
class Judge:
    """Measure the videos of one clip: the models, the source's motion, and the ground truth where it is known."""

    caption: str
    motion: SourceMotion
    clip: ClipScorer | None
    pickscore: ClipScorer | None
    truth: Truth | None
    indexes: Sequence[int]
    kept: Callable[[Path], np.ndarray | None] = lambda _: None

    def measure_source(self, path: Path, progress: Progress | None = None) -> Measured:
        """Measure the source: the edits' reference, stored by the same codec, because that smooths them."""
        return self.measure(path, self.caption, progress)

    def measure(
        self, path: Path, prompt: str, progress: Progress | None = None, source: Measured | None = None
    ) -> Measured:
        """Measure one video; given its source, also by the metrics that compare an edit with it.

        Raises:
            TavError: a damaged video, or of another length or size than the source.
        """
        from tav_model.metrics.clip import frame_similarities
        from tav_model.video import evenly_spaced

        try:
            values, embedded = self._of_pixels(path, source)
            images = embedded.get("clip")
            similarities = None
            if self.clip is not None and images is not None:
                values |= self._of_embeddings(self.clip, images, prompt, source)
                chosen = evenly_spaced(len(images), min(len(images), PICTURE_FRAMES))
                similarities = frame_similarities(images[chosen]).round(PICTURE_DECIMALS).tolist()
            if self.pickscore is not None:
                values["pick_score"] = self._pick_score(self.pickscore, embedded["pickscore"], prompt)
            if source is not None:
                values |= self._of_truth(path)
        except TavError as error:
            raise TavError(f"{path}: {error}") from error
        if progress is not None:
            progress.update()
        return Measured(values, similarities, images, path)

    def _of_pixels(self, path: Path, source: Measured | None) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Return the scores by pixels, and the embeddings by model, from parts of the video that fit into memory."""
        import numpy as np

        from tav_model.metrics.preservation import MotionFidelity, Similarity
        from tav_model.metrics.temporal import estimate_motion, flicker, warping_errors
        from tav_model.video import iterate_video

        models = {name: model for name, model in (("clip", self.clip), ("pickscore", self.pickscore)) if model}
        embedded: dict[str, list[np.ndarray]] = {name: [] for name in models}
        errors: list[float] = []
        changes, similarity, fidelity = 0.0, Similarity(), MotionFidelity()
        self._check_size(path)
        kept = None if source is None else self.kept(path)
        if kept is not None and kept.shape != self.motion.frames.shape[:3]:
            kept = np.zeros(self.motion.frames.shape[:3], bool)  # Of another clip: nothing is known to stay.
        source_parts = iter(()) if source is None else iterate_video(source.path, PART)
        last: np.ndarray | None = None
        for start, new in zip(range(0, len(self.motion.frames), PART), iterate_video(path, PART), strict=False):
            frames = new if last is None else np.concatenate([last, new])
            last = new[-1:]
            motion = self.motion.part(start)
            errors += warping_errors(frames, motion)
            changes += flicker(frames) * (len(frames) - 1)
            for name, model in models.items():
                embedded[name].append(model.embed_frames(new))
            if source is None:
                continue
            fidelity.add(estimate_motion(frames), motion)
            places = slice(start, start + len(new))
            stays = self._equal_in_truth(path.stem, places) if kept is None else kept[places]
            original = next(source_parts)
            if stays is not None and stays.any():
                similarity.add(new, original, stays)
        pairs = len(self.motion.frames) - 1
        values = {
            "warping_error": float(np.mean(errors)) if errors else 0.0,
            "flicker": changes / pairs if pairs else 0.0,
        }
        if source is not None:
            values["excess_flicker"] = values["flicker"] - source.scores["flicker"]
            values["motion_fidelity"] = fidelity.value
            # Nothing where it is not known which pixels should stay, or where none should.
            if similarity.pixels >= SMALLEST_KEPT * math.prod(self.motion.frames.shape[:3]):
                values |= {"psnr_kept": similarity.psnr, "ssim_kept": similarity.ssim}
        return values, {name: np.concatenate(parts) for name, parts in embedded.items()}

    def _check_size(self, path: Path) -> None:
        """Raise `TavError` for a video of another length or size than the source."""
        from tav_model.video import sample_video

        (frame,), count, _ = sample_video(path, lambda _: [0])
        expected = self.motion.frames.shape
        if (count, *frame.shape) != expected:
            raise TavError(
                f"frames: {count} of {frame.shape[1]}x{frame.shape[0]}, "
                f"but the source has {expected[0]} of {expected[2]}x{expected[1]}; they must agree"
            )

    def _of_embeddings(
        self, clip: ClipScorer, images: np.ndarray, prompt: str, source: Measured | None
    ) -> dict[str, float]:
        from tav_model.metrics import clip as metrics

        text, caption = clip.embed_texts([prompt, self.caption])
        values = {
            "frame_consistency": metrics.frame_consistency(images),
            "consecutive_consistency": metrics.consecutive_consistency(images),
            "textual_alignment": metrics.textual_alignment(images, text),
        }
        if source is not None:
            values["frame_accuracy"] = metrics.frame_accuracy(images, text, caption)
        # The caption itself, as a prompt, has nothing to gain.
        if source is not None and source.images is not None and prompt != self.caption:
            of_source = metrics.textual_alignment(source.images, text)
            values["alignment_gain"] = values["textual_alignment"] - of_source
        return values

    def _pick_score(self, model: ClipScorer, images: np.ndarray, prompt: str) -> float:
        from tav_model.metrics.clip import pick_score

        (text,) = model.embed_texts([prompt])
        return pick_score(images, text, model.logit_scale)

    def _equal_in_truth(self, name: str, places: slice) -> np.ndarray | None:
        """Return in which pixels of some frames the true edit equals the source, `f H W` bool; None without the truth."""
        import numpy as np

        from toyworld.renderer import render

        if self.truth is None or name not in self.truth.edits:
            return None
        times = self.truth.times(self.indexes)[places]
        source, edited = (
            np.stack([render(scene, time) for time in times]).astype(int)
            for scene in (self.truth.scene, self.truth.edits[name])
        )
        equal = np.abs(edited - source).max(axis=-1) <= SAME_COLOUR
        return equal if equal.shape[1:] == self.motion.frames.shape[1:3] else None

    def _of_truth(self, path: Path) -> dict[str, float]:
        """Compare an edit with its truth, in at most `PART` frames, evenly spaced: all pairs of them are compared."""
        from tav_model.video import evenly_spaced, sample_video
        from toyworld.judge import Judge as TruthJudge

        if self.truth is None or self.clip is None or path.stem not in self.truth.edits:
            return {}
        chosen = evenly_spaced(len(self.indexes), min(len(self.indexes), PART))
        frames, _, _ = sample_video(path, lambda _: chosen)
        times = self.truth.times(self.indexes)
        verdict = TruthJudge(self.clip).verdict(
            frames, self.truth.scene, self.truth.edits[path.stem], [times[i] for i in chosen]
        )
        return asdict(verdict)


def _read_prompt(path: Path) -> dict[str, Any]:
    """Return the prompt and the category of one edit. Raises TavError where it has no prompt."""
    edit = read_json(path)
    if not isinstance(edit, dict) or not isinstance(edit.get("prompt"), str):
        raise TavError(f"{path}: no prompt; it must be an object with the text 'prompt'")
    return {"prompt": edit["prompt"], "category": edit.get("category")}


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    """Return scores with as many decimals as files have."""
    return {name: round(float(value), DECIMALS) + 0.0 for name, value in values.items()}  # + 0.0: no "-0.0"
