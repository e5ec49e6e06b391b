"""What code for a GPU depends on: the GPU's architecture, and the driver."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Iterator
from typing import Any

import torch

from .probe import names_looked_up

with names_looked_up():
    from torch._subclasses import fake_tensor


def is_in_use() -> bool:
    """Whether this process has a context on a GPU, and with it some memory there."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def has_triton() -> bool:
    """Whether Inductor finds Triton."""
    return bool(importlib.import_module("torch._inductor.runtime.triton_compat").HAS_TRITON)


def give_back_cached(beyond: int = 0) -> None:
    """Give back the memory of GPUs that PyTorch keeps and no tensor needs, if it is more than `beyond` bytes."""
    if is_in_use() and torch.cuda.memory_reserved() - torch.cuda.memory_allocated() > beyond:
        torch.cuda.empty_cache()


_STACK = 256
"""Bytes of stack for each thread that could run at once: 66 MiB of an H100. CUDA's default of 1024 takes 264."""

_small: set[int] = set()


def keep_context_small(index: int | None = None) -> None:
    """Have the context of a GPU, the current one by default, take less memory: 526 to 328 MiB of an H100.

    For workers alone. The limit counts for kernels that call functions whose need of stack is not known when they
    are compiled, which Triton's do not. Raises nothing.
    """
    device = torch.cuda.current_device() if index is None else index
    if device in _small or torch.version.cuda is None or not torch.cuda.is_available():
        return
    _small.add(device)
    with contextlib.suppress(OSError, AttributeError):  # PyTorch was built with the library inside
        runtime = ctypes.CDLL(f"libcudart.so.{torch.version.cuda.partition('.')[0]}")
        with torch.cuda.device(device):
            runtime.cudaDeviceSetLimit(0, ctypes.c_size_t(_STACK))


@contextlib.contextmanager
def small_contexts() -> Iterator[None]:
    """Within the block, contexts that a graph's fake tensors make are small from the beginning. Process-wide."""
    usual = fake_tensor.init_gpu_context

    def begin(device: torch.device) -> None:
        usual(device)
        if device.type == "cuda":
            keep_context_small(device.index)

    fake_tensor.init_gpu_context = begin  # type: ignore[assignment]
    try:
        yield
    finally:
        fake_tensor.init_gpu_context = usual


def architecture(index: int) -> str:
    """The architecture of a GPU, "sm_90" or "gfx942" say; "none" where there is no such GPU."""
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return "none"
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return str(properties.gcnArchName)
    return f"sm_{properties.major}{properties.minor}"


def driver() -> str:
    """The driver's version, as CUDA numbers it; "none" where there is no driver."""
    if not torch.cuda.is_available():
        return "none"
    ask: Any = getattr(torch._C, "_cuda_getDriverVersion", None)  # a build for ROCm has none
    return str(ask() if ask is not None else torch.version.hip)


def triton_works() -> bool:
    """Whether Triton is installed and knows a device of this machine."""
    from torch.utils._triton import has_triton

    return bool(has_triton())
