"""Locks that an interrupt cannot leave taken."""

from __future__ import annotations

import itertools
import threading

import pytest
from faults.moments import interrupted

from frame_swap.runtime.locks import call_holding

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("wait", [False, True])
def test_an_interrupt_leaves_no_lock_taken_and_makes_the_call_at_most_once(wait: bool) -> None:
    calls_made = set()
    for at in itertools.count():
        lock = threading.Lock()
        held: list[bool] = []

        def call(lock: threading.Lock = lock, held: list[bool] = held) -> None:
            held.append(lock.locked())

        raised = interrupted(
            at, ("/runtime/locks.py",), lambda call=call, lock=lock: call_holding(lock, call, wait=wait)
        )
        assert not lock.locked(), f"point {at}"
        assert held in ([], [True]), f"point {at}"
        if not raised:
            break
        calls_made.add(len(held))
    assert held == [True]
    assert calls_made == {0, 1}, "no interrupt came before the call, or none after it"


def test_a_lock_of_another_thread_stays_taken_and_no_call_is_made() -> None:
    lock = threading.Lock()
    calls: list[None] = []
    with lock:
        assert not call_holding(lock, lambda: calls.append(None))
        assert lock.locked()
    assert not calls
