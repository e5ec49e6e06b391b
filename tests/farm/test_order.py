"""Several graphs wait for one worker: which of them it compiles, and in which order."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any

import pytest
import torch
from faults.moments import InBackground, Moment
from helpers import live
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

import frame_swap
from frame_swap import State, delivery
from frame_swap.farm import service
from frame_swap.farm.local.pool import Pool
from frame_swap.farm.queue import Demand
from frame_swap.farm.workers import workers

pytestmark = pytest.mark.fast

Function = Callable[[Tensor], Tensor]

X = torch.linspace(0.1, 0.9, 6)


def compiled(function: Function, calls: int = 1) -> Function:
    """`function`, compiled and called."""
    result: Function = torch.compile(function, backend="frame_swap")
    for _ in range(calls):
        torch.testing.assert_close(result(X), function(X))
    return result


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Moment]:
    """The only worker has the first graph, and compiles it when the moment is released; what comes then waits."""
    frame_swap.configure(workers=1)
    with Moment(monkeypatch, Pool, "_run_once") as moment:
        first = compiled(lambda x: x + 1)
        moment.wait()
        yield moment
    del first


def guarded() -> dict[str, Any]:
    """A scope with a function in it that Dynamo guards on a class."""
    scope: dict[str, Any] = {"marker": type("", (), {})}
    exec("def function(x): return x.cos() if marker is not None else x", scope)
    return scope


def drop(scope: dict[str, Any]) -> None:
    """Delete the class of the guard: Dynamo then empties the function's cache entry."""
    del scope["marker"]
    gc.collect()


def order_of_compiles() -> list[int]:
    """Wait for all compiles; return the indices of their regions in the report."""
    regions = enumerate(frame_swap.wait(timeout=240).regions)
    return [at for _, at in sorted((r.compile_span, at) for at, r in regions if r.compile_span is not None)]


def test_most_calls_times_size_first(busy: Moment) -> None:
    kept = [
        compiled(lambda x: x.sin(), 2),
        compiled(lambda x: x.cos(), 3),
        compiled(lambda x: x.tan(), 4),
        compiled(lambda x: x.exp().sin().cos().tan().neg(), 3),
    ]
    busy.release()
    assert order_of_compiles() == [0, 4, 3, 2, 1]
    assert {region.state for region in live(frame_swap.report())} == {State.INSTALLED}, frame_swap.report()
    del kept


def test_a_call_that_waits_for_its_compile_comes_first(busy: Moment, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = compiled(lambda x: x.sin(), 20)
    frame_swap.configure(when="wait")
    with Moment(monkeypatch, service.Job, "wait") as asked:
        call = InBackground(lambda: compiled(lambda x: x.cos()))
        asked.wait()
    busy.release()
    call.result()
    assert order_of_compiles() == [0, 2, 1]
    del kept


def test_what_is_gone_is_never_compiled(busy: Moment) -> None:
    scope = guarded()
    kept = [compiled(lambda x: x.sin()), compiled(scope["function"], 5), compiled(lambda x: x.tan())]
    drop(scope)
    busy.release()
    assert order_of_compiles() == [0, 1, 3]
    assert [region.state for region in live(frame_swap.report())][2] is State.STALE
    del kept


def test_the_next_one_comes_where_a_compile_was_lost(busy: Moment, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compile that is tried again keeps its turn."""
    kept = [compiled(lambda x: x.sin()), compiled(lambda x: x.cos(), 5)]
    inner, lost = Pool._run_once, []

    def lose(*args: Any) -> Any:
        if not lost:
            lost.append(1)
            raise service.Lost("for the test")
        return inner(*args)

    monkeypatch.setattr(Pool, "_run_once", lose)
    busy.release()
    assert order_of_compiles() == [0, 2, 1]
    assert lost
    assert {region.state for region in live(frame_swap.report())} == {State.INSTALLED}, frame_swap.report()
    del kept


@pytest.mark.filterwarnings("ignore::frame_swap.FrameSwapWarning")
def test_when_the_pool_is_killed_nothing_waits_for_ever(busy: Moment) -> None:
    """As at exit."""
    kept = compiled(lambda x: x.sin())
    (pool,) = [workers.pool]
    assert pool is not None
    pool.kill()
    busy.release()
    frame_swap.wait(timeout=60)
    assert {region.state for region in live(frame_swap.report())} == {State.FAILED}
    workers.pool = None
    del kept


def test_who_waits_for_a_cancelled_compile_is_woken() -> None:
    """The program ends while another of its threads is in a first call under `when="wait"`."""
    job, outcomes = service.Job(None, 0.0), []
    waiting = threading.Thread(target=lambda: outcomes.append(job.wait()))
    waiting.start()
    job._future.cancel()
    waiting.join(60)
    (outcome,) = outcomes
    assert outcome.error == "the executor cancelled it"


@pytest.fixture
def demands(monkeypatch: pytest.MonkeyPatch) -> list[Demand]:
    """How much the program wants what it has asked for."""
    seen = []
    inner = delivery.service.submit

    def submit(parcel: Any, deliver: Any, sizes: Any, demand: Demand, place: Any) -> service.Job:
        seen.append(demand)
        return inner(parcel, deliver, sizes, demand, place)

    monkeypatch.setattr(delivery.service, "submit", submit)
    return seen


def test_only_calls_count_that_the_code_would_have_served(demands: list[Demand]) -> None:
    """A late guard turns calls away; the compile for these begins with none."""
    frame_swap.configure(when="manual")
    function = torch.compile(lambda x: adaptive_avg_pool2d(x.sin(), 2), backend="frame_swap", dynamic=True)
    small, large = torch.randn(1, 6, 6), torch.randn(1, 8, 8)
    for _ in range(3):
        function(small)
    assert [demand.calls() for demand in demands] == [3]
    frame_swap.wait()
    frame_swap.swap()
    for _ in range(2):
        function(large)
    assert [demand.calls() for demand in demands] == [5, 2]
    assert demands[0].size == demands[1].size >= 3


class Recorded(Executor):
    """An executor that begins nothing."""

    def __init__(self) -> None:
        self.got: list[Future[Any]] = []

    def submit(self, call: Callable[..., Any], /, *args: Any, **keywords: Any) -> Future[Any]:  # type: ignore[override]
        self.got.append(Future())
        return self.got[-1]


def test_a_users_executor_gets_graphs_as_they_come_and_hears_what_nobody_wants() -> None:
    executor = Recorded()
    frame_swap.configure(executor=executor, workers=1)
    scope = guarded()
    kept = [compiled(scope["function"]), compiled(lambda x: x.cos(), 5)]
    assert [future.cancelled() for future in executor.got] == [False, False]
    drop(scope)
    assert [future.cancelled() for future in executor.got] == [True, False]
    del kept
