"""The lock of all regions, and the condition that wakes those who wait for compiles.

Guarantees:
- The lock is reentrant and held for moments only; no code of the user's runs under it.
- A fork waits for it: a child finds each state changed or unchanged.
"""

from __future__ import annotations

import os
import threading

from ..runtime import forks

lock = forks.lock()  # taken itself, not through the condition, which an interrupt can leave locked
changed = threading.Condition(lock)


def _after_fork_in_child() -> None:
    changed.__init__(lock)  # type: ignore[misc]  # its waiters are the parent's threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
