"""Failures that no other test brings about: each is warned of once, with its reason, and calls stay right."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

import pytest
import torch
from helpers import live

import frame_swap
from frame_swap import FrameSwapWarning, State, delivery, guards
from frame_swap.farm.local import pool
from frame_swap.frames.call_site import CallSite


class Refuses(Executor):
    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        raise RuntimeError("it takes no jobs today")


def raising(error: Exception) -> Callable[..., Any]:
    def raises(*_: Any, **__: Any) -> Any:
        raise error

    return raises


def fails(state: State, *words: str) -> None:
    """Compile a function, which fails: a warning says `words`, and calls before and after are right."""
    compiled, x = torch.compile(lambda x: (x.sin() @ x).relu(), backend="frame_swap"), torch.randn(4, 4)
    with pytest.warns(FrameSwapWarning, match="with the same results") as caught:
        torch.testing.assert_close(compiled(x), (x.sin() @ x).relu())
        (region,) = live(frame_swap.wait())
        torch.testing.assert_close(compiled(x), (x.sin() @ x).relu())
    assert region.state is state
    for word in words:
        assert word in region.reason
        assert [word in str(one.message) for one in caught] == [True]


def test_an_executor_that_takes_no_job() -> None:
    frame_swap.configure(executor=Refuses())
    fails(State.FAILED, "no compile could be started in Refuses", "it takes no jobs today", "executor=None")


def test_a_machine_that_gives_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    frame_swap.configure(memory_limit=77)  # a pool of its own
    monkeypatch.setattr(pool, "Process", raising(OSError(11, "Resource temporarily unavailable")))
    fails(State.FAILED, "no worker could be started", "Resource temporarily unavailable")


def test_a_frame_that_cannot_be_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CallSite, "redirect", raising(ValueError("for the test")))
    fails(State.FAILED, "installing failed: ValueError: for the test")


def test_a_late_guard_that_cannot_be_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    error = guards.Inexpressible("s0 is no argument: the region stays on eager code")
    monkeypatch.setattr(delivery, "condition_of", raising(error))
    fails(State.REJECTED, "a late guard: s0 is no argument")
