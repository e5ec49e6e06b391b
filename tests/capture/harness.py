"""Change the program at chosen moments of a capture, and compare calls with eager ones."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from frame_swap.capture.captures import Capture, Outcome


def run_elsewhere(do: Callable[[], object]) -> None:
    """Do it on another thread, as the program would: the capturing one has modes of its own."""
    thread = threading.Thread(target=do)
    thread.start()
    thread.join()


class Planned(NamedTuple):
    """A change at a moment of a capture: when it has made so many calls of Dynamo's functions."""

    at: int
    do: Callable[[], object]


@contextmanager
def changed_meanwhile(plan: list[Planned]) -> Iterator[list[int]]:
    """Captures within the block do what is planned, which is taken from `plan`.

    Yields a list to which the number of calls that each capture has made is appended.
    """
    stock, lengths = Capture.run, []

    def run(capture: Capture) -> Any:
        calls = 0

        def call(frame: FrameType, event: str, arg: Any) -> None:
            nonlocal calls
            if "/torch/_dynamo/" in frame.f_code.co_filename:
                calls += 1
                while plan and calls >= plan[0].at:
                    run_elsewhere(plan.pop(0).do)

        sys.settrace(call)
        try:
            return stock(capture)
        finally:
            sys.settrace(None)
            lengths.append(calls)

    Capture.run = run  # type: ignore[method-assign]
    try:
        yield lengths
    finally:
        Capture.run = stock  # type: ignore[method-assign]


def same_as_eager(compiled: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> bool:
    """Whether a call returns what eager code returns; buffers are put back."""
    before = [buffer.clone() for buffer in model.buffers()]
    want = model(x)
    after = [buffer.clone() for buffer in model.buffers()]
    _put(model, before)
    have = compiled(x)
    same = all(torch.equal(a, b) for a, b in zip(model.buffers(), after, strict=True))
    _put(model, before)
    same = same and (have.dtype, have.shape, have.requires_grad) == (want.dtype, want.shape, want.requires_grad)
    return same and torch.equal(have, want)


def _put(model: nn.Module, values: list[Tensor]) -> None:
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), values, strict=True):
            buffer.copy_(value)


def outcomes_of_captures(monkeypatch: pytest.MonkeyPatch) -> list[Outcome]:
    """How captures end from now on."""
    stock, seen = Capture.run, []

    def run(capture: Capture) -> Outcome:
        seen.append(stock(capture))
        return seen[-1]

    monkeypatch.setattr(Capture, "run", run)
    return seen
