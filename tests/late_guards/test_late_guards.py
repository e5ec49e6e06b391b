"""Guards on sizes that a compile adds after Dynamo has closed the frame's own; the rewritten code checks them."""

from __future__ import annotations

import dataclasses
import dis
import itertools
import pickle
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
import sympy
import torch
from helpers import assert_same, live, observe
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import adaptive_avg_pool2d

import frame_swap
from frame_swap import FrameSwapWarning, Region, State, delivery
from frame_swap.farm.protocol import Outcome
from frame_swap.farm.workers import workers
from frame_swap.internals import dynamo
from frame_swap.region import Attempt, Event, Purpose, records
from frame_swap.serving.trampoline import Trampoline

pytestmark = pytest.mark.fast

Function = Callable[[Tensor], Any]


def pool(x: Tensor) -> Tensor:
    """Inductor compiles it for a single size of `x`, so each size needs an artifact."""
    return adaptive_avg_pool2d(x.sin(), 2)


def widen(x: Tensor) -> Tensor:
    """Inductor compiles it differently for long rows than for short ones."""
    return torch.cat([x, x[:, 1:]], 1).softmax(1)


def images(n: int) -> Tensor:
    return torch.randn(1, n, n, requires_grad=True)


def rows(n: int) -> Tensor:
    return torch.randn(3, n, requires_grad=True)


@pytest.fixture(autouse=True)
def by_hand() -> None:
    frame_swap.configure(when="manual")


def compiled(function: Function, **options: Any) -> Function:
    return torch.compile(function, backend="frame_swap", dynamic=True, **options)


def check(function: Function, compiled: Function, make: Callable[[int], Tensor], *sizes: int) -> None:
    for n in sizes:
        x = make(n)
        expected, actual = (observe(f, (x.detach().clone().requires_grad_(),)) for f in (function, compiled))
        assert_same(actual, expected, f"size {n}")


def swap() -> Region:
    frame_swap.wait()
    (region,) = live(frame_swap.swap())
    return region


@pytest.mark.parametrize("sizes", itertools.permutations((8, 9, 12)), ids=str)
def test_each_size_gets_an_artifact_in_whatever_order_they_come(sizes: Sequence[int]) -> None:
    function = compiled(pool)
    check(pool, function, images, *sizes)  # before
    region = swap()
    for served, n in enumerate(sizes, 1):
        check(pool, function, images, n)  # during: the first size is served, the others ask
        assert swap().artifacts == served
    calls = region.eager_calls
    check(pool, function, images, *sizes, *sizes)  # after
    assert region.eager_calls == calls
    assert [guard.split()[-1] for guard in region.late_guards] == [f"{n})" for n in sizes]  # Eq(s53, 8)
    assert (region.state, region.reason) == (State.INSTALLED, "")


def test_what_is_asked_for_as_soon_as_the_first_artifact_is_there_is_awaited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another thread may install the artifact and request another before the loader thread's offer has returned."""
    function = compiled(pool)
    move, returned = Attempt.move, threading.Event()
    offer = Trampoline.offer

    def offer_to_the_end(self: Trampoline, *args: Any) -> None:
        offer(self, *args)
        returned.set()

    def move_and_ask(self: Attempt, event: Event, reason: str = "") -> bool:
        done = move(self, event, reason)
        if event is Event.LOADED and done and self.purpose is Purpose.FIRST:
            (one,) = records()
            one.server.install(wait=True)
            function(images(9))
        return done

    monkeypatch.setattr(Attempt, "move", move_and_ask)
    monkeypatch.setattr(Trampoline, "offer", offer_to_the_end)
    function(images(8))
    assert returned.wait(120)
    assert swap().artifacts == 2


def test_an_artifact_serves_all_the_sizes_that_it_fits() -> None:
    function = compiled(widen)
    check(widen, function, rows, 6)
    region = swap()
    check(widen, function, rows, 3, 7, 2000)
    assert region.eager_calls == 1
    check(widen, function, rows, 3000)
    assert (region.eager_calls, swap().artifacts) == (2, 2)
    check(widen, function, rows, 4000, 3, 2000, 3000)
    assert region.eager_calls == 2


def test_the_predicate_is_inline_in_the_rewritten_code() -> None:
    function = compiled(pool)
    check(pool, function, images, 8)
    assert _sizes_compared_with() == []
    swap()
    assert _sizes_compared_with() == [8]
    check(pool, function, images, 9)
    swap()
    assert sorted(_sizes_compared_with()) == [8, 9]


def _sizes_compared_with() -> list[int]:
    (entry,) = dynamo.cache_entries(pool.__code__)
    return [
        instruction.argval
        for loaded, instruction in itertools.pairwise(dis.get_instructions(entry.code))
        if str(loaded.argval).startswith("frame_swap:") and loaded.opname == "LOAD_FAST"
    ]


def test_a_call_that_nothing_fits_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    submit = delivery.service.submit
    monkeypatch.setattr(delivery.service, "submit", lambda *a: asked.append(a[2]) or submit(*a))
    function = compiled(pool)
    check(pool, function, images, 8)
    swap()
    check(pool, function, images, 9, 9, 10, 9)  # 10 has to wait for its turn
    assert [sizes and list(sizes.values()) for sizes in asked] == [None, [9]]
    swap()
    check(pool, function, images, 10, 9, 8)
    assert [sizes and list(sizes.values()) for sizes in asked] == [None, [9], [10]]


def test_a_region_holds_a_bounded_number_of_artifacts() -> None:
    function = compiled(pool)
    with torch._dynamo.config.patch(recompile_limit=2):
        for n in (8, 9, 10, 11, 12):
            check(pool, function, images, n)
            region = swap()
    assert region.artifacts == 3
    calls = region.eager_calls
    check(pool, function, images, 8, 9, 10, 11, 12)
    assert region.eager_calls == calls + 2


def test_where_the_frame_cannot_be_rewritten_the_predicate_is_called() -> None:
    def wrapping(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        inner = frame_swap.frame_swap_backend(gm, inputs)
        return lambda *args: inner(*args)

    function = torch.compile(pool, backend=wrapping, dynamic=True)
    for n in (8, 9):
        check(pool, function, images, n)
        region = swap()
    calls = region.eager_calls
    check(pool, function, images, 8, 9, 9, 8)
    assert (region.artifacts, region.eager_calls) == (2, calls)
    check(pool, function, images, 10)
    assert region.eager_calls == calls + 1


def test_when_wait_late_guards_are_not_late() -> None:
    """Dynamo recompiles for them, as for stock Inductor."""
    frames = {}
    for name in ("inductor", "frame_swap"):
        torch._dynamo.reset()
        frame_swap.configure(when="wait")
        counter = CompileCounterWithBackend(name)
        function = torch.compile(pool, backend=counter, dynamic=True)
        frames[name] = [(check(pool, function, images, n), counter.frame_count) for n in (8, 9, 8, 12)]
    assert frames["frame_swap"] == frames["inductor"]
    assert [r.artifacts for r in frame_swap.report().regions] == [1, 1, 1]
    assert not any(r.late_guards or r.eager_calls for r in frame_swap.report().regions)


class Tampering:
    """An executor that changes fields of the workers' outcomes."""

    def __init__(self, tamper: Callable[[Outcome], dict[str, Any]]) -> None:
        self._tamper = tamper

    def submit(self, call: Callable[[], Outcome]) -> Future[Outcome]:
        changed: Future[Outcome] = Future()

        def pass_on(done: Future[Outcome]) -> None:
            changed.set_result(dataclasses.replace(done.result(), **self._tamper(done.result())))

        workers.submit(call).add_done_callback(pass_on)
        return changed


def test_a_guard_that_cannot_be_expressed_leaves_the_pair() -> None:
    def add_guard(outcome: Outcome) -> dict[str, Any]:
        (known,) = pickle.loads(outcome.late_guards)
        return {"late_guards": pickle.dumps([known, sympy.zeta(*known.free_symbols) > 2])}

    frame_swap.configure(executor=Tampering(add_guard))
    function = compiled(pool)
    with pytest.warns(FrameSwapWarning, match="late guard zeta"):
        check(pool, function, images, 8)
        region = swap()
    assert region.state is State.REJECTED
    check(pool, function, images, 8, 9)
    assert region.eager_calls == 3


def test_when_no_other_artifact_can_be_had_the_first_goes_on() -> None:
    outcomes: list[Outcome] = []

    def fail_the_second(outcome: Outcome) -> dict[str, Any]:
        outcomes.append(outcome)
        return {"artifact": None, "error": "for the test"} if len(outcomes) == 2 else {}

    frame_swap.configure(executor=Tampering(fail_the_second))
    function = compiled(pool)
    check(pool, function, images, 8)
    region = swap()
    with pytest.warns(FrameSwapWarning, match="late guards turn away: its compile failed: for the test"):
        check(pool, function, images, 9)
        swap()
    assert region.state is State.INSTALLED
    assert "for the test" in region.reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(pool, function, images, 8, 9, 10)  # 9 is not asked for again, 10 is
        assert swap().artifacts == 2
        calls = region.eager_calls
        check(pool, function, images, 8, 10)
    assert region.eager_calls == calls


def test_a_frame_that_goes_while_it_asks_keeps_nobody_waiting() -> None:
    function = compiled(pool)
    check(pool, function, images, 8)
    region = swap()
    frame_swap.configure(delay=3600)
    check(pool, function, images, 9)
    assert region.specialising
    torch._dynamo.reset()
    assert not region.specialising
    assert live(frame_swap.wait()) == [region]
    assert region.server is None
