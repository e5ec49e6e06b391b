"""What travels from the worker to the calling process: plain, picklable values."""

from __future__ import annotations

from typing import Any, NamedTuple


class Record(NamedTuple):
    """A log record: its attributes, all plain, and the artifact's name where an artifact logger made it."""

    attributes: dict[str, Any]
    artifact: str | None


class Warned(NamedTuple):
    """A warning, with the module that it names, or ""."""

    text: str
    category: type[Warning]
    filename: str
    lineno: int
    module: str


class Totals(NamedTuple):
    """Numbers that a compile adds to, and lists that it appends to; or what one compile has added and appended."""

    metrics: dict[str, float]
    counters: dict[tuple[str, str], int]
    metric_lists: dict[str, list[Any]]
    times: dict[str, list[float]]


class Echo(NamedTuple):
    """What one compile leaves behind besides code."""

    records: list[Record]
    warnings: list[Warned]
    totals: Totals


class Interned(int):
    """A string that the structured trace refers to by a number, which is another one in each process."""

    text: str | None

    def __new__(cls, text: str | None) -> Interned:
        interned = super().__new__(cls, -1)
        interned.text = text
        return interned

    def __reduce__(self) -> tuple[type[Interned], tuple[str | None]]:
        return Interned, (self.text,)
