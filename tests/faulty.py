"""Operators that deceive Inductor when they are told to: what compiled code of them does is wrong for real.

A module of its own, so that workers can import it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass

lying = False
"""Whether `relaid` lays its output out otherwise than it has promised; compiled code asserts what was promised."""

before_relaid: Callable[[], None] = lambda: None  # noqa: E731
"""Called when `relaid` is."""

raising: BaseException | None = None
"""What `fragile` raises, if anything."""


@torch.library.custom_op("frame_swap_faulty::relaid", mutates_args=())
def relaid(x: Tensor) -> Tensor:
    """A copy of the matrix `x`."""
    before_relaid()
    return x.t().contiguous().t() if lying else x.clone()


@relaid.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


relaid.register_autograd(lambda ctx, gradient: gradient)


@torch.library.custom_op("frame_swap_faulty::fragile", mutates_args=())
def fragile(x: Tensor) -> Tensor:
    """A copy of `x`."""
    if raising is not None:
        raise raising
    return x.clone()


@fragile.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Miscompile(CustomGraphPass):
    """A pass of Inductor's that puts one operator of ATen in place of another, in forwards and backwards."""

    def __init__(self, operator: str, other: str) -> None:
        self.operator = operator
        self.other = other

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.nodes:
            if str(node.target) == self.operator:
                name, _, overload = self.other.partition(".")
                node.target = getattr(getattr(torch.ops.aten, name), overload)

    def uuid(self) -> str:
        return f"{self.operator} {self.other}"
