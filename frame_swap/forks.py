"""Forking a process whose other threads are in the middle of something.

A forked child has the memory of its parent as it was at that moment and only the thread that forked. What another
thread had half done stays so: locks held, modules half imported, functions patched. Most of it a child can throw
away; what it cannot is done within `held_off`.

Guarantees:
- While a thread is within `held_off`, a fork by another thread waits for it, at most `PATIENCE` seconds.
- A thread that forks does not wait for itself, and `held_off` waits for nothing but a fork in progress.
- An interrupt (`KeyboardInterrupt`) leaves no fork waiting for a block that has ended.

Assumed: whoever enters `held_off` holds already what it will wait for within, Dynamo's compile lock above all.
Where that cannot be so (an import's lock may be held by who forks), patience ends the deadlock.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

PATIENCE = 10.0
"""Loading takes a tenth of this. A fork that has waited for so long goes ahead."""

_within: dict[object, int] = {}  # one item for each block under way: the thread that is in it
_lock = threading.RLock()  # taken itself, not through the condition, which an interrupt can leave locked
_idle = threading.Condition(_lock)


@contextlib.contextmanager
def held_off() -> Iterator[None]:
    """What is done within the block, a forked child finds done or not begun."""
    block = object()
    try:
        with _lock:
            _within[block] = threading.get_ident()
        yield
    finally:
        with _lock:
            _within.pop(block, None)
            _idle.notify_all()


def _only_own() -> bool:
    return set(_within.values()) <= {threading.get_ident()}


def _before() -> None:
    _lock.acquire()
    _idle.wait_for(_only_own, PATIENCE)


def _after_in_parent() -> None:
    _lock.release()


def _after_in_child() -> None:
    global _lock, _idle
    _lock = threading.RLock()
    _idle = threading.Condition(_lock)
    for block in [block for block, thread in _within.items() if thread != threading.get_ident()]:
        del _within[block]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
