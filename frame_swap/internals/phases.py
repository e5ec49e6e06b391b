"""The phases of a compile, as torch times them itself for its own timeline."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

from .probe import names_looked_up

with names_looked_up():
    from torch._dynamo.utils import ChromiumEventLogger

    _END = ChromiumEventLogger.log_event_end

Phase: TypeAlias = tuple[str, float, float]
"""Its name, and when it began and ended, in seconds since the epoch."""

SHORTEST = 0.001
"""Seconds below which a phase is left out."""

MOST = 300
"""How many are kept of one compile: the longest."""


class Phases:
    """Phases of the compile that this process runs."""

    def __init__(self) -> None:
        self._found: list[Phase] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The block is a phase that torch does not time."""
        began = time.time()
        try:
            yield
        finally:
            self._found.append((name, began, time.time()))

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Within the block, phases that torch times are kept."""

        def log_event_end(
            logger: Any, name: str, now: int, metadata: dict[str, Any], start: int, *rest: Any, **named: Any
        ) -> None:
            self._found.append((name, start / 1e9, now / 1e9))
            _END(logger, name, now, metadata, start, *rest, **named)

        ChromiumEventLogger.log_event_end = log_event_end  # type: ignore[assignment,method-assign]
        try:
            yield
        finally:
            ChromiumEventLogger.log_event_end = _END  # type: ignore[method-assign]

    def longest(self) -> tuple[Phase, ...]:
        """Those that are worth showing, in the order in which they began."""
        long = [phase for phase in self._found if phase[2] - phase[1] >= SHORTEST]
        return tuple(sorted(heapq.nlargest(MOST, long, key=lambda p: p[2] - p[1]), key=lambda p: p[1]))
