"""Score every edit of a clip, and the clip itself as the reference they are read against."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tav_model.errors import TavError
from tav_model.files import atomic_folder, load_tensors, read_json, write_json

if TYPE_CHECKING:
    import numpy as np

    from tasks.params import Score
    from tasks.progress import Progress
    from tav_model.metrics import ClipScorer
    from tav_model.motion import Motion
    from toyworld.scenes import Truth

DECIMALS = 6


def score(
    frames: Path,
    edits: Path,
    out: Path,
    *,
    caption: str,
    params: Score,
    resolve_model: Callable[[str], str],
    device: str = "cpu",
    truth: Truth | None = None,
    indexes: Sequence[int] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write ``metrics.json`` (source and mean) and ``scores.csv`` (each edit) into ``out``, and return what both hold.

    Args:
        frames: folder of the source clip: ``frames.safetensors``, and ``source.mp4`` with the same frames.
        edits: folder of ``NAME.mp4`` with ``NAME.json`` (prompt and category); as many frames as the source, as large.
        out: folder that is replaced whole.
        caption: the prompt that describes the source.
        params: the models that score; None leaves one out.
        resolve_model: from the name of a model in the parameters to a folder or hub id.
        truth: of a clip that was rendered. Edits that it knows are also compared with it, if there is a CLIP model.
        indexes: of the frames in the whole clip; wanted with ``truth``.
        progress: updated after each video; its total is set here.

    Returns:
        ``{"source": {METRIC: number}, "mean": {METRIC: number}, "edits": {NAME: {METRIC: number}}}``, rounded to six
        decimals; ``mean`` is over the edits. The metrics are named and defined in `tav_model.motion` (always),
        `tav_model.metrics` (with a model) and `toyworld.judge` (with the truth). ``excess_flicker`` is an edit's flicker
        less its source's. The source has neither that nor ``frame_accuracy``, which compare an edit with it.

    Raises:
        TavError: no edit; an edit without its JSON, without a prompt, or of another length or size than the source;
            a model that is missing or gives NaN.
    """
    import pandas as pd

    from tav_model.metrics import ClipScorer
    from tav_model.motion import estimate_motion

    paths = sorted(path for path in edits.glob("*.mp4") if not path.name.startswith("."))
    if not paths:
        raise TavError(f"{edits}: no edit to score; at least one NAME.mp4 must be there")
    prompts = {path: _read_prompt(path.with_suffix(".json")) for path in paths}

    def load(name: str | None) -> ClipScorer | None:
        return ClipScorer(resolve_model(name), device) if name else None

    clip, pickscore = load(params.clip_model), load(params.pickscore_model)
    lossless = load_tensors(frames / "frames.safetensors")[0]["frames"].numpy()
    judge = _Judge(caption, estimate_motion(lossless), clip, pickscore, truth, indexes)
    if progress is not None:
        progress.total = 1 + len(paths)

    # The edits went through the video codec, which smooths; their reference is the source that went there too.
    with progress or contextlib.nullcontext():
        source = judge.measure(frames / "source.mp4", caption, progress)
        scores = {path.stem: judge.measure(path, prompts[path]["prompt"], progress, source) for path in paths}

    table = pd.DataFrame.from_dict(scores, orient="index")
    metrics = {
        "source": _rounded(source),
        "mean": _rounded(table.mean()),
        "edits": {name: _rounded(values) for name, values in scores.items()},
    }
    with atomic_folder(out) as folder:
        # Few numbers, so that `dvc metrics show` fits a screen; those of each edit are in the table.
        write_json(folder / "metrics.json", {"source": metrics["source"], "mean": metrics["mean"]})
        rows = [{"name": path.stem, **prompts[path], **metrics["edits"][path.stem]} for path in paths]
        pd.DataFrame(rows).to_csv(folder / "scores.csv", index=False, lineterminator="\n")
    return metrics


def read_scores(folder: Path) -> dict[str, dict[str, float]]:
    """The metrics of each edit, by its name, from the ``scores.csv`` in ``folder``."""
    import pandas as pd

    table = pd.read_csv(folder / "scores.csv", dtype={"name": str}).set_index("name")
    table = table.drop(columns=["prompt", "category"])
    # Edits without a known truth have fewer.
    return {name: row.dropna().to_dict() for name, row in table.iterrows()}


@dataclass(frozen=True)
class _Judge:
    """What all videos of one clip are measured with."""

    caption: str
    motion: Motion
    clip: ClipScorer | None
    pickscore: ClipScorer | None
    truth: Truth | None
    indexes: Sequence[int]

    def measure(
        self, path: Path, prompt: str, progress: Progress | None, source: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """The metrics of one video; given those of its source, also the ones that compare an edit with it."""
        from tasks.media import read_mp4

        frames, _ = read_mp4(path)
        try:
            values = self._of_pixels(frames, source) | self._of_embeddings(frames, prompt, source)
            if source is not None:
                values |= self._of_truth(frames, path.stem)
        except TavError as error:
            raise TavError(f"{path}: {error}") from error
        if progress is not None:
            progress.update()
        return values

    def _of_pixels(self, frames: np.ndarray, source: Mapping[str, float] | None) -> dict[str, float]:
        from tav_model.motion import flicker, warping_error

        values = {"warping_error": warping_error(frames, self.motion), "flicker": flicker(frames)}
        if source is not None:
            values["excess_flicker"] = values["flicker"] - source["flicker"]
        return values

    def _of_embeddings(self, frames: np.ndarray, prompt: str, source: Mapping[str, float] | None) -> dict[str, float]:
        from tav_model import metrics

        values = {}
        if self.clip is not None:
            images, (text, caption) = self.clip.embed_frames(frames), self.clip.embed_texts([prompt, self.caption])
            values["frame_consistency"] = metrics.frame_consistency(images)
            values["consecutive_consistency"] = metrics.consecutive_consistency(images)
            values["textual_alignment"] = metrics.textual_alignment(images, text)
            if source is not None:
                values["frame_accuracy"] = metrics.frame_accuracy(images, text, caption)
        if self.pickscore is not None:
            images, (text,) = self.pickscore.embed_frames(frames), self.pickscore.embed_texts([prompt])
            values["pick_score"] = metrics.pick_score(images, text, self.pickscore.logit_scale)
        return values

    def _of_truth(self, frames: np.ndarray, name: str) -> dict[str, float]:
        from toyworld.judge import Judge

        if self.truth is None or self.clip is None or name not in self.truth.edits:
            return {}
        edited, times = self.truth.edits[name], self.truth.times(self.indexes)
        return asdict(Judge(self.clip).verdict(frames, self.truth.scene, edited, times))


def _read_prompt(path: Path) -> dict[str, str | None]:
    """The prompt and the category of one edit."""
    edit = read_json(path)
    if not isinstance(edit, dict) or not isinstance(edit.get("prompt"), str):
        raise TavError(f"{path}: no prompt; it must be an object with the text 'prompt'")
    return {"prompt": edit["prompt"], "category": edit.get("category")}


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(float(value), DECIMALS) + 0.0 for name, value in values.items()}  # + 0.0: no "-0.0"
