"""Hooks on tensors, saved tensors and modules; anomaly mode."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .harness import Cases
from .seen import Call, error, facts
from .subjects import Mlp, gradients_taken, numbers, ones, product, three

case = Cases()


@case(three)
def hooks_on_saved_tensors(call: Call) -> Any:
    noted: list[Any] = []

    def pack(t: Tensor) -> Any:
        noted.append(("pack", facts(t)))
        return t.detach().clone()

    def unpack(t: Any) -> Tensor:
        noted.append(("unpack", facts(t)))
        return t * 2

    x, y = numbers(4), numbers(4)
    with saved_tensors_hooks(pack, unpack):
        outs = call(x[:], y)
    noted.append("backward")
    total = sum(out.sum() for out in outs)
    total.backward(retain_graph=True)
    noted.append("again")
    total.backward()
    return noted, facts(x.grad, y.grad)


@case(three)
def hooks_on_saved_tensors_around_the_backward(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    outs = call(x, y)
    with saved_tensors_hooks(lambda t: pytest.fail("packed"), lambda t: pytest.fail("unpacked")):
        torch.autograd.backward(outs, [ones(4)] * 3)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        return facts(x.grad, y.grad, call(x, y))


@case(three)
def save_on_cpu(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    with torch.autograd.graph.save_on_cpu():
        outs = call(x, y)
    sum(out.sum() for out in outs).backward()
    return facts(outs, x.grad, y.grad)


@case(three)
def hooks_on_tensors(call: Call) -> Any:
    noted: list[Any] = []

    def noting(name: str, factor: float | None = None) -> Callable[..., Any]:
        def hook(*grads: Any) -> Any:
            noted.append((name, facts(grads)))
            return grads[0] * factor if factor else None

        return hook

    x, y = numbers(4), numbers(4)
    w = x * 1
    w.retain_grad()
    x.register_hook(noting("leaf", 2))
    w.register_hook(noting("input", 3))
    y.register_post_accumulate_grad_hook(lambda t: noted.append(("accumulated", facts(t, t.grad))))
    outs = call(w, y)
    outs[0].retain_grad()
    outs[1].register_hook(noting("output", 5))
    torch.autograd.graph.register_multi_grad_hook(outs, noting("several"))
    outs[0].grad_fn.register_prehook(noting("before the node"))
    outs[0].grad_fn.register_hook(noting("after the node"))
    sum(out.sum() for out in outs).backward()
    return noted, facts(x.grad, w.grad, y.grad, outs[0].grad)


@case(product)
def hook_that_fails(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    out = call(x, y)
    handle = out.register_hook(lambda grad: 1 / 0)
    failed = error(lambda: out.sum().backward())
    handle.remove()
    out.sum().backward()
    return failed, facts(x.grad, y.grad)


@case(Mlp)
def hooks_on_modules(call: Call) -> Any:
    noted: list[Any] = []

    def noting(name: str) -> Callable[..., None]:
        return lambda module, *args: noted.append((name, type(module).__name__, facts(args)))

    handles = [
        call.register_forward_pre_hook(noting("before")),
        call.register_forward_hook(noting("after")),
        call.register_full_backward_pre_hook(noting("before the backward")),
        call.register_full_backward_hook(noting("after the backward")),
    ]
    x = numbers(2, 4)
    call(x).sum().backward()
    for handle in handles:
        handle.remove()
    return noted, facts(x.grad), gradients_taken(call)


@case(lambda x: (x - x).sqrt())
def anomaly_mode(call: Call) -> Any:
    x = numbers(4)
    with warnings.catch_warnings(record=True) as caught, torch.autograd.detect_anomaly():
        warnings.simplefilter("always")
        out = call(x)
        failed = error(lambda: out.mul(0).sum().backward())
    messages = [str(warning.message) for warning in caught]
    return failed, [(message.splitlines()[0], "out = call(x)" in message) for message in messages]


@case(product)
def set_detect_anomaly_where_nothing_is_wrong(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    with torch.autograd.set_detect_anomaly(True):
        call(x, y).sum().backward()
    return facts(x.grad, y.grad)


test_is_as_with_stock = case.test
