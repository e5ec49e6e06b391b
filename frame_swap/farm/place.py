"""Where a compile runs: who follows its progress, and where its log and its temporary files go.

`compile.py` knows no kind of worker. A worker process says here, once, what it offers; in an executor of the
user's nobody does.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable

_follow: Callable[[str], None] | None = None
_scratch = _log_file = ""


def enter(follow: Callable[[str], None], scratch: str, log_file: str) -> None:
    """Make this process a worker.

    Args:
        follow: called with each stage of a compile.
        scratch: the folder for temporary files of compilers.
        log_file: where stderr goes.
    """
    global _follow, _scratch, _log_file
    _follow, _scratch, _log_file = follow, scratch, log_file


def note(stage: str) -> None:
    """Report what the compile does now, in words that fit behind "while"."""
    if _follow is not None:
        _follow(stage)


def log(text: str) -> None:
    """Add lines to the worker's log; nowhere else is there one."""
    if _log_file:
        now = time.strftime("%H:%M:%S")
        with contextlib.suppress(OSError, ValueError):  # a full disk
            print(f"{now} {text}", file=sys.stderr, flush=True)


def log_file() -> str:
    """The path of the worker's log; "" where it has none."""
    return _log_file


def scratch() -> str:
    """The worker's folder for temporary files; "" where the process keeps its own."""
    return _scratch
