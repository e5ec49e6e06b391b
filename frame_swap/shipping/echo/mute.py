"""In the calling process: silence what the worker's echo will say."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

from ...internals import logs
from . import totals
from .audience import loggers

_TIMELINE = frozenset(("chromium_event", "str"))
"""Structured trace records: events of the timeline, and the numbering of strings, which later records refer to."""


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Within the block, what AOTAutograd and Inductor log, trace and count on this thread reaches nobody.

    Warnings and errors are heard, and so is the timeline, since the time is spent here too.
    """
    thread = threading.get_ident()

    def is_heard(record: logging.LogRecord) -> bool:
        if record.thread != thread or record.levelno >= logging.WARNING:
            return True
        return not _TIMELINE.isdisjoint(getattr(record, "metadata", ()))

    talking = [
        logger
        for name, logger in loggers().items()
        if name.startswith(("torch._functorch.", "torch._inductor.")) and logger.isEnabledFor(logging.INFO)
    ]
    if logs.trace_log.handlers:
        talking.append(logs.trace_log)
    for logger in talking:
        logger.addFilter(is_heard)
    try:
        with totals.graph_not_counted():
            yield
    finally:
        for logger in talking:
            logger.removeFilter(is_heard)
