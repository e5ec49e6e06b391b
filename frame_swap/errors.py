"""Errors that cross rooms, and the warning that a user may see."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FrameSwapWarning(UserWarning):
    """Something in the background went wrong; the program goes on with the eager code."""


class Unshippable(Exception):
    """This graph cannot be compiled in another process; the message says why, for the report."""


class Unkeepable(Exception):
    """What Dynamo has made of a frame is of no use to another process; the message says why."""


class UnusableArtifact(Exception):
    """An artifact is not for this process; the message says why, and what to do."""


class UnsafeFolder(Exception):
    """Other users could put code into a folder; the message names the place and the reason."""


class UnusableFolder(Exception):
    """A folder holds nothing that `python -m frame_swap repro` can repeat; the message says why."""


class UnusableArchive(Exception):
    """A file cannot be brought into a store; the message says why."""


class FrameGone(Exception):
    """The frame's code is no longer in Dynamo's cache: code meant for it is stale."""


class UnknownLayout(Exception):
    """This torch or this Python lays out cache entries in a way that has not been checked."""


class Indirect(Exception):
    """The frame does not call its graph as Dynamo's code does, so it cannot be rewritten; the message says how."""


def first_line(error: BaseException) -> str:
    """An exception in one line: its type, and the first line of its message."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown `name`: the known one that is spelt most like it, if any is."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""
