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

    Returns:
        ``{"source": {METRIC: number}, "mean": {METRIC: number}, "edits": {NAME: {METRIC: number}}}``, rounded to six
        decimals; ``mean`` is over the edits. The metrics are named and defined in `tav_model.metrics.temporal` (always),
        `tav_model.metrics.clip` (with a model) and `toyworld.judge` (with the truth). ``excess_flicker`` is an edit's flicker
        less its source's. The source has neither that nor ``frame_accuracy``, which compare an edit with it.

    Raises:
        TavError: no edit; an edit without its JSON, without a prompt, or of another length or size than the source;
            a model that is missing or returns NaN.
    """
    import pandas as pd

    from tav_model.metrics.clip import ClipScorer
    from tav_model.metrics.temporal import estimate_motion

    paths = sorted(path for path in edits.glob("*.mp4") if not path.name.startswith("."))
    if not paths:
        raise TavError(f"{edits}: no edit to score; at least one NAME.mp4 must be there")
    prompts = {path: _read_prompt(path.with_suffix(".json")) for path in paths}

    def load(name: str | None) -> ClipScorer | None:
        return ClipScorer(resolve_model(name), device) if name else None

    with MODEL_LOADING:
        clip, pickscore = load(params.clip_model), load(params.pickscore_model)
    lossless = load_tensors(frames / "frames.safetensors")[0]["frames"].numpy()
    judge = _Judge(caption, estimate_motion(lossless), clip, pickscore, truth, indexes)
    if progress is not None:
        progress.total = 1 + len(paths)

    # The video codec smooths the edits, so their reference is the source after the same codec.
    with progress or contextlib.nullcontext():
        source, similarities = judge.measure(frames / "source.mp4", caption, progress)
        measured = {path.stem: judge.measure(path, prompts[path]["prompt"], progress, source) for path in paths}

    scores = {name: values for name, (values, _) in measured.items()}
    consistency = {
        "source": similarities,
        "edits": {name: rows for name, (_, rows) in measured.items() if rows is not None},
    }
    table = pd.DataFrame.from_dict(scores, orient="index")
    metrics: dict[str, Any] = {
        "source": _rounded(source),
        "mean": _rounded(table.mean()),
        "edits": {name: _rounded(values) for name, values in scores.items()},
    }
    with atomic_folder(out) as folder:
        # Few numbers, so that `dvc metrics show` fits on a screen; the table has those of each edit.
        write_json(folder / "metrics.json", {"source": metrics["source"], "mean": metrics["mean"]})
        rows = [{"name": path.stem, **prompts[path], **metrics["edits"][path.stem]} for path in paths]
        pd.DataFrame(rows).to_csv(folder / "scores.csv", index=False, lineterminator="\n")
        write_text(folder / "consistency.json", json.dumps(consistency, ensure_ascii=False, allow_nan=False) + "\n")
    return metrics


@dataclass(frozen=True)
class _Judge:
    """Measure the videos of one clip: the models, the source's motion, and the ground truth where it is known."""

    caption: str
    motion: Motion
    clip: ClipScorer | None
    pickscore: ClipScorer | None
    truth: Truth | None
    indexes: Sequence[int]

    def measure(
        self, path: Path, prompt: str, progress: Progress | None, source: Mapping[str, float] | None = None
    ) -> tuple[dict[str, float], list[list[float]] | None]:
        """Measure one video; given the metrics of its source, also by those that compare an edit with it.

        With a CLIP model, return the cosine similarities of all pairs of frames too.
        """
        from tav.media.videos import read_mp4
        from tav_model.metrics.clip import frame_similarities

        frames, _ = read_mp4(path)
        try:
            values = self._of_pixels(frames, source)
            similarities = None
            if self.clip is not None:
                images = self.clip.embed_frames(frames)
                values |= self._of_embeddings(self.clip, images, prompt, source)
                similarities = frame_similarities(images).round(PICTURE_DECIMALS).tolist()
            if self.pickscore is not None:
                values["pick_score"] = self._pick_score(self.pickscore, frames, prompt)
            if source is not None:
                values |= self._of_truth(frames, path.stem)
        except TavError as error:
            raise TavError(f"{path}: {error}") from error
        if progress is not None:
            progress.update()
        return values, similarities

    def _of_pixels(self, frames: np.ndarray, source: Mapping[str, float] | None) -> dict[str, float]:
        from tav_model.metrics.temporal import flicker, warping_error

        values = {"warping_error": warping_error(frames, self.motion), "flicker": flicker(frames)}
        if source is not None:
            values["excess_flicker"] = values["flicker"] - source["flicker"]
        return values

    def _of_embeddings(
        self, clip: ClipScorer, images: np.ndarray, prompt: str, source: Mapping[str, float] | None
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
        return values

    def _pick_score(self, model: ClipScorer, frames: np.ndarray, prompt: str) -> float:
        from tav_model.metrics.clip import pick_score

        (text,) = model.embed_texts([prompt])
        return pick_score(model.embed_frames(frames), text, model.logit_scale)

    def _of_truth(self, frames: np.ndarray, name: str) -> dict[str, float]:
        from toyworld.judge import Judge

        if self.truth is None or self.clip is None or name not in self.truth.edits:
            return {}
        edited, times = self.truth.edits[name], self.truth.times(self.indexes)
        return asdict(Judge(self.clip).verdict(frames, self.truth.scene, edited, times))


def _read_prompt(path: Path) -> dict[str, Any]:
    """Return the prompt and the category of one edit. Raises TavError where it has no prompt."""
    edit = read_json(path)
    if not isinstance(edit, dict) or not isinstance(edit.get("prompt"), str):
        raise TavError(f"{path}: no prompt; it must be an object with the text 'prompt'")
    return {"prompt": edit["prompt"], "category": edit.get("category")}


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(float(value), DECIMALS) + 0.0 for name, value in values.items()}  # + 0.0: no "-0.0"
