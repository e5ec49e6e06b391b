"""Forking a process whose other threads are in the middle of something.

A forked child has the memory of its parent as it was at that moment and only the thread that forked. What another
thread had half done stays so: locks held, modules half imported, functions patched. Most of it a child can throw
away; what it cannot is done while Dynamo's compile lock or one made by `lock` is held.

Guarantees:
- A fork takes all these locks and gives them back, in the parent and in the child: nobody else is within one of
  them when a child begins. It waits at most `PATIENCE` seconds for each.
- A thread that forks does not wait for itself. An interrupt (`KeyboardInterrupt`) leaves no lock taken.
- Where patience ran out, the child has a lock of its own in the place of one made by `lock`. Dynamo's stays as it
  is: the thread that holds it captures a graph, and what it has half done is Dynamo's, as without frame-swap.

Assumed: whoever takes several of these locks takes Dynamo's first, and waits for nothing within that the thread
which forks may hold. Where that cannot be so (the lock of an import), patience ends the deadlock.
"""

from __future__ import annotations

import os
import threading
from typing import Any

from .locks import acquire_each

PATIENCE = 10.0
"""Loading takes a tenth of this. A fork that has waited for so long goes ahead."""

_dynamos: list[Any] = []
_locks: list[Any] = []  # reentrant
_own = threading.local()  # `locks` of this thread's fork, and `taken`: for each, whether it has got it


def lock() -> Any:
    """A new lock; what is done while it is held, a forked child finds done or not begun."""
    new = threading.RLock()
    _locks.append(new)
    return new


def add_dynamos(lock: Any) -> None:
    """From now on a fork takes Dynamo's compile lock, before all others."""
    if lock not in _dynamos:
        _dynamos.append(lock)
        _locks.insert(0, lock)


def _before() -> None:
    taken: list[bool] = []
    _own.locks, _own.taken = list(_locks), taken
    acquire_each(_own.locks, taken, timeout=PATIENCE)


def _after_in_parent() -> None:
    for lock, taken in zip(_own.locks, _own.taken, strict=False):  # an interrupt has spared the rest
        if taken:
            lock.release()


def _after_in_child() -> None:
    _after_in_parent()
    for lock, taken in zip(_own.locks, _own.taken, strict=False):
        if not taken and lock not in _dynamos:
            lock._at_fork_reinit()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
