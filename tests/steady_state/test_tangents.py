"""Gradients that the caller passes to the backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, autograd, nn
from torch.testing._internal.two_tensor import TwoTensor

from .harness import Cases
from .seen import Call, error, facts
from .subjects import matmul, numbers, ones, product, three

case = Cases()


TANGENTS: dict[str, Callable[[], Tensor]] = {
    "as the output": lambda: numbers(4, 6, grad=False),
    "transposed": lambda: numbers(6, 4, grad=False).t(),
    "expanded": lambda: numbers(1, 1, grad=False).expand(4, 6),
    "expanded row": lambda: numbers(6, grad=False).expand(4, 6),
    "every other": lambda: numbers(8, 12, grad=False)[::2, ::2],
    "with an offset": lambda: numbers(5, 6, grad=False)[1:],
    "needs a gradient": lambda: numbers(4, 6),
}


def tangents_of_any_layout(call: Call) -> Any:
    seen = []
    for make in TANGENTS.values():
        x, y, tangent = numbers(4, 5), numbers(5, 6), make()
        out = call(x, y)
        out.backward(tangent)
        seen.append(facts(out, x.grad, y.grad, tangent))
    return seen


case(matmul)(tangents_of_any_layout)


@case(lambda x, y: (x @ y).t())
def tangents_of_a_transposed_output(call: Call) -> Any:
    return tangents_of_any_layout(lambda x, y: call(x, y).t())


@case(lambda x: nn.functional.conv2d(x, ones(3, 3, 3, 3)).relu())
def tangents_in_another_memory_format(call: Call) -> Any:
    seen = []
    for of_input in (torch.contiguous_format, torch.channels_last):
        for of_tangent in (torch.contiguous_format, torch.channels_last):
            x = numbers(2, 3, 6, 6, grad=False).to(memory_format=of_input).requires_grad_()
            out = call(x)
            out.backward(numbers(2, 3, 4, 4, grad=False).to(memory_format=of_tangent))
            seen.append(facts(out, x.grad))
    return seen


@case(lambda x: (x.sum(), x * 2))
def tangent_of_a_scalar(call: Call) -> Any:
    x = numbers(4)
    call(x)[0].backward()
    return facts(x.grad), error(call(x)[1].backward)


class Half(autograd.Function):
    """Returns its first input; gives the second no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@case(three)
def tangents_that_are_none(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    first, second, third = call(x, y)
    Half.apply(second, third).sum().backward()
    x2, y2 = numbers(4), numbers(4)
    first, second, third = call(x2, y2)
    Half.apply(numbers(4), third).sum().backward()
    return facts(x.grad, y.grad, x2.grad, y2.grad, first)


@case(product)
def a_tangent_of_the_wrong_shape(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    return error(lambda: call(x, y).backward(ones(3)))


@case(product)
def a_tangent_of_another_dtype(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    call(x, y).backward(ones(4).double())
    return facts(x.grad, y.grad)


@case(product)
def a_tangent_of_a_subclass(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    out = call(x, y)
    return error(lambda: out.backward(TwoTensor(ones(4), ones(4))))


def pairs(x: Tensor) -> TwoTensor:
    return TwoTensor(x.detach(), x.detach() * 2).requires_grad_(x.requires_grad)


@case(product)
def subclass_of_tensors(call: Call) -> Any:
    x, y = pairs(numbers(4)), pairs(numbers(4))
    out = call(x, y)
    out.backward(pairs(ones(4)))
    parts = [(t.a, t.b) for t in (out.detach(), x.grad, y.grad)]
    failed = error(lambda: call(x, y).backward(ones(4)))
    return facts(parts, out), failed[1].partition("The problematic output")[0]


test_is_as_with_stock = case.test
