"""The parts of a base model, loaded from a folder in diffusers' layout or a hub id, one at a time."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tav_model.digests import digest
from tav_model.errors import TavError
from tav_model.weight_checks import check_files, check_loaded, quiet, reason

if TYPE_CHECKING:
    import torch

    from tav_model import TuneAVideoPipeline, UNet3DConditionModel

PARTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")


@lru_cache(maxsize=4)
def base_digest(base: str) -> str:
    """What identifies the weights of a base model: the contents of a folder's parts, or the hub id as it is."""
    folder = Path(base)
    if not folder.is_dir():
        return f"hub:{base}"
    return digest(*(folder / part for part in PARTS if (folder / part).is_dir()))


def load_part(base: str, part: str, **kwargs: Any) -> Any:
    """One of `PARTS` but the UNet, in eval mode.

    Raises:
        TavError: it is not there or damaged: not whole, weights missing, surplus or not finite, no words.
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

        # Transformers would keep the precision of the files.
        kwargs.setdefault("dtype", torch.float32)
        kwargs["ignore_mismatched_sizes"] = True  # They are named below.
    check_files(Path(base) / part)
    if has_weights:
        kwargs["output_loading_info"] = True
    try:
        with quiet():
            loaded = classes[part].from_pretrained(base, subfolder=part, **kwargs)
    except Exception as error:  # On damaged files, the libraries fail in any way they happen to.
        raise TavError(f"{base}: no {part} can be loaded from it ({reason(error)})") from error
    if part == "tokenizer" and len(loaded) <= len(loaded.all_special_ids):
        # What transformers makes of a folder without vocabulary.
        raise TavError(f"{base}: no tokenizer can be loaded from it (no words: vocab.json and merges.txt are needed)")
    if not has_weights:
        return loaded
    loaded, loading = loaded
    try:
        check_loaded(loaded, loading)
    except TavError as error:
        raise TavError(f"{base}: {part}: {error}") from None
    return loaded.eval()


def load_tuned_unet(
    base: str, tuned: Path, attention: Any, device: str, dtype: torch.dtype
) -> tuple[UNet3DConditionModel, dict[str, Any]]:
    """The inflated UNet with the weights in the folder `tuned`, and what `tuned.json` says.

    Raises:
        TavError: weights tuned from another base or with another attention configuration.
    """
    from tav_model import UNet3DConditionModel
    from tav_model.tuned_weights import read_info

    info = read_info(tuned)
    if info.get("base_digest") != base_digest(base):
        raise TavError(
            f"{tuned}: tuned from {info.get('base_model')}, but the base model {base} is another or has changed; "
            "tune again (dvc repro -f, for the stage tune)"
        )
    unet = UNet3DConditionModel.from_pretrained_2d(
        base, attention=tuple(attention.spatial), temporal=attention.temporal, torch_dtype=dtype
    )
    unet.load_tuned(tuned)
    return unet.to(device), info


def load_pipeline(base: str, tuned: Path, attention: Any, device: str, dtype: torch.dtype) -> TuneAVideoPipeline:
    """Everything that renders an edit. The VAE and the text encoder stay in float32."""
    from tav_model import TuneAVideoPipeline

    unet, _ = load_tuned_unet(base, tuned, attention, device, dtype)
    pipeline = TuneAVideoPipeline(
        vae=load_part(base, "vae").to(device),
        text_encoder=load_part(base, "text_encoder").to(device),
        tokenizer=load_part(base, "tokenizer"),
        unet=unet,
        scheduler=load_part(base, "scheduler"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
