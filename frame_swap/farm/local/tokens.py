"""Tokens for compilers: whoever runs one in any worker of the program holds a token meanwhile, as make's jobs do.

A worker that is alone has all of them, and several share them as their kernels come. torch is not imported here:
the processes in which Triton's compiler runs import this module, too.

Guarantees:
- No more compilers run than there are tokens, in all workers of a program together.
- A process that dies gives its token back: a token is a file, and who holds it has the kernel's lock on it.
- Where there are no tokens, since the folder is gone or has no locks, nobody waits.

Method: GNU make's jobserver (its manual, "Sharing Job Slots with GNU make"), with locks in place of a pipe's bytes,
which a killed job takes along.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

FOLDER, COUNT = "FRAME_SWAP_TOKENS", "FRAME_SWAP_TOKEN_COUNT"
"""Variables of a worker's environment, for it and what it starts: the folder, and how many tokens there are."""

PAUSE = 0.01
"""Seconds between two looks for a token. A compiler runs for a tenth of a second at least."""


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Within the block, hold a token; wait until there is one."""
    token = _take()
    try:
        yield
    finally:
        if token is not None:
            os.close(token)


def call_holding(call: Callable[..., T], *args: Any) -> T:
    """`call(*args)`, with a token."""
    with held():
        return call(*args)


def _take() -> int | None:
    folder, count = os.environ.get(FOLDER), int(os.environ.get(COUNT, "0"))
    if not folder or not count:
        return None
    import fcntl

    number = os.getpid()  # so that not all begin with the same
    while True:
        for _ in range(count):
            number += 1
            path = os.path.join(folder, str(number % count))
            try:
                file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError:
                return None
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return file
            except BlockingIOError:
                os.close(file)
            except OSError:
                os.close(file)
                return None
        time.sleep(PAUSE)
