"""Operators with effects, and printing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._library.effects import EffectType
from torch.library import custom_op

from .harness import Case, Cases, observe
from .seen import LOG, Call, facts
from .subjects import numbers

case = Cases()


@custom_op("steady::effect", mutates_args=())
def effect(x: Tensor, what: str) -> None:
    LOG.append((what, x.tolist()))


effect.register_fake(lambda x, what: None)
effect.register_effect(EffectType.ORDERED)


def with_effects(x: Tensor) -> Tensor:
    effect(x.detach(), "before")
    y = x.sin()
    effect(y.detach(), "after")
    return y


@case(with_effects)
def effects_in_order(call: Call) -> Any:
    x = numbers(4)
    out = call(x)
    out.sum().backward()
    with torch.no_grad():
        return facts(out, x.grad, call(x))


def printing(x: Tensor) -> Tensor:
    torch._higher_order_ops.print("{} then", 7)
    return x.sin()


def test_prints_as_with_stock(capsys: pytest.CaptureFixture[str]) -> None:
    def scenario(call: Call) -> str:
        x = numbers(4)
        call(x).sum().backward()
        with torch.no_grad():
            call(x)
        return capsys.readouterr().out

    one = Case(scenario, printing)
    expected, actual = observe(one, "inductor"), observe(one, "frame_swap")
    assert expected[0] == "7 then\n" * 2
    assert actual[0] == expected[0]


test_is_as_with_stock = case.test
