"""Inputs that the compiled code changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, autograd, nn

from .harness import Cases
from .seen import Call, error, facts, outcome
from .subjects import gradients_taken, numbers, ones

pytestmark = pytest.mark.fast

case = Cases()


def write(x: Tensor, y: Tensor) -> Tensor:
    x.mul_(y)
    return x.sin() + 1


@case(write)
def written_inputs(call: Call) -> Any:
    seen = []
    for x_grad, y_grad in ((False, False), (True, False), (False, True)):
        leaf, y = numbers(3, 4, grad=x_grad), numbers(3, 4, grad=y_grad)
        for x in (leaf * 1, (leaf * 1)[:], (leaf * 1).t().contiguous().t()):
            before = facts(x)
            out = call(x, y)
            seen.append((before, facts(out, x, x._base, y)))
            if out.requires_grad:
                wanted = [t for t in (leaf, y) if t.requires_grad]
                seen.append(outcome(lambda: autograd.grad(out.sum() + x.sum(), wanted)))
    with torch.no_grad():
        seen.append(facts(call(leaf, y), leaf))
    return seen


@case(write)
def written_leaves(call: Call) -> Any:
    x, y = numbers(4, grad=False), numbers(4, grad=False)
    return facts(call(x, y), x), error(lambda: call(numbers(4), y))


@case(lambda x, y: x.add_(y.sin()).sin())
def an_input_written_and_read_through_another(call: Call) -> Any:
    base = numbers(5, grad=False)
    seen = [facts(call(base[1:], base[:4]), base)]
    for grad in (False, True):
        leaf = numbers(5, grad=grad)
        base = leaf * 1
        out = call(base[3:], base[:2])
        seen.append(facts(out, base))
        if grad:
            seen.append(outcome(lambda: autograd.grad(out.sum() + base.sum(), leaf)))
        else:
            seen.append(facts(call(base, base), base))
    return seen


def write_without_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        x.mul_(2)
    x.detach().add_(1)
    return x.sin()


@case(write_without_grad)
def leaves_written_without_grad(call: Call) -> Any:
    x = numbers(4)
    first = call(x)
    second = call(x)
    seen = facts(first, second, x)
    second.sum().backward()
    return seen, facts(x.grad), outcome(lambda: first.sum().backward())


class Counting(nn.Module):
    """Changes its buffers with each call."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(()))
        self.weight = nn.Parameter(ones(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.norm(x) * self.calls * self.weight


@case(Counting)
def written_buffers(call: Call) -> Any:
    """Versions count from here: eager code, which has served before, writes more often than compiled code."""
    versions = [buffer._version for buffer in call.buffers()]
    seen = []
    for grad in (True, False, True):
        with torch.set_grad_enabled(grad):
            outs = [call(numbers(3, 4, grad=False)) for _ in range(2)]
        of_outs, of_buffers = facts(outs, list(call.buffers()))
        for fact, version in zip(of_buffers, versions, strict=True):
            fact["version"] -= version
        seen.append((of_outs, of_buffers))
        if grad:
            seen += [outcome(lambda: out.square().sum().backward()) for out in reversed(outs)]
            seen.append(gradients_taken(call))
    return seen


# Dynamo breaks the graph at `x.t_()` and `x.set_(y)`; operators called by name get into it.


def transpose_in_place(x: Tensor, y: Tensor) -> Tensor:
    torch.ops.aten.t_.default(x)
    torch.ops.aten.t_.default(y)
    y.mul_(2)
    return x @ y.t()


@case(transpose_in_place)
def inputs_whose_shape_changes(call: Call) -> Any:
    seen = []
    for grad in (False, True):
        leaf = numbers(3, 4, grad=grad)
        x, y = leaf * 1, leaf * 2
        out = call(x, y)
        seen.append(facts(out, x, y))
        if grad:
            seen.append(outcome(lambda: autograd.grad(out.sum() + x.sum() + y.sum(), leaf)))
    return seen


def set_to(x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        torch.ops.aten.set_.source_Tensor(x, y)
    return x * 2


@case(set_to)
def inputs_set_to_another(call: Call) -> Any:
    seen = []
    for grad in (False, True):
        x, y = numbers(3, 4, grad=grad), numbers(3, 4, grad=False)
        out = call(x, y)
        seen.append(facts(out, x, y))
        if grad:
            seen.append(facts(autograd.grad(out.sum(), x, allow_unused=True)))
    return seen


@case(lambda x: (x.add_(1), x.view(-1), x))
def outputs_that_are_a_written_input(call: Call) -> Any:
    seen = []
    for grad in (False, True):
        leaf = numbers(3, 4, grad=grad)
        x = leaf * 1
        outs = call(x)
        seen.append(facts(outs, x))
        outs[1].mul_(2)
        seen.append(facts(outs, x))
        if grad:
            seen.append(facts(autograd.grad(sum(out.sum() for out in outs), leaf)))
    return seen


def only_write(x: Tensor) -> None:
    x.add_(1)


@case(only_write)
def nothing_returned(call: Call) -> Any:
    leaf = numbers(4)
    x = leaf * 1
    call(x)
    return facts(x, autograd.grad(x.sum(), leaf))


test_is_as_with_stock = case.test
