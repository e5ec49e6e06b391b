"""What is shipped to a worker and what stays, each with one example; what stays is compiled by stock Inductor."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Subject, Twins, Wrap, through_swap
from torch import Tensor, nn
from torch.library import Library, custom_op

import frame_swap
from frame_swap import State


def rand() -> tuple[Tensor]:
    return (torch.rand(6, 4),)


def rand_with_grad() -> tuple[Tensor]:
    return (torch.rand(6, 4, requires_grad=True),)


# Custom operators: a kernel that no compiler looks into, here ordinary PyTorch


@custom_op("shipping::scale", mutates_args=())
def scale(x: Tensor, by: float) -> Tensor:
    return x * by


@scale.register_fake
def _(x: Tensor, by: float) -> Tensor:
    return torch.empty_like(x)


@custom_op("shipping::square", mutates_args=())
def square(x: Tensor) -> Tensor:
    return x * x


@square.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _save_input(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0])


def _square_backward(ctx: Any, grad: Tensor) -> Tensor:
    return torch.ops.shipping.scale(ctx.saved_tensors[0], 2.0) * grad  # an operator that the graph does not name


square.register_autograd(_square_backward, setup_context=_save_input)


def test_a_custom_operator_whose_gradient_calls_another(device: str) -> None:
    def subject(compiled: Wrap) -> Subject:
        return Subject(compiled(lambda x: square(x.sin()) + 1), [rand_with_grad])

    through_swap(subject, device=device)


def test_a_custom_operator_that_a_function_defines(device: str) -> None:
    factor = 3.0

    @custom_op("shipping::local", mutates_args=())
    def local(x: Tensor) -> Tensor:
        return x * factor

    @local.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    local.register_autograd(lambda ctx, grad: grad * factor)

    def subject(compiled: Wrap) -> Subject:
        return Subject(compiled(lambda x: local(x.sin()) + 1), [rand_with_grad])

    through_swap(subject, device=device)
