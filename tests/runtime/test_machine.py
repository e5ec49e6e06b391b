"""The policy by which program and workers share the machine."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

import pytest

from frame_swap.runtime import machine

pytestmark = pytest.mark.quick

T = TypeVar("T")


@pytest.fixture(params=[1, 2, 8, 128])
def cpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    count: int = request.param
    monkeypatch.setattr(machine, "usable_cpus", lambda: count)
    return count


def test_compilers_fit_the_cpus_and_leave_one_where_there_are_some(cpus: int) -> None:
    assert machine.compilers() == min(cpus - 1 if cpus >= 4 else cpus, machine.MOST_COMPILERS)


def seen_at_the_end_of_two_calls_at_a_time(run: Callable[[Callable[[], None]], None], look: Callable[[], T]) -> T:
    """What `look` returns in the second of two calls of `run`, of which the first has ended before."""
    begun, first_ended = threading.Event(), threading.Event()
    seen: list[T] = []

    def second() -> None:
        begun.set()
        assert first_ended.wait(100)
        seen.append(look())

    def first() -> None:
        other.start()
        assert begun.wait(100)

    other = threading.Thread(target=run, args=(second,))
    run(first)
    first_ended.set()
    other.join()
    return seen[0]


def test_courteous_calls_at_a_time_put_the_interval_back() -> None:
    usual = sys.getswitchinterval()
    seen = seen_at_the_end_of_two_calls_at_a_time(machine.run_courteously, sys.getswitchinterval)
    assert seen == machine.SWITCH_INTERVAL
    assert sys.getswitchinterval() == usual


def test_a_courteous_call_sees_a_short_switch_interval_which_ends_with_it() -> None:
    usual = sys.getswitchinterval()
    seen: list[float] = []

    def fail() -> None:
        seen.append(sys.getswitchinterval())
        raise ValueError

    with pytest.raises(ValueError):
        machine.run_courteously(fail)
    assert seen == [pytest.approx(min(usual, machine.SWITCH_INTERVAL))]
    assert sys.getswitchinterval() == usual


def full_collections() -> int:
    """How many there are while objects are made, enough to make Python look at all it has."""
    before = gc.get_stats()[2]["collections"]
    kept = [[[]] for _ in range(3_000_000)]
    after = gc.get_stats()[2]["collections"]
    del kept
    return int(after - before)


has_generations = pytest.mark.skipif(
    not machine._HAS_GENERATIONS, reason="this Python has no full collections that hold the GIL"
)


@has_generations
def test_no_full_garbage_collection_begins_in_a_courteous_call() -> None:
    usual = gc.get_threshold()
    assert full_collections() > 0
    assert machine.run_courteously(full_collections) == 0
    assert full_collections() > 0
    assert gc.get_threshold() == usual


@has_generations
def test_what_the_program_says_of_garbage_in_a_courteous_call_stays() -> None:
    usual = gc.get_threshold()
    try:
        machine.run_courteously(lambda: gc.set_threshold(500, 5, 5))
        assert gc.get_threshold() == (500, 5, 5)
        gc.set_threshold(0)
        assert machine.run_courteously(gc.get_threshold)[0] == gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(*usual)


def test_objects_that_the_program_has_frozen_stay_frozen() -> None:
    gc.freeze()
    try:
        machine.run_courteously(lambda: None)
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


@has_generations
def test_what_few_objects_were_made_in_stays_young() -> None:
    gc.collect()
    young = [[]]
    machine.run_without_full_collections(lambda: None)
    assert any(each is young for each in gc.get_objects(generation=0))


@has_generations
def test_what_many_objects_were_made_in_counts_as_old() -> None:
    young = [[]]
    kept = machine.run_without_full_collections(lambda: [[] for _ in range(100_000)])
    assert not any(each is young for each in gc.get_objects(generation=0) + gc.get_objects(generation=1))
    del kept


@has_generations
def test_calls_without_full_collections_at_a_time_put_the_thresholds_back() -> None:
    usual = gc.get_threshold()
    seen = seen_at_the_end_of_two_calls_at_a_time(machine.run_without_full_collections, gc.get_threshold)
    assert seen == (machine.YOUNG_OBJECTS, machine._NEVER, machine._NEVER)
    assert gc.get_threshold() == usual


@has_generations
def test_a_finalizer_that_makes_such_a_call_does_not_wait_for_the_one_it_interrupts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual, get_count, made = gc.get_threshold(), gc.get_count, []

    def interrupted() -> tuple[int, int, int]:
        if not made:
            made.append("a call")
            machine.run_without_full_collections(lambda: None)
        return get_count()

    monkeypatch.setattr(gc, "get_count", interrupted)
    machine.run_without_full_collections(lambda: None)
    assert made
    assert gc.get_threshold() == usual


@has_generations
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_that_was_forked_in_such_a_call_has_the_usual_thresholds() -> None:
    usual = gc.get_threshold()

    def fork() -> int:
        child = os.fork()
        if child == 0:
            os._exit(0 if gc.get_threshold() == usual else 1)
        return os.waitpid(child, 0)[1]

    assert machine.run_without_full_collections(fork) == 0
