"""What `torch.compile` makes of its default backend, and how it makes something else of it.

This is imported at the end of `import torch`, where torch's compilers may not be imported yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .probe import names_looked_up

with names_looked_up():
    from torch import _TorchCompileInductorWrapper as Inductor
    from torch import _TorchCompileWrapper as Wrapper

Backend = Callable[..., Any]


class _LikeInductor(type):
    """What was made for Inductor before goes on being known as that: torch asks with `isinstance`."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, Inductor)


def replace(backend: Callable[[], Backend]) -> Callable[[], None]:
    """Have each `torch.compile` with the default backend, whoever calls it, use another from now on.

    Args:
        backend: returns it; called when `torch.compile` is. Mode and options reach it as its keyword arguments.

    Returns:
        A function that puts back what was there before.
    """

    class Replaced(metaclass=_LikeInductor):
        def __new__(cls, mode: Any, options: Any, dynamic: Any, *rest: Any, **named: Any) -> Any:
            Inductor(mode, options, dynamic, *rest, **named)  # type: ignore[no-untyped-call]  # for its errors
            return Wrapper(backend(), mode, options, dynamic)  # type: ignore[no-untyped-call]

    before = torch._TorchCompileInductorWrapper
    torch._TorchCompileInductorWrapper = Replaced  # type: ignore[misc]

    def put_back() -> None:
        torch._TorchCompileInductorWrapper = before  # type: ignore[misc]

    return put_back
