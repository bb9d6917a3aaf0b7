"""Write networks in the layout of diffusers and transformers, as safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tav_model.errors import TavError, first_line
from tav_model.files import write_json
from tav_model.tensors import load_tensors, save_tensors

# Keys of a config that record versions of libraries and where a model was loaded from, rather than the model.
LEFT_OUT = ("_diffusers_version", "_name_or_path", "transformers_version", "torch_dtype", "dtype")


def export_network(network: Any, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write the config and the weights of a diffusers or transformers model to a folder, with weights in `dtype`."""
    diffusers = _is_of_diffusers(network)
    config = json.loads(network.to_json_string() if diffusers else network.config.to_json_string())
    weights = {name: tensor.detach().to("cpu", dtype) for name, tensor in network.state_dict().items()}
    save_tensors(folder / _file(network), weights, {"format": "pt"})
    kept = {key: value for key, value in config.items() if key not in LEFT_OUT}
    # Whatever it is stored in, it is computed in float32: transformers loads in the dtype of the config, diffusers in float32.
    write_json(folder / "config.json", kept if diffusers else {**kept, "dtype": "float32"})


def load_exported(network: Any, folder: Path) -> None:
    """Load the weights that `export_network` wrote to a folder, converted to the dtype of the network.

    Raises:
        TavError: there are none, or they are those of another network.
    """
    path = folder / _file(network)
    if not path.is_file():
        raise TavError(f"{path}: no weights there")
    weights, _ = load_tensors(path)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise TavError(f"{path}: weights of another network: {first_line(error)}") from error


def _is_of_diffusers(network: Any) -> bool:
    return hasattr(network, "register_to_config")


def _file(network: Any) -> str:
    return f"{'diffusion_pytorch_model' if _is_of_diffusers(network) else 'model'}.safetensors"
