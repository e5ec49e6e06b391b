"""What `python -m frame_swap doctor` finds, and how it is printed: 80 columns, for terminals and pipes."""

from __future__ import annotations

import enum
import textwrap
from collections.abc import Callable, Iterator
from typing import NamedTuple

from rich.console import Console
from rich.text import Text


class Verdict(enum.StrEnum):
    """What a finding means for the user."""

    OK = "ok"
    NOTE = "note"  # nothing is wrong, but it explains what the user may see
    WRONG = "wrong"


class Finding(NamedTuple):
    """One thing that was looked at.

    Attributes:
        subject: what was looked at, in 16 characters at most.
        verdict: whether something is wrong.
        found: what was found.
        advice: what to do; "" where nothing is wrong.
    """

    subject: str
    verdict: Verdict
    found: str
    advice: str = ""


Check = Callable[[], Iterator[Finding | str]]
"""Looks at something. Yields findings, and before it does what takes seconds, a line that says so."""

_WIDTH = 80
_INDENT = 2 + 5 + 2 + 16 + 1
_COLOURS = {Verdict.OK: "green", Verdict.NOTE: "yellow", Verdict.WRONG: "red"}


def show(console: Console, item: Finding | str) -> None:
    """Print a finding, or a line that says what is being done."""
    if isinstance(item, str):
        for line in _wrapped(item, _width(console) - 2):
            _print(console, Text(f"  {line}"))
        return
    column = max(20, _width(console) - _INDENT)
    lines = _wrapped(item.found, column)
    if item.advice:
        lines += _wrapped(f"advice: {item.advice}", column)
    verdict = Text(f"{item.verdict:5}", _COLOURS[item.verdict])
    _print(console, Text.assemble("  ", verdict, f"  {item.subject:16} {lines[0] if lines else ''}"))
    for line in lines[1:]:
        _print(console, Text(" " * _INDENT + line))


def _width(console: Console) -> int:
    return min(_WIDTH, console.width)


def _wrapped(text: str, width: int) -> list[str]:
    """Words stay whole, so that paths and commands can be copied: a long one sticks out."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _print(console: Console, line: Text) -> None:
    line.rstrip()
    console.print(line, soft_wrap=True)
