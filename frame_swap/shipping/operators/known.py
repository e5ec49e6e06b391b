"""Operators by name: whose they are, and which of them this process has."""

from __future__ import annotations

from typing import Any

import torch

from ...internals import dispatcher

# Operators that each process has which has imported torch.
TORCH_NAMESPACES = frozenset(
    ("aten", "prim", "prims", "higher_order", "inductor", "quantized", "_quantized", "quantized_decomposed")
    + ("mkldnn", "onednn", "mkl", "profiler", "debugprims", "fsdp", "_c10d_functional", "_dtensor", "streams")
)

ADVICE = "define it with torch.library.custom_op, or all of it in one module that can be imported"


class MissingOperator(RuntimeError):
    """A worker cannot be given an operator of the program's; the message says which, and what to do."""


def is_custom(operator: dispatcher.OpOverload | dispatcher.OpOverloadPacket) -> bool:
    """Whether an operator is the program's own, or a library's, rather than PyTorch's."""
    return str(operator).partition(".")[0].partition("::")[0] not in TORCH_NAMESPACES


def overloads(operator: dispatcher.OpOverload | dispatcher.OpOverloadPacket) -> list[dispatcher.OpOverload]:
    """The overloads of an operator; of one overload, itself."""
    if isinstance(operator, dispatcher.OpOverload):
        return [operator]
    names: list[str] = operator.overloads()  # type: ignore[no-untyped-call]
    return [getattr(operator, name) for name in names]


def lookup(name: str) -> dispatcher.OpOverload | None:
    """The operator "namespace::operator", or "namespace::operator.overload", if this process has it."""
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    found: Any = getattr(getattr(torch.ops, namespace), packet, None)
    found = getattr(found, overload or "default", None)
    return found if isinstance(found, dispatcher.OpOverload) else None
