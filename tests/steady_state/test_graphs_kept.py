"""Backward passes that keep their graph, and buffers that Inductor reuses."""

from __future__ import annotations

from typing import Any

import torch
from helpers import assert_same, swap_all, wait_for_all
from torch import Tensor, autograd
from torch._functorch import config as functorch_config

import frame_swap

from .harness import Cases
from .seen import Call, facts, outcome
from .subjects import numbers

case = Cases()


def saves_results(x: Tensor) -> Tensor:
    return (x.sin() @ x).exp().sum(0)


@case(
    saves_results,
    lambda: functorch_config.patch(donated_buffer=True),
    differs="with stock a backward cannot keep its graph if its first did not; here it can",
)
def donated_buffers(call: Call) -> Any:
    x = numbers(4, 4)
    call(x).sum().backward()
    out = call(x)
    seen = [outcome(lambda: out.sum().backward(retain_graph=retain)) for retain in (True, False)]
    return seen, facts(x.grad)


def test_any_backward_may_keep_its_graph() -> None:
    def gradients(call: Call) -> list[Tensor]:
        torch.manual_seed(0)
        x = numbers(4, 4)
        call(x).sum().backward()
        out = call(x).sum()
        assert x.grad is not None
        return [x.grad, *(autograd.grad(out, x, retain_graph=keep)[0] for keep in (True, True, False))]

    frame_swap.configure(when="manual")
    compiled = torch.compile(saves_results, backend="frame_swap")
    with functorch_config.patch(donated_buffer=True):
        gradients(compiled)
        wait_for_all()
        (region,) = swap_all()
        calls = region.eager_calls
        assert_same(gradients(compiled), gradients(saves_results), "the swap")
    assert region.eager_calls == calls


test_is_as_with_stock = case.test
