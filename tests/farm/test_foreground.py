"""A compile in the foreground, and the workers beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from faults.harness import fresh_workers
from faults.moments import Moment

import frame_swap
from frame_swap import State
from frame_swap.farm.local.process import Process
from frame_swap.farm.workers import workers
from frame_swap.internals import inductor
from frame_swap.runtime import machine

pytestmark = pytest.mark.fast

X = torch.linspace(0.1, 0.9, 6)


@pytest.fixture(autouse=True)
def one_worker() -> Iterator[None]:
    fresh_workers()
    frame_swap.configure(workers=1)
    yield
    fresh_workers()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many workers there are when a compile in the foreground begins."""
    counts = []
    inner = inductor.stock_inductor

    def counting(*args: Any) -> Callable[..., Any]:
        counts.append(len(workers.pids()))
        return inner(*args)

    monkeypatch.setattr(inductor, "stock_inductor", counting)
    return counts


def compile_in_foreground() -> None:
    """A worker cannot be sent a function without a name."""
    unpicklable = {"post_grad_custom_pre_pass": lambda graph: None}
    compiled = torch.compile(lambda x: x.sin() + 1, backend="frame_swap", options=unpicklable)
    torch.testing.assert_close(compiled(X), X.sin() + 1)
    assert frame_swap.report().regions[-1].state is State.FOREGROUND


def compile_in_worker(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    compiled = torch.compile(function, backend="frame_swap")
    torch.testing.assert_close(compiled(X), function(X))
    return compiled


def test_what_stock_cannot_compile_was_compiled_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo breaks the graph where Inductor cannot trace an operator; the report does not call it compiled."""

    def fail(*args: Any) -> None:
        raise ArithmeticError("for the test")

    monkeypatch.setattr(inductor, "stock_inductor", fail)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="for the test"):
        compile_in_foreground()
    (region,) = frame_swap.report().regions
    assert (region.state, region.reason) == (State.STALE, "its capture ended with ArithmeticError: for the test")


@pytest.mark.parametrize(("cpus", "left"), [(1, 0), (2, 0), (3, 1), (16, 1)])
def test_an_idle_worker_makes_way_where_cores_are_few(
    cpus: int, left: int, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "usable_cpus", lambda: cpus)
    workers.start()
    assert len(workers.pids()) == 1  # it imports torch
    compile_in_foreground()
    assert seen == [left]


def test_the_next_graph_starts_a_worker(seen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_cpus", lambda: 2)
    compile_in_foreground()
    assert seen == [0]
    kept = compile_in_worker(lambda x: x.cos())
    assert frame_swap.wait(timeout=240).regions[-1].state is State.INSTALLED
    del kept


def test_a_worker_that_compiles_goes_on(seen: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """It does what stock would do in the program."""
    monkeypatch.setattr(machine, "usable_cpus", lambda: 2)
    with Moment(monkeypatch, Process, "run") as compiling:
        kept = compile_in_worker(lambda x: x.cos())
        compiling.wait()
        compile_in_foreground()
    assert seen == [1]
    assert frame_swap.wait(timeout=240).regions[0].state is State.INSTALLED
    del kept
