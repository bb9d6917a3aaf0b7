"""Compile a network with `torch.compile`, which fuses what only moves memory; on a GPU, that is half of the time."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import nn

from tav_model.errors import TavError


def compile_network(network: nn.Module, device: str) -> None:
    """Compile a network in place. Its first call for every shape of its inputs takes a minute or so; the rest are faster.

    The names of its weights stay as they are. Fused operations round differently.

    Args:
        network: the network.
        device: where it runs.

    Raises:
        TavError: what compiles for the device is not installed.
    """
    if torch.device(device).type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise TavError("runtime.compile: needs Triton and a GPU that it supports; set it to false")
    else:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise TavError(
                "runtime.compile: needs a C++ compiler such as g++; install one, or set it to false"
            ) from None
    # The frames that a layer attends to are looked up in a cache, which compilation looks through.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    network.compile()


def is_compiled(network: nn.Module) -> bool:
    """Return whether a network is compiled, in place or as what `torch.compile` returns."""
    return hasattr(network, "_orig_mod") or getattr(network, "_compiled_call_impl", None) is not None


@contextlib.contextmanager
def uncompiled(network: nn.Module) -> Iterator[None]:
    """Run a network that is compiled in place as it is written, for as long as its layers have hooks.

    Compiled code does not notice hooks that are added later, or what they read.
    """
    compiled = getattr(network, "_compiled_call_impl", None)
    if compiled is None:
        yield
        return
    network._compiled_call_impl = None
    try:
        yield
    finally:
        network._compiled_call_impl = compiled
