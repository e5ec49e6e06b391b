"""A model, its inputs, and its training as a subject."""

from __future__ import annotations

import torch
from helpers import Subject, Wrap
from torch import Tensor, nn


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def rand() -> tuple[Tensor]:
    return (torch.rand(6, 4),)


def rand_with_grad() -> tuple[Tensor]:
    return (torch.rand(6, 4, requires_grad=True),)


def training(compiled: Wrap) -> Subject:
    model = mlp()
    return Subject(compiled(model), [rand_with_grad], model)
