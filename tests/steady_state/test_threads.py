"""Threads, recursion and the profiler."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from helpers import DEVICE
from torch import Tensor, autograd

from .harness import Cases
from .seen import Call, facts
from .subjects import numbers, product

case = Cases()


@case(product)
def several_threads(call: Call) -> Any:
    x = [torch.linspace(i, i + 1, 64, device=DEVICE).requires_grad_() for i in range(4)]
    y = torch.linspace(0, 1, 64, device=DEVICE).requires_grad_()
    autograd.grad(
        call(x[0], y).sum(), (x[0], y)
    )  # stock compiles a backward when it is first called, and not in threads
    outs: list[Any] = [None] * 4
    barrier = threading.Barrier(4)

    def run(at: int) -> None:
        try:
            for _ in range(50):
                autograd.grad(call(x[at], y).sum(), (x[at], y))
            outs[at] = call(x[at], y)
        except BaseException:
            barrier.abort()
            raise
        barrier.wait()
        outs[at - 1].sum().backward(inputs=[x[at - 1]])  # another thread's graph

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    return facts(outs, [t.grad for t in x])


@case(lambda x: x.sin() * 1.5)
def a_long_chain(call: Call) -> Any:
    x = numbers(4)
    out = x
    for _ in range(2000):
        out = call(out)
    out.sum().backward()
    return facts(out, x.grad)


class Again(autograd.Function):
    """Runs a forward and a backward of `call` in its own backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Call, depth: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.call, ctx.depth = call, depth
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            out = ctx.call(x, x)
            if ctx.depth:
                out = Again.apply(out, ctx.call, ctx.depth - 1)
            out.backward(grad)
        return x.grad, None, None


@case(product)
def backwards_within_backwards(call: Call) -> Any:
    x = numbers(4)
    Again.apply(call(x, x), call, 80).sum().backward()
    return facts(x.grad)


@case(product)
def the_depth_at_which_recursion_ends(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    call(x, y)

    def descend(depth: int) -> Tensor:
        return call(x, y) if depth == 0 else descend(depth - 1)

    return facts(descend(900))


@case(product)
def names_in_a_profile(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    call(x, y)
    with torch.profiler.profile() as profile:
        call(x, y).sum().backward()
        with torch.no_grad():
            call(x, y)
    wanted = ("Torch-Compiled Region", "CompiledFunction", "autograd::engine::evaluate_function")
    return sorted(event.name for event in profile.events() if event.name.startswith(wanted))


test_is_as_with_stock = case.test
