"""A thread that works in short pieces and rests between them, so that other threads get the GIL.

Guarantees:
- With the return of `with_rests`, nothing of it is left behind in the interpreter.
- Where somebody else traces the thread (`sys.settrace`), or has all ids of `sys.monitoring`, there are no rests.
- One thread at a time works with rests; another one's call has none.

Method: the thread looks at the clock whenever it starts a function of Python's. It is told so by what costs least:
`sys.monitoring` from Python 3.12 on, where a function that another thread starts is not told of again, and
`sys.settrace` before. `sys.setprofile` tells of returns and of C functions, too: with it an import of 0.75 s cost
a program 1.9 s of its steps; this way it is 1.4 (Python 3.11) or 1.0 (3.12).
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from .machine import REST, WORK

T = TypeVar("T")


def with_rests(call: Callable[[], T], in_a_hurry: Callable[[], bool]) -> T:
    """Return `call()`, and sleep after each `WORK` seconds for `REST` times as long, until `in_a_hurry()`."""
    if in_a_hurry() or not _one.acquire(blocking=False):
        return call()
    try:
        rests = _Rests(in_a_hurry)
        with _told_of_functions(rests.look):
            _at_work[threading.get_ident()] = rests
            return call()
    finally:
        _at_work.pop(threading.get_ident(), None)
        _one.release()


def in_one_piece(call: Callable[[], T]) -> T:
    """Return `call()`; where this thread works with rests on Python 3.11, it has none within, and one after.

    To look at the clock at each call makes code of many small calls slow: on Python 3.11 it takes 4 times as long,
    and hundredths of a second in one piece are the lesser evil. From 3.12 on it takes 1.3 times as long.
    """
    rests, told = _at_work.get(threading.get_ident()), sys.gettrace()
    if rests is None or told is None or sys.version_info >= (3, 12):
        return call()
    sys.settrace(None)
    try:
        return call()
    finally:
        sys.settrace(told)
        rests.look()


class _Rests:
    def __init__(self, in_a_hurry: Callable[[], bool]) -> None:
        self._since = time.perf_counter()
        self._in_a_hurry = in_a_hurry

    def look(self) -> bool:
        """Sleep for `REST` times as long as this thread has worked since its last rest, if that is long enough.

        Returns False where it is in a hurry: there are no more rests.
        """
        if time.perf_counter() - self._since <= WORK:
            return True
        if self._in_a_hurry():
            return False
        time.sleep(REST * (time.perf_counter() - self._since))
        self._since = time.perf_counter()
        return True


_one = threading.Lock()
_at_work: dict[int, _Rests] = {}  # by thread

if sys.version_info >= (3, 12):
    _monitoring = sys.monitoring
    _STARTS = _monitoring.events.PY_START
    _NAME = "frame-swap"
    _FREE_IDS = (3, 4)  # the others are a debugger's, a profiler's and so on

    @contextlib.contextmanager
    def _told_of_functions(look: Callable[[], bool]) -> Iterator[None]:
        """Within the block, each function that starts on this thread calls `look`, until that returns False."""
        free = [tool for tool in _FREE_IDS if _monitoring.get_tool(tool) is None]
        if not free:
            yield
            return
        tool, thread = free[0], threading.get_ident()

        def told(code: object, offset: int) -> Any:
            return None if threading.get_ident() == thread and look() else _monitoring.DISABLE

        _monitoring.use_tool_id(tool, _NAME)
        try:
            _monitoring.register_callback(tool, _STARTS, told)
            _monitoring.restart_events()  # what was disabled the last time
            _monitoring.set_events(tool, _STARTS)
            yield
        finally:
            _end(tool)

    def _end(tool: int) -> None:
        _monitoring.set_events(tool, 0)
        _monitoring.register_callback(tool, _STARTS, None)
        _monitoring.free_tool_id(tool)

    def _end_all() -> None:
        for tool in _FREE_IDS:
            if _monitoring.get_tool(tool) == _NAME:
                _end(tool)

else:

    @contextlib.contextmanager
    def _told_of_functions(look: Callable[[], bool]) -> Iterator[None]:
        """Within the block, each function that starts on this thread calls `look`, until that returns False."""
        if sys.gettrace() is not None:
            yield
            return

        def told(frame: object, event: str, argument: object) -> None:
            if not look():
                sys.settrace(None)

        sys.settrace(told)
        try:
            yield
        finally:
            sys.settrace(None)

    def _end_all() -> None:
        """A thread's function ends with the thread."""


def _after_fork_in_child() -> None:
    """The thread that worked with rests is not here."""
    global _one
    _one = threading.Lock()
    _at_work.clear()
    _end_all()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
