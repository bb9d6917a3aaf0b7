"""Weights of unknown origin: whole files, every weight there and no other, all of them finite.

The libraries that load them fill what is missing with random values, leave out what they do not know, and warn at most.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tav_model.errors import TavError
from tav_model.files import read_json
from tav_model.tensors import check_tensors

if TYPE_CHECKING:
    from torch import nn

# A buffer that can be computed; files of older libraries have it.
COMPUTED = "position_ids"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' progress bars and tables, which would bury the one line that says what is wrong."""
    import diffusers.utils.logging
    import transformers.utils.logging

    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity(library.CRITICAL)
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity, bar in before:
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()


def check_files(folder: str | Path) -> None:
    """Look at a model's config and at the headers of its safetensors files, as far as the folder has them.

    Raises:
        TavError: a file is truncated, or its header is not true of it; the config is no JSON object.
    """
    config = Path(folder) / "config.json"
    if config.exists() and not isinstance(read_json(config), dict):
        raise TavError(f"{config}: not the config of a model")
    for path in sorted(Path(folder).glob("*.safetensors")):
        check_tensors(path)


def check_loaded(model: nn.Module, report: Mapping[str, Iterable[Any]]) -> None:
    """Look at a model that diffusers or transformers has loaded.

    Args:
        report: what the library says of it, with `output_loading_info`.

    Raises:
        TavError: weights that are missing, surplus, of another shape or not finite; without the name of the model, which
            the caller knows.
    """
    import torch

    if missing := sorted(report["missing_keys"]):
        raise TavError(f"no weights for {missing[0]} ({len(missing)} such names)")
    if surplus := sorted(name for name in report["unexpected_keys"] if not name.endswith(COMPUTED)):
        raise TavError(f"weights of another model: {surplus[0]} ({len(surplus)} such names)")
    if other := sorted(name for name, *_ in report["mismatched_keys"]):
        raise TavError(f"weights of another shape than its config asks for: {other[0]} ({len(other)} such names)")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise TavError(f"{name} has values that are not finite")


def reason(error: BaseException) -> str:
    """Why a library could not load something, in one line."""
    cause: BaseException | None = error
    while cause is not None:
        # PyTorch's own words tell how to run what is in it.
        if isinstance(cause, pickle.UnpicklingError):
            return "a .bin file that holds anything else than tensors, refused"
        cause = cause.__cause__ or cause.__context__
    line = str(error).strip().partition("\n")[0]
    return "".join(letter if letter.isprintable() else " " for letter in line) or type(error).__name__
