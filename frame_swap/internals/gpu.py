"""What code for a GPU depends on: the GPU's architecture, and the driver."""

from __future__ import annotations

from typing import Any

import torch


def is_in_use() -> bool:
    """Whether this process has a context on a GPU, and with it some memory there."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def give_back_cached() -> None:
    """Give back the memory of GPUs that PyTorch keeps and no tensor needs."""
    if is_in_use():
        torch.cuda.empty_cache()


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
