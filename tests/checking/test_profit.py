"""`profit=True` rejects slower code, reports by how much it is slower, and leaves no trace."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable
from typing import Any

import faulty
import pytest
import torch
from helpers import codes_called, live, wait_for_all
from torch import Tensor

import frame_swap
from frame_swap import FrameSwapWarning, Region, State
from frame_swap.checking.profit import CALLS, WARM_UP, Figure, Measurement, _Nodes
from frame_swap.checking.trial import Sides

pytestmark = pytest.mark.fast

TIMED = 2 * (WARM_UP + CALLS)
SLEPT_MS = 10


@pytest.fixture(autouse=True)
def profit() -> None:
    frame_swap.configure(when="manual", profit=True)


def sine(x: Tensor) -> Tensor:
    return x.sin() * 2


def slow_sine(x: Tensor) -> Tensor:
    out: Tensor = faulty.slowly(x.sin())
    return out


def measured(function: Callable[..., Any], make: Callable[[], Tensor], custom_pass: Any) -> tuple[Any, Region]:
    """Call `function`, and its backward if it has one, until there is a verdict."""
    compiled = torch.compile(function, backend="frame_swap")

    def call() -> None:
        x = make()
        out = compiled(x)
        torch.testing.assert_close(out, function(x))
        if out.requires_grad:
            out.sum().backward()

    with torch._inductor.config.patch(post_grad_custom_post_pass=custom_pass):
        call()
        wait_for_all()
        frame_swap.swap()
    (region,) = live(frame_swap.report())
    for _ in range(TIMED):
        assert region.state is State.TRIAL
        call()
    return compiled, region


@pytest.mark.parametrize(
    ("make", "slowed", "what"),
    [
        (lambda: torch.rand(3), "aten.sin.default", "(forward, medians"),
        (lambda: torch.rand(3, requires_grad=True), "aten.cos.default", "(forward and backward, medians"),
    ],
    ids=["forward", "backward"],
)
def test_slower_code_is_turned_away(make: Callable[[], Tensor], slowed: str, what: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled, region = measured(sine, make, faulty.SlowDown(slowed))
    assert region.state is State.REJECTED
    assert region.reason == f"it is slower than what serves now: {region.profit}"
    assert what in region.profit
    assert region.reason in " ".join(str(frame_swap.report()).split())
    (warning,) = (w for w in caught if issubclass(w.category, FrameSwapWarning))
    assert region.reason in str(warning.message)
    calls = region.eager_calls
    compiled(make())
    assert region.eager_calls == calls + 1


def test_faster_code_is_installed_and_no_trace_of_the_measuring_remains() -> None:
    faster = faulty.Miscompile("frame_swap_faulty.slowly.default", "aten.clone.default")
    with torch.no_grad():
        compiled, region = measured(slow_sine, lambda: torch.rand(3), faster)
        assert (region.state, region.reason) == (State.INSTALLED, "")
        assert re.search(r"a call, 1\d(\.\d)? ± .* before", region.profit), "it sleeps for 10 ms"
        assert frame_swap.report().as_dict()["regions"][0]["profit"] == region.profit
        assert region.eager_calls == 1 + TIMED // 2
        x = torch.rand(3)
        files = {code.co_filename for code in codes_called(lambda: compiled(x))}
    assert not [file for file in files if "/frame_swap/" in file]


def test_it_is_verified_first() -> None:
    frame_swap.configure(verify=1)
    compiled, x = torch.compile(sine, backend="frame_swap"), torch.rand(3)
    compiled(x)
    wait_for_all()
    frame_swap.swap()
    (region,) = live(frame_swap.report())
    compiled(x)
    assert (region.state, region.verified, region.profit) == (State.TRIAL, 1, "")
    for _ in range(TIMED):
        compiled(x)
    assert region.state in (State.INSTALLED, State.REJECTED)  # which is faster is not the question here
    assert region.profit


def test_what_raises_while_it_is_timed_is_answered() -> None:
    def relays(x: Tensor) -> Tensor:
        return faulty.relaid(x.sin()).cos().sum(-1)

    compiled, x = torch.compile(relays, backend="frame_swap"), torch.rand(3, 4)
    compiled(x)
    wait_for_all()
    frame_swap.swap()
    (region,) = live(frame_swap.report())
    faulty.lying = True
    try:
        with pytest.warns(FrameSwapWarning, match="compiled code raised"):
            for _ in range(4):
                torch.testing.assert_close(compiled(x), relays(x))
    finally:
        faulty.lying = False
    assert region.state is State.REJECTED


# The measuring itself, with a clock of its own


class Clock:
    """A clock that advances only while one of the sides runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def taking(self, seconds: Any) -> Callable[..., tuple[Tensor]]:
        durations = itertools.cycle(seconds)

        def run(x: Tensor) -> tuple[Tensor]:
            self.now += next(durations)
            return (x,)

        return run


def judge(current: list[float], compiled: list[float]) -> Measurement:
    clock = Clock()
    sides = Sides(*(clock.taking(seconds) for seconds in (current, compiled, [])))
    measurement = Measurement(lambda: True, clock)
    while measurement.verdict is None:
        measurement.call(sides, [torch.zeros(1)])
    return measurement


@pytest.mark.parametrize(
    ("current", "compiled", "slower"),
    [
        ([1.0], [1.0], False),
        ([1.0], [0.5], False),
        ([1.0], [1.1], True),
        ([0.5, 1.5], [0.6, 1.6], False),  # within the noise
        ([0.99, 1.01], [1.09, 1.11], True),
        ([1.0] * 9 + [50.0], [1.1], True),  # an outlier says nothing
    ],
)
def test_code_is_slower_where_it_is_by_more_than_the_noise(
    current: list[float], compiled: list[float], slower: bool
) -> None:
    assert bool(judge(current, compiled).verdict) == slower


def test_noise_is_the_half_width_of_a_notch() -> None:
    figure = Figure.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (figure.median, figure.noise) == (3.0, pytest.approx(1.57 * 2 / 5**0.5))
    assert str(Figure(0.00125, 0.0001)) == "1.25 ± 0.1 ms"


def test_what_is_disturbed_is_not_timed() -> None:
    clock = Clock()
    slow, fast = clock.taking([9.0]), clock.taking([1.0])
    quiet = iter([False] * 30)
    measurement = Measurement(lambda: next(quiet, True), clock)
    for _ in range(30):
        measurement.call(Sides(fast, slow, fast), [torch.zeros(1)])
    assert not any(measurement._samples.values())
    assert measurement.verdict is None


def test_a_backward_of_a_part_is_not_the_beginning_of_one_of_the_whole() -> None:
    clock = Clock()
    a, b = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)

    def run(a: Tensor, b: Tensor) -> tuple[Tensor]:
        return (a * 2 + b * 3,)  # the node of `a * 2` is made first, and runs last

    measurement = Measurement(lambda: True, clock)
    (out,) = measurement.call(Sides(run, run, run), [a, b])
    torch.autograd.grad(out, b, retain_graph=True)
    clock.now += 100
    out.backward()
    (sample,) = [sample for samples in measurement._samples.values() for sample in samples]
    assert sample.backward == 0


def test_a_call_ends_with_the_node_that_leads_out_of_it_and_was_made_first() -> None:
    weights = [torch.ones(2, 2, requires_grad=True) for _ in range(3)]
    argument = torch.ones(2, 2) @ weights[0]  # of what runs before the call
    before = [argument.grad_fn]
    first = argument @ weights[1]
    out = first.sin() @ weights[2]
    nodes = _Nodes.of([out, argument], before)
    assert nodes is not None
    assert nodes.first == [out.grad_fn]
    assert nodes.last is first.grad_fn
    assert _Nodes.of([argument], before) is None
    assert _Nodes.of([torch.ones(1)], [None]) is None
