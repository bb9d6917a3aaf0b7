"""The parts of a base model, loaded from a folder in diffusers' layout or a hub id, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tav_model.digests import digest
from tav_model.errors import TavError
from tav_model.weight_checks import check_files, check_loaded, quiet, reason

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tav_model.networks.unet import UNet3DConditionModel
    from tav_model.pipeline import TuneAVideoPipeline

PARTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")


@lru_cache(maxsize=4)
def base_digest(base: str) -> str:
    """Return the identity of a base model: a digest of the folder's parts, or the hub id itself."""
    folder = Path(base)
    if not folder.is_dir():
        return f"hub:{base}"
    return digest(*(folder / part for part in PARTS if (folder / part).is_dir()))


def check_base(base: str) -> None:
    """Check that a folder has the parts of a base model. Hub ids are not looked at.

    Raises:
        TavError: a part is missing.
    """
    missing = [part for part in PARTS if not (Path(base) / part).is_dir()]
    if Path(base).is_dir() and missing:
        raise TavError(f"{base}: not a base model in diffusers' layout: no folder {', '.join(missing)}")


def load_part(base: str, part: str, **kwargs: Any) -> Any:
    """Load one of `PARTS` other than the UNet, in eval mode.

    Args:
        base: the base model's folder or hub id.
        part: which part.
        kwargs: for its `from_pretrained`.

    Raises:
        TavError: the part is missing or damaged: files truncated, weights missing, surplus or not finite, a tokenizer
            without vocabulary.
    """
    from diffusers import AutoencoderKL, DDIMScheduler
    from transformers import CLIPTextModel, CLIPTokenizer

    classes = {
        "scheduler": DDIMScheduler,
        "text_encoder": CLIPTextModel,
        "tokenizer": CLIPTokenizer,
        "vae": AutoencoderKL,
    }
    kwargs["local_files_only"] = Path(base).is_dir()
    has_weights = part in ("text_encoder", "vae")
    if part == "text_encoder":
        import torch

        # By default, transformers keeps the precision of the files.
        kwargs.setdefault("dtype", torch.float32)
        kwargs["ignore_mismatched_sizes"] = True  # `check_loaded` names them.
    check_files(Path(base) / part)
    if has_weights:
        kwargs["output_loading_info"] = True
    try:
        with quiet():
            loaded = classes[part].from_pretrained(base, subfolder=part, **kwargs)
    except Exception as error:  # Damaged files make the libraries raise errors of any type.
        raise TavError(f"{base}: no {part} can be loaded from it ({reason(error)})") from error
    if part == "tokenizer" and len(loaded) <= len(loaded.all_special_ids):
        # Transformers loads even a folder without a vocabulary.
        raise TavError(f"{base}: no tokenizer can be loaded from it (no words: vocab.json and merges.txt are needed)")
    if not has_weights:
        return loaded
    loaded, loading = loaded
    check_loaded(f"{base}: {part}", loaded, loading)
    return loaded.eval()


def load_tuned_unet(
    base: str, tuned: Path, attention: Sequence[str], temporal: bool, device: str, dtype: torch.dtype
) -> tuple[UNet3DConditionModel, dict[str, Any]]:
    """Load the inflated UNet with tuned weights.

    Args:
        base: the base model's folder or hub id.
        tuned: the folder of the tuned weights.
        attention: the frames that are attended to, see `tav_model.networks.attention_plan`.
        temporal: whether the temporal attention takes part.
        device: where to load it.
        dtype: in which precision.

    Returns:
        The UNet, and the contents of `tuned.json`.

    Raises:
        TavError: weights tuned from another base or with another attention configuration.
    """
    from tav_model.networks.unet import UNet3DConditionModel
    from tav_model.tuned_weights import read_info

    info = read_info(tuned)
    if info.get("base_digest") != base_digest(base):
        raise TavError(
            f"{tuned}: tuned from {info.get('base_model')}, but the base model {base} is another or has changed; "
            "tune again (dvc repro -f, for the stage tune)"
        )
    unet = UNet3DConditionModel.from_pretrained_2d(base, attention=attention, temporal=temporal, torch_dtype=dtype)
    unet.load_tuned(tuned)
    return unet.to(device), info


def load_pipeline(
    base: str,
    tuned: Path,
    attention: Sequence[str],
    temporal: bool,
    device: str,
    dtype: torch.dtype,
    controlnet: Sequence[nn.Module] = (),
) -> TuneAVideoPipeline:
    """Load the pipeline that renders edits, with the arguments of `load_tuned_unet`.

    `dtype` is that of the UNet. The VAE and the text encoder are in float32. `controlnet` are control networks, if any.
    """
    from tav_model.pipeline import TuneAVideoPipeline

    unet, _ = load_tuned_unet(base, tuned, attention, temporal, device, dtype)
    pipeline = TuneAVideoPipeline(
        vae=load_part(base, "vae").to(device),
        text_encoder=load_part(base, "text_encoder").to(device),
        tokenizer=load_part(base, "tokenizer"),
        unet=unet,
        scheduler=load_part(base, "scheduler"),
        controlnet=list(controlnet) or None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
