"""Metrics of a video by CLIP embeddings: pure functions of embeddings, and the CLIP model that computes them.

Image embeddings are rows of ``(f, d)``, a text embedding is ``(d,)``. Their lengths do not matter, because every metric is
made of cosines. All functions raise `TavError` for embeddings without a direction (zero, NaN, infinite).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tav_model.errors import TavError, first_line
from tav_model.metrics.temporal import check_frames
from tav_model.weight_checks import quiet

if TYPE_CHECKING:
    import torch


def frame_consistency(images: np.ndarray) -> float:
    """Mean cosine similarity of all pairs of frames i < j (Tune-A-Video, arXiv 2212.11565).

    ``images``: (f, d). The paper multiplies it by 100. For a single frame it is 1.
    """
    images = normalise(images)
    count = len(images)
    if count == 1:
        return 1.0
    # |sum e|^2 contains each pair twice, and each frame with itself once.
    return float((np.square(images.sum(axis=0)).sum() - count) / (count * (count - 1)))


def consecutive_consistency(images: np.ndarray) -> float:
    """Mean cosine similarity of each frame with the next. ``images``: (f, d). For a single frame it is 1."""
    images = normalise(images)
    return float((images[:-1] * images[1:]).sum(axis=1).mean()) if len(images) > 1 else 1.0


def frame_similarities(images: np.ndarray) -> np.ndarray:
    """Cosine similarity of every two frames: (f, f), symmetric. ``images``: (f, d).

    `frame_consistency` is the mean of the values above the diagonal, `consecutive_consistency` of those next to it.
    """
    images = normalise(images)
    return np.clip(images @ images.T, -1, 1)


def textual_alignment(images: np.ndarray, text: np.ndarray) -> float:
    """Mean cosine similarity of the frames (f, d) with the prompt (d,) (Tune-A-Video).

    A plain cosine, in [-1, 1]. The paper multiplies it by 100 and calls it CLIP score; it has neither the clipping at 0
    nor the weight 2.5 of CLIPScore (arXiv 2104.08718).
    """
    return float(_cosines(images, text).mean())


def frame_accuracy(images: np.ndarray, edited: np.ndarray, source: np.ndarray) -> float:
    """Share of the frames (f, d) that are closer to the edited prompt (d,) than to the source prompt (d,).

    As in FateZero (arXiv 2303.09535). A tie does not count, so for two equal prompts it is 0.
    """
    return float((_cosines(images, edited) > _cosines(images, source)).mean())


def pick_score(images: np.ndarray, text: np.ndarray, logit_scale: float) -> float:
    """PickScore (arXiv 2305.01569): ``logit_scale`` times the cosine, here the mean over the frames.

    ``images`` (f, d) and ``text`` (d,) are embeddings of the PickScore model, a CLIP ViT-H/14 tuned on human
    preferences, and ``logit_scale`` is its learned temperature, already exponentiated (about 100).
    """
    return logit_scale * textual_alignment(images, text)


def normalise(embeddings: np.ndarray, what: str = "embeddings") -> np.ndarray:
    """Scale the rows of ``embeddings``, (n, d) or (d,), to length 1 and return them as (n, d) float64.

    Raises:
        TavError: there is no row, or one that is zero or not finite. The message begins with ``what``.
    """
    rows = np.atleast_2d(np.asarray(embeddings, np.float64))
    if rows.ndim != 2 or rows.size == 0:
        raise TavError(f"{what}: shape {rows.shape}; allowed is n d with at least one row")
    if not np.isfinite(rows).all():
        raise TavError(f"{what}: NaN or infinite; all values must be finite")
    largest = np.abs(rows).max(axis=1, keepdims=True)
    if not largest.all():
        raise TavError(f"{what}: a row is all zeros; a cosine needs a direction")
    rows = rows / largest  # so that the squares of tiny and huge values do not underflow or overflow
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _cosines(images: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Return the cosine of each image embedding (f, d) with the text embedding (d,): (f,)."""
    images, (text,) = normalise(images), normalise(text)
    return images @ text


class ClipScorer:
    """A CLIP model that embeds frames and texts: OpenAI's, a PickScore model, or another one in the same layout.

    Args:
        model: a folder with a `CLIPModel` in safetensors, its tokenizer and its ``preprocessor_config.json``, or a
            hub id. A folder is read without the network.
        device: where the model runs.
        dtype: the precision of the model; the embeddings are float32 in any case.
        chunk: frames embedded at a time, which bounds the memory.

    Attributes:
        logit_scale: the learned temperature, exponentiated, for `pick_score`.

    Raises:
        TavError: there is no such model, or it is not a complete CLIP model.
    """

    def __init__(
        self, model: str | Path, device: str = "cpu", dtype: str | torch.dtype = "float32", chunk: int = 16
    ) -> None:
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        self.name, self.device, self.chunk = str(model), device, chunk
        folder = Path(model).is_dir()
        try:
            with quiet():
                self.tokenizer = CLIPTokenizer.from_pretrained(model, local_files_only=folder)
                # The default processor needs torchvision; this one is the same in Pillow.
                self.processor = CLIPImageProcessorPil.from_pretrained(model, local_files_only=folder)
                clip, report = CLIPModel.from_pretrained(
                    model,
                    local_files_only=folder,
                    use_safetensors=True,
                    dtype=dtype,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # reported below, by name
                )
        except Exception as error:  # Damaged files make the libraries raise errors of any type.
            expected = "a CLIP model in safetensors" if folder else "a folder, nor a model that the hub gives"
            raise TavError(f"{model}: not {expected} ({first_line(error)})") from error
        # transformers replaces what a folder lacks by random weights and an empty tokenizer.
        unfit = sorted(report["missing_keys"]) + sorted(name for name, *_ in report["mismatched_keys"])
        if unfit:
            raise TavError(
                f"{model}: not a CLIP model; {len(unfit)} weights are missing or of another shape, as {unfit[0]}"
            )
        text = clip.config.text_config
        if not len(self.tokenizer.all_special_ids) < len(self.tokenizer) <= text.vocab_size:
            raise TavError(
                f"{model}: a tokenizer of {len(self.tokenizer)} tokens for a model of {text.vocab_size}; "
                "tokenizer.json (or vocab.json and merges.txt) of the same model must lie beside it"
            )
        self.model = clip.eval().requires_grad_(False).to(device)
        self.max_tokens = text.max_position_embeddings
        self.logit_scale = float(clip.logit_scale.float().exp())

    def embed_frames(self, frames: np.ndarray) -> np.ndarray:
        """Embed ``frames``, ``f h w c`` uint8 RGB, as vectors of length 1, (f, d) float32.

        Frames are preprocessed as the model's ``preprocessor_config.json`` specifies. For CLIP, the shorter side is resized
        to 224 pixels, bicubic, and the centre square is cropped.
        """
        import torch

        check_frames(frames)
        embeddings = []
        with torch.inference_mode():
            for start in range(0, len(frames), self.chunk):
                images = self.processor(
                    images=list(frames[start : start + self.chunk]),
                    input_data_format="channels_last",
                    return_tensors="pt",
                )
                pixels = images.pixel_values.to(self.device, self.model.dtype)
                embeddings.append(self.model.get_image_features(pixel_values=pixels).pooler_output)
            return self._finish(torch.cat(embeddings), "frames")

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Embed n texts, each cut off at the model's limit (CLIP: 77 tokens), as vectors of length 1, (n, d) float32."""
        import torch

        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.device)
        with torch.inference_mode():
            embeddings = self.model.get_text_features(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
            ).pooler_output
            return self._finish(embeddings, "texts")

    def _finish(self, embeddings: torch.Tensor, what: str) -> np.ndarray:
        return normalise(embeddings.float().cpu().numpy(), f"{self.name}: embeddings of {what}").astype(np.float32)
