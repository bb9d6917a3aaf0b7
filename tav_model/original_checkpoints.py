"""Import and export of UNets in the layout of the original Tune-A-Video code.

Such a folder has a `config.json` (class `UNet3DConditionModel`, blocks named `...3D`), and all weights, tuned or not, in
`diffusion_pytorch_model.bin` or `.safetensors`. The weights have the same names as here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from tav_model.errors import TavError, first_line
from tav_model.files import atomic_file, read_json, write_json
from tav_model.networks.attention_plan import TUNE_A_VIDEO, check_attention_frames
from tav_model.networks.inflation import inflate_config
from tav_model.networks.unet import UNet3DConditionModel
from tav_model.tensors import load_tensors, save_tensors

CONFIG_FILE = "config.json"
WEIGHTS_STEM = "diffusion_pytorch_model"
# Options that later versions of diffusers added, with the only value that the original code supports.
_FIXED = {"transformer_layers_per_block": 1, "dropout": 0.0}


def load_original(
    folder: str | Path, attention: Sequence[str] = TUNE_A_VIDEO, temporal: bool = True
) -> UNet3DConditionModel:
    """Load the UNet in `folder`, in eval mode.

    Raises:
        TavError: files are missing or damaged, weights do not fit the config or are not finite, or a `.bin` contains
            anything other than tensors.
    """
    folder = Path(folder)
    options = {"attention": list(check_attention_frames(attention)), "temporal": temporal}
    config = read_json(folder / CONFIG_FILE)
    if not isinstance(config, dict) or "block_out_channels" not in config:
        raise TavError(f"{folder / CONFIG_FILE}: not the config of a UNet")
    weights = _read_weights(folder)
    try:
        with torch.device("meta"):
            unet = UNet3DConditionModel.from_config(inflate_config(UNet3DConditionModel, config) | options)
    except (TavError, KeyError, TypeError, ValueError) as error:
        raise TavError(f"{folder / CONFIG_FILE}: not the config of a Tune-A-Video UNet ({first_line(error)})") from None
    own = unet.state_dict()
    if unmatched := sorted(own.keys() ^ weights.keys()):
        name, count = unmatched[0], len(unmatched)
        where = "missing from the file" if name in own else "not a weight of this model"
        raise TavError(f"{folder}: not a Tune-A-Video checkpoint: {name} is {where} ({count} such names)")
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise TavError(
                f"{folder}: {name} is {tuple(tensor.shape)}, but the config asks for {tuple(own[name].shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise TavError(f"{folder}: {name} has values that are not finite")
    unet.load_state_dict(weights, assign=True)
    return unet.eval()


def save_original(unet: UNet3DConditionModel, folder: str | Path, safetensors: bool = False) -> None:
    """Write all of `unet` as the original code's `from_pretrained` reads it.

    Raises:
        TavError: the original code does not have this configuration.
    """
    attention = (tuple(unet.config.attention), unet.config.temporal)
    if attention != (TUNE_A_VIDEO, True):
        raise TavError(f"the original code has only attention {TUNE_A_VIDEO} with temporal attention, not {attention}")
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    for key, value in _FIXED.items():
        if config.pop(key) != value:
            raise TavError(f"the original code has no {key}")
    for key in ("layers_per_block", "cross_attention_dim"):
        if not isinstance(config[key], int):
            raise TavError(f"the original code has one {key} for all levels, not {config[key]}")
    del config["attention"], config["temporal"]
    folder = Path(folder)
    binary, safe = folder / f"{WEIGHTS_STEM}.bin", folder / f"{WEIGHTS_STEM}.safetensors"
    weights = {name: value.detach().cpu().contiguous() for name, value in unet.state_dict().items()}
    if safetensors:
        save_tensors(safe, weights, {"format": "pt"})
    else:
        with atomic_file(binary) as temporary:
            torch.save(weights, temporary)
    # With two files of weights, it would depend on the reader which one is loaded.
    (binary if safetensors else safe).unlink(missing_ok=True)
    write_json(folder / CONFIG_FILE, {"_class_name": "UNet3DConditionModel", "_diffusers_version": "0.11.1"} | config)


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    if (path := folder / f"{WEIGHTS_STEM}.safetensors").exists():
        return load_tensors(path)[0]
    path = folder / f"{WEIGHTS_STEM}.bin"
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise TavError(f"{folder}: neither {WEIGHTS_STEM}.safetensors nor {path.name} is there") from None
    except Exception as error:  # Arbitrary bytes make the unpickler raise errors of any type.
        raise TavError(f"{path}: not a file of tensors alone, refused ({first_line(error)})") from None
    is_state = isinstance(weights, dict) and all(isinstance(name, str) for name in weights)
    if not is_state or not all(torch.is_tensor(value) for value in weights.values()):
        raise TavError(f"{path}: not a state dict")
    return weights
