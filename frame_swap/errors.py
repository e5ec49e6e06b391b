"""Why a graph stays in the calling process."""

from __future__ import annotations


class Unshippable(Exception):
    """This graph cannot be compiled in another process; the message says why, for the report."""


def first_line(error: BaseException) -> str:
    """An exception in one line: its type, and what it says first."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
