"""Frames that are being captured beside the program: `wait()` waits for these, and the report names them.

Guarantees:
- In a forked child none is.
"""

from __future__ import annotations

import os
from types import CodeType

from .registry import changed, lock

_frames: list[str] = []


def name_of(code: CodeType) -> str:
    """How the report names a frame: qualified name, file and line of the user's function."""
    return f"{code.co_qualname}, {code.co_filename}:{code.co_firstlineno}"


def short(frame: str) -> str:
    """The name of a frame, without the folder of its file."""
    name, _, place = frame.rpartition(", ")
    return f"{name} {place.rpartition('/')[2]}".strip()


def capture_begins(frame: str) -> None:
    """`frame` waits for its capture, or is being captured."""
    with lock:
        _frames.append(frame)


def capture_ends(frame: str) -> None:
    """The capture of `frame` is over, however it ended."""
    with lock:
        if frame in _frames:  # not in a child of the process that began it
            _frames.remove(frame)
        changed.notify_all()


def capturing() -> tuple[str, ...]:
    """The frames, the oldest first."""
    with lock:
        return tuple(_frames)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_frames.clear)
