"""Operators and passes that make Inductor's code wrong, raise or slow, when a test asks for it.

A module of its own, so that workers can import it.
"""

from __future__ import annotations

import operator
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass

lying = False
"""Whether `relaid` returns other strides than its fake kernel promises; compiled code asserts the promised ones."""

before_relaid: Callable[[], None] = lambda: None  # noqa: E731
"""Called by `relaid`, first thing."""

raising: BaseException | type[BaseException] | None = None
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


@torch.library.custom_op("frame_swap_faulty::slowly", mutates_args=())
def slowly(x: Tensor) -> Tensor:
    """A copy of `x`, in 10 ms."""
    time.sleep(0.01)
    return x.clone()


@slowly.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class SlowDown(CustomGraphPass):
    """A custom pass of Inductor that copies the results of one operator slowly, in forwards and backwards."""

    def __init__(self, slowed: str) -> None:
        self.slowed = slowed

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in list(graph.nodes):
            if str(node.target) == self.slowed:
                with graph.inserting_after(node):
                    copy = graph.call_function(torch.ops.frame_swap_faulty.slowly.default, (node,))
                copy.meta.update(node.meta)
                node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)

    def uuid(self) -> str:
        return f"slow {self.slowed}"


class Miscompile(CustomGraphPass):
    """A custom pass of Inductor that replaces one operator by another, in forwards and backwards."""

    def __init__(self, wanted: str, other: str) -> None:
        self.wanted = wanted
        self.other = other

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.nodes:
            if str(node.target) == self.wanted:
                node.target = operator.attrgetter(self.other)(torch.ops)

    def uuid(self) -> str:
        return f"{self.wanted} {self.other}"


class IfAutotuned(CustomGraphPass):
    """Another custom pass, only where the compile autotunes, or only where it does not."""

    def __init__(self, autotuned: bool, other: CustomGraphPass) -> None:
        self.autotuned = autotuned
        self.other = other

    def __call__(self, graph: torch.fx.Graph) -> None:
        if torch._inductor.config.max_autotune is self.autotuned:
            self.other(graph)

    def uuid(self) -> str:
        return f"{self.autotuned} {self.other.uuid()}"


class Meet(CustomGraphPass):
    """A custom pass of Inductor that goes on once a second process has come to it; it changes nothing."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, graph: torch.fx.Graph) -> None:
        Path(self.folder, str(os.getpid())).touch()
        end = time.monotonic() + 200
        while len(list(Path(self.folder).iterdir())) < 2 and time.monotonic() < end:
            time.sleep(0.01)

    def uuid(self) -> str:
        return f"meet {self.folder}"
