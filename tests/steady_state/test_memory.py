"""Memory: when it is freed, and how much is in use at once."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .harness import Case, Cases, observe
from .seen import WATCHED, Call, freed, watch
from .subjects import numbers

case = Cases()


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Collect garbage, then disable the collector in the block: only reference counts free memory."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def keeps_three(x: Tensor) -> Tensor:
    for _ in range(3):
        x = watch(x * 2, "kept")
        x = x * x
    return x


@case(keeps_three)
def what_is_saved_is_freed_as_the_backward_goes(call: Call) -> Any:
    seen = []
    for backward in (True, False):
        WATCHED.clear()
        with no_collection():
            out = call(numbers(4))
            seen.append(freed())
            if backward:
                out.sum().backward()
            seen.append(freed())
            del out
            seen.append(freed())
    return seen


@case(lambda x: watch(watch(x.sin(), "first").cos(), "second"))
def what_the_caller_gives_up_is_freed(call: Call) -> Any:
    seen = []
    for grad in (True, False):
        WATCHED.clear()
        with no_collection():
            args = [numbers(4, grad=grad) * 1]
            WATCHED.append(StorageWeakRef(args[0].untyped_storage()))
            out = call(args.pop())
            WATCHED.append(StorageWeakRef(out.untyped_storage()))
            seen.append(freed())
            del out
            seen.append(freed())
    return seen


def in_two_graphs(x: Tensor) -> Tensor:
    x = watch(x.sin(), "kept")
    torch._dynamo.graph_break()
    return watch(watch(x.cos(), "kept").exp(), "last")


@case(in_two_graphs)
def what_the_frame_is_done_with_is_freed(call: Call) -> Any:
    seen = []
    for grad in (True, False):
        WATCHED.clear()
        with no_collection():
            out = call(numbers(4, grad=grad))
            seen.append(freed())
            del out
            seen.append(freed())
    return seen


def peak(call: Callable[[], Any]) -> int:
    """Peak number of bytes that `call` has allocated."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    assert events
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


def deep(x: Tensor) -> tuple[Tensor, ...]:
    outs = []
    for _ in range(4):
        x = (x @ x.t()).tanh() @ x
        outs += [x.exp(), x.detach() + 1]
    return tuple(outs)


@pytest.mark.parametrize("grad", [True, False])
def test_peak_memory_is_no_more_than_with_stock(grad: bool) -> None:
    def scenario(call: Call) -> int:
        x = numbers(64, 64, grad=grad)

        def run() -> None:
            outs = call(x)
            if grad:
                sum(out.square().sum() for out in outs).backward()

        with no_collection():
            return peak(run)

    stocks, ours = (observe(Case(scenario, deep), backend)[0] for backend in ("inductor", "frame_swap"))
    assert ours <= stocks


test_is_as_with_stock = case.test
