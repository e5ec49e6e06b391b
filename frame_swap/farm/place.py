"""Where a compile runs: who follows its progress, and where its temporary files go.

`compile.py` knows no kind of worker. A worker process says here, once, what it offers; in an executor of the
user's nobody does.
"""

from __future__ import annotations

from collections.abc import Callable

_follow: Callable[[str], None] | None = None
_scratch = ""


def enter(follow: Callable[[str], None], scratch: str) -> None:
    """Make this process a worker.

    Args:
        follow: called with each stage of a compile.
        scratch: the folder for temporary files of compilers.
    """
    global _follow, _scratch
    _follow, _scratch = follow, scratch


def note(stage: str) -> None:
    """Report what the compile does now, in words that fit behind "while"."""
    if _follow is not None:
        _follow(stage)


def scratch() -> str:
    """The worker's folder for temporary files; "" where the process keeps its own."""
    return _scratch
