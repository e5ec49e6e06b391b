"""The thread's modes during calls and after: gradients, autocast, inference, dispatch, determinism."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from helpers import DEVICE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .harness import Cases
from .seen import FAIL, LOG, Call, ambient, error, facts, outcome, watch
from .subjects import numbers, product, three, views_of_its_input

case = Cases()


def watched(x: Tensor, y: Tensor) -> Tensor:
    return watch(watch(x * y, "first").sin() @ y, "second") * 2


@case(watched)
def state_that_operators_run_in(call: Call) -> Any:
    seen = []
    for grad in (True, False):
        for around in (contextlib.nullcontext(), torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16)):
            x, y = numbers(4, 4, grad=grad), numbers(4, 4, grad=False)
            with around:
                out = call(x, y)
            seen.append(facts(out))
            if out.requires_grad:
                for around_backward in (around, torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16)):
                    out = call(x, y)
                    with around_backward:
                        out.backward(out.detach())
                seen.append(facts(x.grad))
    return seen


@case(lambda x, w: watch(x.detach() @ w.detach(), "only") + 1)
def inference_on_tensors_that_need_gradients(call: Call) -> Any:
    w = numbers(4, 4)
    return facts(call(numbers(4, 4), w), w)


@case(watched, answered=True)
def failures_leave_the_state_as_it_was(call: Call) -> Any:
    seen = []
    for grad in (True, False):
        x, y = numbers(4, 4, grad=grad), numbers(4, 4, grad=False)
        call(x, y)
        for what in ("first", "second", "second's gradient") if grad else ("first", "second"):
            FAIL.append(what)
            try:
                seen.append((error(lambda: call(x, y).sum().backward()), ambient()))
            finally:
                FAIL.clear()
        seen.append(facts(call(x, y)))
    return seen


def grad_modes_inside(x: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        y = x.sin()
    with torch.enable_grad():
        z = watch(x.cos(), "inside")
    return y, z, y * z


@case(grad_modes_inside)
def grad_mode_by_turns_and_inside(call: Call) -> Any:
    seen = []
    for mode in (torch.enable_grad, torch.no_grad, torch.enable_grad):
        x = numbers(4)
        with mode():
            outs = call(x)
        seen.append(facts(outs))
        sum(out.sum() for out in outs if out.requires_grad).backward()
        seen.append(facts(x.grad))
    return seen


def switch_grad_off(x: Tensor) -> Tensor:
    y = x.sin()
    torch.set_grad_enabled(False)
    return y


@case(switch_grad_off)
def grad_mode_changed_for_good(call: Call) -> Any:
    x = numbers(4)
    out = call(x)
    off = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    out.sum().backward()
    return off, facts(out, x.grad)


def autocast_inside_too(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    first = x @ y
    with torch.autocast(DEVICE, enabled=False):
        second = x @ y
    with torch.autocast(DEVICE, torch.bfloat16):
        third = x @ y
    return first, second, third, watch(x, "cast")


@case(autocast_inside_too)
def autocast_by_turns_and_inside(call: Call) -> Any:
    seen = []
    for around in (contextlib.nullcontext(), torch.autocast(DEVICE, torch.bfloat16), contextlib.nullcontext()):
        for around_backward in (contextlib.nullcontext(), torch.autocast(DEVICE, torch.bfloat16)):
            x, y = numbers(4, 4), numbers(4, 4)
            with around:
                outs = call(x, y)
            with around_backward:
                torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
            seen.append(facts(outs, x.grad, y.grad))
    return seen


@case(three, answered=True)
def inference_mode(call: Call) -> Any:
    x, y = numbers(4), numbers(4, grad=False)
    with torch.inference_mode():
        inside = numbers(4, grad=False)
        outs = [call(x, y), call(inside, y)]
        state = [t.is_inference() for t in tree_leaves(outs)]
        seen = facts(outs)
    return state, seen, outcome(lambda: call(x, inside)), outcome(lambda: call(x, y)[0].backward(inside))


@case(views_of_its_input)
def views_in_inference_mode(call: Call) -> Any:
    x = numbers(3, 4)
    with torch.inference_mode():
        outs = call(x)
        return facts(outs, x), [t.is_inference() for t in outs]


class Noting(TorchDispatchMode):
    """Records the operators that reach the dispatcher."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        LOG.append(str(func))
        return func(*args, **kwargs or {})


@case(product)
def dispatch_mode_around_the_call(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    call(x, y)
    with Noting():
        out = call(x, y)
        out.sum().backward()
    return facts(out, x.grad, y.grad)


@contextlib.contextmanager
def deterministic(mode: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(mode)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@case(product)
def deterministic_algorithms_asked_for_after_the_forward(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    call(x, y).sum().backward()
    out = call(x, y)
    with deterministic(True):
        failed = error(lambda: out.sum().backward(retain_graph=True))
        call(x, y).sum().backward()
        other = call(x, y)
    other.sum().backward()
    out.sum().backward()
    return failed, facts(x.grad, y.grad)


test_is_as_with_stock = case.test
