"""Take a lock so that an interrupt (`KeyboardInterrupt`) cannot leave it taken.

Guarantees:
- An interrupt comes before a lock is taken, or after the answer of `acquire` is recorded; never in between.

Assumed: `list.extend` and `map` are C code, and CPython looks at signals only between bytecode instructions.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any


def acquire_each(locks: Iterable[Any], taken: list[bool], **how: Any) -> None:
    """Acquire each of `locks` with the keywords `how`; append to `taken` whether that succeeded."""
    taken.extend(map(operator.methodcaller("acquire", **how), locks))


def call_holding(lock: Any, call: Callable[[], object], *, wait: bool | float = False) -> bool:
    """Make `call` while holding `lock`. False where another thread holds it, and `call` was not made.

    Args:
        wait: whether to wait for the lock, or for how many seconds.
    """
    how = {"blocking": wait} if isinstance(wait, bool) else {"timeout": wait}
    taken: list[bool] = []
    try:
        acquire_each([lock], taken, **how)
        if taken[0]:
            call()
        return taken[0]
    finally:
        if taken and taken[0]:  # no call, in which an interrupt could come before the release
            lock.release()
