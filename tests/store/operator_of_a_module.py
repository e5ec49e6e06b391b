"""A custom operator that a module defines, as programs do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("store::of_a_module", mutates_args=())
def of_a_module(x: Tensor, by: float) -> Tensor:
    return x * by


@of_a_module.register_fake
def _(x: Tensor, by: float) -> Tensor:
    return torch.empty_like(x)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.by = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad * ctx.by, None


of_a_module.register_autograd(_backward, setup_context=_remember)
