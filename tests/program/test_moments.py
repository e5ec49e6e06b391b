"""Values and gradients are eager's when the program does something between capture and swap."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers import (
    Make,
    Subject,
    Twins,
    Wrap,
    assert_same,
    live,
    swap_all,
    through_swap,
    wait_for_all,
    with_frame_swap,
)
from torch import Tensor, nn

import frame_swap

from .subjects import mlp, rand_with_grad

pytestmark = pytest.mark.usefixtures("unpadded")


def chunks(n: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.rand(n, requires_grad=True),)


@pytest.mark.parametrize("sizes", [(9, 10, 4, 12), (4, 9, 5, 10)], ids=str)
def test_sizes_that_specialise_in_any_order(sizes: tuple[int, ...], device: str) -> None:
    def chunked(compiled: Wrap) -> Subject:
        function = compiled(lambda x: ([c * 2 for c in x.chunk(3)], x[::2].sin()), dynamic=True)
        return Subject(function, [chunks(n) for n in sizes + sizes[::-1]])

    through_swap(chunked, device=device)


@pytest.mark.parametrize("training", [True, False])
def test_a_change_in_place_counts_once(training: bool, device: str) -> None:
    frame_swap.configure(when="manual")
    buffer = torch.zeros(4, device=device)

    def accumulate(x: Tensor) -> Tensor:
        buffer.add_(x.detach())
        return x * buffer.sum()

    function = with_frame_swap(accumulate)
    x = torch.rand(4, device=device, requires_grad=training)
    versions = []
    for call in (accumulate, function, function, lambda x: (frame_swap.wait(), frame_swap.swap(), function(x))):
        before = buffer._version
        call(x)
        versions.append(buffer._version - before)
    assert versions == [1, 1, 1, 1]


def test_backward_of_the_pair_after_the_swap(device: str) -> None:
    frame_swap.configure(when="manual")
    x = torch.rand(6, 4, device=device)
    eager = mlp().to(device)
    model = copy.deepcopy(eager)
    function = with_frame_swap(model)
    on_pair = function(x)
    wait_for_all()
    swap_all()
    on_compiled = function(x * 2)
    on_pair.square().sum().backward()
    on_compiled.sum().backward()
    (eager(x).square().sum() + eager(x * 2).sum()).backward()
    for parameter, expected in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)


def test_several_models_at_once(device: str) -> None:
    def linear(width: int) -> Make:
        def make(compiled: Wrap) -> Subject:
            model = nn.Linear(4, width)
            return Subject(compiled(model), [rand_with_grad], model)

        return make

    assert len(through_swap(*map(linear, (2, 3, 5)), device=device)) == 3


def in_threads(*calls: Callable[[], Any], capturing: bool = False) -> None:
    """Make all calls at once, each in its own thread.

    Not those that capture on torch 2.11, where Dynamo in a second thread crashes the process, with stock
    backends ("aot_eager"), too, even if one thread ends before the next begins.
    """
    if capturing and torch.__version__ < (2, 13):
        for call in calls:
            call()
        return
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> None:
        barrier.wait()
        call()

    with ThreadPoolExecutor(len(calls)) as pool:
        list(pool.map(run, calls))


def test_threads_with_a_model_each(device: str) -> None:
    def linear(width: int) -> Make:
        def make(compiled: Wrap) -> Subject:
            model = nn.Linear(4, width)
            return Subject(compiled(model), [lambda: (torch.linspace(0, 1, 24).view(6, 4),)], model)

        return make

    frame_swap.configure(when="manual")
    twins = [Twins(linear(width), device) for width in (2, 3, 5)]
    in_threads(*(lambda each=each: each.check("before") for each in twins), capturing=True)
    wait_for_all()
    in_threads(*(lambda each=each: each.check("during") for each in twins))
    assert len(swap_all()) == 3
    in_threads(*(lambda each=each: each.check("after") for each in twins))


def test_threads_that_share_a_function(device: str) -> None:
    frame_swap.configure(when="manual")
    x = torch.linspace(0, 1, 24, device=device)
    function = with_frame_swap(lambda x: (x * x).sin())

    def check() -> None:
        assert_same(function(x), (x * x).sin(), "in a thread")

    in_threads(*[check] * 4, capturing=True)  # threads that come at the same moment may each capture it
    wait_for_all()
    regions = swap_all()
    in_threads(*[check] * 4)
    assert live(frame_swap.report()) == regions
