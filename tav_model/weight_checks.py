"""Checks of weights of unknown origin: complete files, all weights of the model and no others, all finite.

The libraries that load them replace missing weights by random ones and ignore surplus ones, with a warning at most.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tav_model.errors import TavError, first_line
from tav_model.files import read_json
from tav_model.tensors import check_tensors

if TYPE_CHECKING:
    from torch import nn

# A buffer that can be computed. Files that older libraries wrote have it.
COMPUTED = "position_ids"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the libraries' progress bars and tables, which would bury the one line of an error message."""
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


@contextlib.contextmanager
def without_torchvision_advice() -> Iterator[None]:
    """Suppress the advice of transformers to install torchvision.

    It is for image processors that diffusers imports with its pipelines, and that nothing here uses.
    """

    def is_other(record: logging.LogRecord) -> bool:
        return "requires torchvision" not in record.getMessage()

    logger = logging.getLogger("transformers.utils.import_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


def check_files(folder: str | Path) -> None:
    """Check a model's config and the headers of its safetensors files, as far as the folder has them.

    Raises:
        TavError: a file is truncated or does not match its header, or the config is not a JSON object.
    """
    config = Path(folder) / "config.json"
    if config.exists() and not isinstance(read_json(config), dict):
        raise TavError(f"{config}: not the config of a model")
    for path in sorted(Path(folder).glob("*.safetensors")):
        check_tensors(path)


def check_loaded(name: str, model: nn.Module, report: Mapping[str, Iterable[Any]]) -> None:
    """Check a model that diffusers or transformers has loaded.

    Args:
        name: of the model in messages.
        model: the model.
        report: the library's report, from `output_loading_info=True`.

    Raises:
        TavError: weights are missing, surplus, of another shape or not finite.
    """
    import torch

    if missing := sorted(report["missing_keys"]):
        raise TavError(f"{name}: no weights for {missing[0]} ({len(missing)} such names)")
    if surplus := sorted(key for key in report["unexpected_keys"] if not key.endswith(COMPUTED)):
        raise TavError(f"{name}: weights of another model: {surplus[0]} ({len(surplus)} such names)")
    if other := sorted(key for key, *_ in report["mismatched_keys"]):
        raise TavError(
            f"{name}: weights of another shape than its config asks for: {other[0]} ({len(other)} such names)"
        )
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise TavError(f"{name}: {key} has values that are not finite")


def reason(error: BaseException) -> str:
    """Return why a library could not load something, in one line."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    cause: BaseException | None = error
    while cause is not None:
        # PyTorch's own message explains how to run the code in the file.
        if isinstance(cause, pickle.UnpicklingError):
            return "a .bin file that holds anything else than tensors, refused"
        # The libraries' messages blame the model: they say that it has no such file.
        if isinstance(cause, LocalEntryNotFoundError):
            return "it is not in the hub's local cache, and the hub cannot be reached"
        cause = cause.__cause__ or cause.__context__
    return "".join(letter if letter.isprintable() else " " for letter in first_line(error))
