"""Score: metrics of every edit of a clip, and of the clip itself as their reference."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.model_loading import MODEL_LOADING
from tav_model.errors import TavError
from tav_model.files import atomic_folder, read_json, write_json, write_text
from tav_model.tensors import load_tensors

if TYPE_CHECKING:
    import numpy as np

    from tav.config import ScoreParams
    from tav.runtime.progress import Progress
    from tav_model.metrics.clip import ClipScorer
    from tav_model.metrics.temporal import Motion
    from toyworld.scenes import Truth

DECIMALS = 6
SMALLEST_KEPT = 0.01  # the share of pixels below which nothing is said of what should stay
SAME_COLOUR = 2  # of 255; larger differences are seen
PICTURE_DECIMALS = 4  # of what is looked at and not computed with


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

    A third file, ``consistency.json``, holds the cosine similarities of all pairs of frames, whose mean is the frame
    consistency, as ``{"source": ROWS, "edits": {NAME: ROWS}}``. Without a CLIP model: ``{"source": null, "edits": {}}``.

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
    from tav_model.metrics.temporal import estimate_motion

    def load(name: str | None) -> ClipScorer | None:
        return ClipScorer(resolve_model(name), device) if name else None

    with MODEL_LOADING:
        clip, pickscore = load(params.clip_model), load(params.pickscore_model)
    lossless = load_tensors(frames / "frames.safetensors")[0]["frames"].numpy()
    return Judge(caption, estimate_motion(lossless), clip, pickscore, truth, indexes, kept)


@dataclass(frozen=True)
class Measured:
    """What was measured of one video.

    Attributes:
        scores: by metric.
        similarities: the cosine similarities of all pairs of frames; None without a CLIP model.
        images: the frames' embeddings, `f d`; None without a CLIP model.
        frames: the video, `f h w 3` in uint8.
    """

    scores: dict[str, float]
    similarities: list[list[float]] | None
    images: np.ndarray | None
    frames: np.ndarray


@dataclass(frozen=True)
class Judge:
    """Measure the videos of one clip: the models, the source's motion, and the ground truth where it is known."""

    caption: str
    motion: Motion
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
        from tav_model.video import read_video

        frames, _ = read_video(path)
        try:
            values = self._of_pixels(frames, source)
            images = similarities = None
            if self.clip is not None:
                images = self.clip.embed_frames(frames)
                values |= self._of_embeddings(self.clip, images, prompt, source)
                similarities = frame_similarities(images).round(PICTURE_DECIMALS).tolist()
            if self.pickscore is not None:
                values["pick_score"] = self._pick_score(self.pickscore, frames, prompt)
            if source is not None:
                values |= self._of_what_stays(frames, source.frames, path)
                values |= self._of_truth(frames, path.stem)
        except TavError as error:
            raise TavError(f"{path}: {error}") from error
        if progress is not None:
            progress.update()
        return Measured(values, similarities, images, frames)

    def _of_pixels(self, frames: np.ndarray, source: Measured | None) -> dict[str, float]:
        from tav_model.metrics.preservation import motion_fidelity
        from tav_model.metrics.temporal import estimate_motion, flicker, warping_error

        values = {"warping_error": warping_error(frames, self.motion), "flicker": flicker(frames)}
        if source is not None:
            values["excess_flicker"] = values["flicker"] - source.scores["flicker"]
            values["motion_fidelity"] = motion_fidelity(estimate_motion(frames), self.motion)
        return values

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

    def _pick_score(self, model: ClipScorer, frames: np.ndarray, prompt: str) -> float:
        from tav_model.metrics.clip import pick_score

        (text,) = model.embed_texts([prompt])
        return pick_score(model.embed_frames(frames), text, model.logit_scale)

    def _of_what_stays(self, frames: np.ndarray, source: np.ndarray, path: Path) -> dict[str, float]:
        """Compare the pixels that should stay with the source's; nothing where it is not known which, or none should."""
        from tav_model.metrics.preservation import psnr, ssim

        kept = self.kept(path)
        if kept is None:
            kept = self._equal_in_truth(path.stem)
        if kept is None or kept.shape != frames.shape[:3] or kept.mean() < SMALLEST_KEPT:
            return {}
        return {"psnr_kept": psnr(frames, source, kept), "ssim_kept": ssim(frames, source, kept)}

    def _equal_in_truth(self, name: str) -> np.ndarray | None:
        """Return in which pixels the true edit equals the source, `f H W` bool; None where the truth is not known."""
        import numpy as np

        from toyworld.renderer import render

        if self.truth is None or name not in self.truth.edits:
            return None
        times = self.truth.times(self.indexes)
        source, edited = (
            np.stack([render(scene, time) for time in times]).astype(int)
            for scene in (self.truth.scene, self.truth.edits[name])
        )
        return np.abs(edited - source).max(axis=-1) <= SAME_COLOUR

    def _of_truth(self, frames: np.ndarray, name: str) -> dict[str, float]:
        from toyworld.judge import Judge as TruthJudge

        if self.truth is None or self.clip is None or name not in self.truth.edits:
            return {}
        edited, times = self.truth.edits[name], self.truth.times(self.indexes)
        return asdict(TruthJudge(self.clip).verdict(frames, self.truth.scene, edited, times))


def _read_prompt(path: Path) -> dict[str, Any]:
    """Return the prompt and the category of one edit. Raises TavError where it has no prompt."""
    edit = read_json(path)
    if not isinstance(edit, dict) or not isinstance(edit.get("prompt"), str):
        raise TavError(f"{path}: no prompt; it must be an object with the text 'prompt'")
    return {"prompt": edit["prompt"], "category": edit.get("category")}


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    """Return scores with as many decimals as files have."""
    return {name: round(float(value), DECIMALS) + 0.0 for name, value in values.items()}  # + 0.0: no "-0.0"
