"""Outputs and inputs that share memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, autograd

from .harness import Cases
from .seen import Call, error, facts, outcome
from .subjects import numbers, product, views_of_its_input

case = Cases()


def kinds_of_input() -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of a tensor to pass and the leaf that it is derived from."""
    for grad in (False, True):
        leaf = numbers(3, 4, grad=grad)
        yield leaf, leaf
        leaf = numbers(3, 4, grad=grad)
        yield leaf * 2, leaf
        leaf = numbers(4, 4, grad=grad)
        yield leaf[1:], leaf


@case(views_of_its_input)
def outputs_that_alias_the_input(call: Call) -> Any:
    seen = []
    for x, leaf in kinds_of_input():
        outs = call(x)
        seen.append(facts(outs, x, leaf))
        if leaf.requires_grad:
            sum(out.sum() for out in outs if out.requires_grad).backward()
            seen.append(facts(leaf.grad))
    with torch.no_grad():
        seen.append(facts(call(leaf)))
    return seen


@case(views_of_its_input)
def changes_in_place_of_outputs_that_alias_the_input(call: Call) -> Any:
    seen = []
    for at in range(6):
        for x, leaf in kinds_of_input():
            outs = call(x)
            seen.append(outcome(lambda: outs[at].mul_(3)))
            seen.append(facts(outs, x, leaf))
            if leaf.requires_grad:
                seen.append(outcome(lambda: autograd.grad(outs[2].sum() + x.sum(), leaf)))
    return seen


def views_of_one_result(x: Tensor) -> tuple[Tensor, ...]:
    y = x.sin()
    return y, y.view(-1), y[1:], y.t(), y


@case(views_of_one_result)
def outputs_that_alias_each_other(call: Call) -> Any:
    seen = []
    for x, leaf in kinds_of_input():
        outs = call(x)
        seen.append(facts(outs, x))
        outs[2].mul_(3)
        seen.append(facts(outs, x))
        outs[3].add_(1)
        if leaf.requires_grad:
            seen.append(facts(autograd.grad(sum(out.sum() for out in outs), leaf)))
    return seen


@case(lambda x: (x.sin().view(-1), x.cos().t(), x.exp()[1:]))
def views_whose_base_is_gone(call: Call) -> Any:
    seen = []
    for x, leaf in kinds_of_input():
        outs = call(x)
        seen.append(facts(outs, x))
        for out in outs:
            out.mul_(2)
        seen.append(facts(outs))
        if leaf.requires_grad:
            seen.append(facts(autograd.grad(sum(out.sum() for out in outs), leaf)))
    return seen


@case(lambda x: (x.unbind(0), x.sin().unbind(0), x.split(2)))
def several_views_of_one_operation(call: Call) -> Any:
    seen = []
    for x, leaf in kinds_of_input():
        outs = call(x)
        seen.append(facts(outs, x))
        seen += [outcome(lambda: views[0].mul_(2)) for views in outs]
        if leaf.requires_grad:
            seen.append(outcome(lambda: autograd.grad(outs[0][1].sum() + outs[1][1].sum(), leaf)))
    return seen


class Flat(autograd.Function):
    """An autograd function that returns a view."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view(3, 4) * 2


@case(lambda x: (Flat.apply(x), x.sin()))
def view_of_an_autograd_function(call: Call) -> Any:
    seen = []
    for x, leaf in kinds_of_input():
        outs = call(x)
        seen.append(facts(outs, x))
        if leaf.requires_grad:
            seen.append(facts(autograd.grad(sum(out.sum() for out in outs), leaf)))
            seen.append(outcome(lambda: call(x)[0].mul_(2)))
    return seen


@case(product)
def changes_in_place_of_outputs(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    out = call(x, y)
    out.mul_(2).add_(x)
    out[1:].zero_()
    out.sum().backward()
    return facts(out, x.grad, y.grad)


@case(lambda x: (x.tanh(), x.exp()))
def changes_in_place_of_saved_outputs(call: Call) -> Any:
    x = numbers(4)
    outs = call(x)
    outs[1].mul_(2)
    return facts(outs), error(lambda: (outs[0] + outs[1]).sum().backward())


@case(product)
def changes_in_place_of_saved_inputs(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    out = call(x, y)
    with torch.no_grad():
        y.add_(1)
    return facts(out, y), error(lambda: out.sum().backward())


class Stashing(autograd.Function):
    """Keeps its input without `save_for_backward`, so no version check notices a change."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.y = y
        ctx.save_for_backward(x)
        return x * y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (x,) = ctx.saved_tensors
        return grad * ctx.y, grad * x


@case(lambda x, y: Stashing.apply(x, y).sin())
def changes_in_place_of_what_is_saved_unchecked(call: Call) -> Any:
    seen = []
    for at in (0, 1):
        args = numbers(4), numbers(4)
        out = call(*args)
        with torch.no_grad():
            args[at].add_(1)
        seen.append(outcome(lambda: autograd.grad(out.sum(), args)))
    return seen


test_is_as_with_stock = case.test
