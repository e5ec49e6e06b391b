"""A thread that rests: how long, when not, and what is left behind."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator

import pytest

from frame_swap.runtime import machine, rests

pytestmark = pytest.mark.quick

MONITORS = sys.version_info >= (3, 12)


def told_of_functions() -> bool:
    """Whether something tells this thread of the functions that it starts."""
    if MONITORS:
        return any(sys.monitoring.get_tool(tool) is not None for tool in (3, 4))
    return sys.gettrace() is not None


def one() -> int:
    return 1


def work(calls: int) -> int:
    """Make calls, each of them short."""
    return sum(one() for _ in range(calls))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert not told_of_functions()


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds: list[float] = []
    here, usual = threading.get_ident(), time.sleep

    def sleep(length: float) -> None:  # other threads of the process sleep as usual
        (seconds.append if threading.get_ident() == here else usual)(length)

    monkeypatch.setattr(rests.time, "sleep", sleep)
    return seconds


def test_who_works_with_rests_rests_for_longer_than_it_has_worked(slept: list[float]) -> None:
    assert rests.with_rests(lambda: work(100_000), lambda: False) == work(100_000)
    assert slept
    assert min(slept) >= machine.REST * machine.WORK


def test_who_is_in_a_hurry_does_not_rest(slept: list[float]) -> None:
    rests.with_rests(lambda: work(100_000), lambda: True)
    assert slept == []


def test_a_hurry_that_begins_ends_the_rests(slept: list[float]) -> None:
    rests.with_rests(lambda: work(200_000), lambda: len(slept) == 2)
    assert len(slept) == 2


def test_rests_end_with_an_error_too(slept: list[float]) -> None:
    with pytest.raises(ZeroDivisionError):
        rests.with_rests(lambda: 1 // 0, lambda: False)


def test_another_threads_call_has_none(slept: list[float]) -> None:
    looks = []

    def beside() -> None:
        thread = threading.Thread(
            target=rests.with_rests, args=(lambda: work(100_000), lambda: bool(looks.append(1)))
        )
        thread.start()
        thread.join()
        work(10)

    rests.with_rests(beside, lambda: False)
    assert len(looks) == 1, "only before it begins"
    assert slept, "this thread's has"


@pytest.mark.skipif(MONITORS, reason="from Python 3.12 on rests and tracers do not meet")
def test_a_thread_that_is_traced_keeps_its_tracer(slept: list[float]) -> None:
    seen: list[str] = []

    def tracer(frame: object, event: str, argument: object) -> None:
        seen.append(event)

    usual = sys.gettrace()
    sys.settrace(tracer)
    try:
        rests.with_rests(lambda: work(100_000), lambda: False)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(usual)
    assert slept == []
    assert seen


@pytest.mark.skipif(not MONITORS, reason="sys.monitoring came with Python 3.12")
def test_with_all_ids_taken_there_are_no_rests(slept: list[float]) -> None:
    for tool in (3, 4):
        sys.monitoring.use_tool_id(tool, "another")
    try:
        assert rests.with_rests(lambda: work(100_000), lambda: False) == 100_000
    finally:
        for tool in (3, 4):
            sys.monitoring.free_tool_id(tool)
    assert slept == []


def test_one_piece_has_no_rest_within_and_one_after_where_looks_are_dear(slept: list[float]) -> None:
    def piecewise() -> int:
        del slept[:]
        rests.in_one_piece(lambda: work(100_000))
        return len(slept)

    found = rests.with_rests(piecewise, lambda: False)
    assert found > 1 if sys.version_info >= (3, 12) else found == 1
    assert rests.in_one_piece(lambda: work(10)) == work(10), "without rests it is a call"
