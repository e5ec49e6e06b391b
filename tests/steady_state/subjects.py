"""Functions and modules to compile, and tensors to pass to them."""

from __future__ import annotations

from typing import Any

import torch
from helpers import DEVICE
from torch import Tensor, nn

from .seen import facts


def numbers(*shape: int, grad: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
    """A leaf with distinct random elements."""
    return (torch.rand(shape, device=DEVICE) + 0.5).to(dtype).requires_grad_(grad)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, device=DEVICE)


def product(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sin()


def three(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.sin(), x * y, y.cos()


def matmul(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y).tanh()


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def gradients_taken(module: nn.Module) -> Any:
    """Facts about the parameters' gradients; the gradients are reset to None."""
    seen = facts([parameter.grad for parameter in module.parameters()])
    module.zero_grad()
    return seen


def views_of_its_input(x: Tensor) -> tuple[Tensor, ...]:
    return x, x.view(-1), x[1:], x.t(), x.detach(), x.view_as(x), x.sin()
