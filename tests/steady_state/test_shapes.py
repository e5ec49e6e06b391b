"""Sizes that are known at each call only."""

from __future__ import annotations

from typing import Any

from .harness import Cases
from .seen import Call, facts
from .subjects import numbers, product

case = Cases()


@case(lambda x: (x * x.shape[0]).cumsum(0)[1:], dynamic=True)
def sizes_that_the_backward_needs(call: Call) -> Any:
    seen = []
    for n in (5, 3, 8):
        x = numbers(n, n + 1)
        out = call(x)
        out.backward(numbers(n + 1, n - 1, grad=False).t())
        seen.append(facts(out, x.grad))
    return seen


@case(lambda x: (x.sin(), x.t(), x.exp().view(-1), x.shape[0] * 2), dynamic=True)
def sizes_that_outputs_pass_on(call: Call) -> Any:
    seen = []
    for n in (5, 3, 8):
        x = numbers(n, 4)
        outs = call(x)
        call(outs[0])[0].sum().backward()
        seen.append(facts(outs, x.grad))
    return seen


@case(product)
def sizes_that_change_by_themselves(call: Call) -> Any:
    seen = []
    for n in (5, 3, 8, 0, 1):
        x, y = numbers(n), numbers(n)
        out = call(x, y)
        out.sum().backward()
        seen.append(facts(out, x.grad, y.grad))
    return seen


test_is_as_with_stock = case.test
