"""A base model with LoRAs, textual inversions or a single-file checkpoint in it, as a folder in diffusers' layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tav_model.base_models import PARTS, base_digest, load_part
from tav_model.digests import file_sha256
from tav_model.errors import TavError, first_line
from tav_model.files import atomic_folder, read_json, write_json
from tav_model.vocabulary import FILE as VOCABULARY
from tav_model.vocabulary import prompt_words

if TYPE_CHECKING:
    import torch

NETWORKS = ("unet", "vae", "text_encoder")
ORIGIN = "origin.json"
"""What a base model was made of."""


@dataclass(frozen=True)
class Lora:
    """A LoRA file, and by how much its update is multiplied."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True)
class TextualInversion:
    """A file of embeddings, and the token that stands for them; None: the file's own."""

    path: Path
    token: str | None = None


@dataclass(frozen=True)
class MadeBase:
    """What a base model was made of.

    Attributes:
        replaced: the networks whose weights came from the single file.
        updated: the number of modules that each LoRA updated.
        tokens: the tokens of the textual inversions with their numbers of vectors.
    """

    replaced: tuple[str, ...]
    updated: tuple[int, ...]
    tokens: dict[str, int]


def make_base(
    folder: Path,
    base: str,
    base_name: str,
    *,
    loras: Sequence[Lora] = (),
    textual_inversions: Sequence[TextualInversion] = (),
    single_file: Path | None = None,
    announce: Callable[[str], None] = lambda _: None,
) -> MadeBase:
    """Write a base model that any program reads: in diffusers' layout, as safetensors.

    First the weights are those of the single file, then the LoRAs are added in order, then the tokens. Networks keep the
    precision in which they are stored.

    Args:
        folder: where to; an existing one is replaced.
        base: the folder or hub id of the base model that it is made from, which sets the architecture.
        base_name: its name, for the record.
        loras: fused into the UNet and the text encoder.
        textual_inversions: added to the tokenizer and the text encoder.
        single_file: a checkpoint whose weights take the place of the base's.
        announce: called with what is done next.

    Raises:
        TavError: a file that is none, or does not fit the base model. Nothing is written then.
    """
    from tav_model.export import export_network
    from tav_model.personalization.lora_files import fuse, read_lora
    from tav_model.personalization.single_file import load_single_file
    from tav_model.personalization.textual_inversion import add_embedding, read_embedding

    announce(f"reading {base_name}")
    source = _local_folder(base)
    networks = {part: _load_network(source, part) for part in NETWORKS}
    tokenizer = load_part(str(source), "tokenizer")
    load_part(str(source), "scheduler")  # Checked like the others; its file is copied.
    precisions = {part: _stored_precision(source / part) for part in NETWORKS}

    replaced: dict[str, torch.dtype] = {}
    if single_file is not None:
        announce(f"converting {single_file.name}")
        replaced = load_single_file(single_file, networks)
    updated = []
    for lora in loras:
        announce(f"adding {lora.path.name}")
        targets = {part: networks[part] for part in ("unet", "text_encoder")}
        updates = read_lora(lora.path, targets)
        for target, update in updates.items():
            fuse(networks[target.network], target.module, update, lora.scale)
        updated.append(len(updates))
    tokens = {}
    for inversion in textual_inversions:
        announce(f"adding {inversion.path.name}")
        token, vectors = read_embedding(inversion.path, inversion.token)
        try:
            add_embedding(tokenizer, networks["text_encoder"], token, vectors)
        except TavError as error:
            raise TavError(f"{inversion.path}: {error}") from None
        tokens[token] = len(vectors)

    with atomic_folder(folder) as temporary:
        for part, network in networks.items():
            announce(f"writing {part}")
            _check_finite(part, network)
            export_network(network, temporary / part, replaced.get(part, precisions[part]))
        _copy_texts(source / "scheduler", temporary / "scheduler")
        if tokens:
            _save_tokenizer(tokenizer, temporary / "tokenizer")
        else:
            _copy_texts(source / "tokenizer", temporary / "tokenizer")
        if (source / VOCABULARY).is_file():
            write_json(temporary / VOCABULARY, _vocabulary_with(source / VOCABULARY, tokens))
        write_json(temporary / "model_index.json", _model_index(source))
        write_json(temporary / ORIGIN, _origin(base_name, base, loras, textual_inversions, single_file))
    return MadeBase(tuple(replaced), tuple(updated), tokens)


def _local_folder(base: str) -> Path:
    """Return the base model's folder; that in the hub's cache for a hub id, downloaded if need be."""
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download

    names = ("*.json", "*.txt", "model.safetensors", "diffusion_pytorch_model.safetensors", "*-of-*.safetensors")
    try:
        return Path(snapshot_download(base, allow_patterns=[f"{part}/{name}" for part in PARTS for name in names]))
    except Exception as error:  # Of any type, depending on what the network and the hub do.
        raise TavError(f"{base}: cannot be downloaded ({first_line(error)})") from error


def _load_network(source: Path, part: str) -> Any:
    if part != "unet":
        return load_part(str(source), part)
    from diffusers import UNet2DConditionModel

    from tav_model.weight_checks import check_files, check_loaded, quiet, reason

    check_files(source / part)
    try:
        with quiet():
            network, loading = UNet2DConditionModel.from_pretrained(
                source, subfolder=part, local_files_only=True, output_loading_info=True
            )
    except Exception as error:  # Damaged files make diffusers raise errors of any type.
        raise TavError(f"{source}: no {part} can be loaded from it ({reason(error)})") from error
    check_loaded(f"{source}: {part}", network, loading)
    return network


def _stored_precision(folder: Path) -> torch.dtype:
    """Return the precision of the weights in a folder; float32 where they are no safetensors."""
    import torch
    from safetensors import safe_open

    names = {"F16": torch.float16, "BF16": torch.bfloat16}
    for name in ("diffusion_pytorch_model.safetensors", "model.safetensors"):
        if (folder / name).is_file():
            with safe_open(folder / name, framework="pt") as file:
                return names.get(file.get_slice(next(iter(file.keys()))).get_dtype(), torch.float32)
    return torch.float32


def _check_finite(part: str, network: Any) -> None:
    import torch

    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise TavError(f"{part}: {name} is not finite any more; use smaller scales of the LoRAs")


def _copy_texts(source: Path, folder: Path) -> None:
    """Copy the files of a part that has no weights."""
    folder.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in (".json", ".txt"):
            shutil.copyfile(path, folder / path.name)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    config = read_json(folder / "tokenizer_config.json")
    # How it was loaded, rather than what it is.
    for key in ("is_local", "local_files_only", "name_or_path"):
        config.pop(key, None)
    write_json(folder / "tokenizer_config.json", config)


def _vocabulary_with(path: Path, tokens: dict[str, int]) -> dict[str, Any]:
    """Return the record of a closed vocabulary with the words of the new tokens."""
    record: dict[str, Any] = read_json(path)
    added = [word for token in tokens for word in prompt_words(token)]
    return {**record, "other_words": [*record["other_words"], *added]} if added else record


def _model_index(source: Path) -> dict[str, Any]:
    scheduler = read_json(source / "scheduler" / "scheduler_config.json")
    return {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler.get("_class_name", "DDIMScheduler")],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _origin(
    base_name: str,
    base: str,
    loras: Sequence[Lora],
    textual_inversions: Sequence[TextualInversion],
    single_file: Path | None,
) -> dict[str, Any]:
    """Describe what a base model is made of; files by name and digest, because paths mean nothing elsewhere."""

    def file(path: Path) -> dict[str, str]:
        return {"file": path.name, "sha256": file_sha256(path).hexdigest()}

    return {
        "base_model": base_name,
        "base_digest": base_digest(base),
        "single_file": file(single_file) if single_file is not None else None,
        "loras": [{**file(lora.path), "scale": lora.scale} for lora in loras],
        "textual_inversions": [{**file(one.path), "token": one.token} for one in textual_inversions],
    }
