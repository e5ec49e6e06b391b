"""In a worker: gather what a compile says and counts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from ...internals import logs
from ...runtime.patching import patched
from . import totals
from .audience import Audience, loggers
from .message import Echo, Interned, Record, Warned

log = logging.getLogger(__name__)

PREPARING = "frame-swap-probe"
"""The name of a worker's thread that does ahead what compiles need: what it says belongs to none of them."""


@contextlib.contextmanager
def recorded(audience: Audience | None, keep: Callable[[bytes], None]) -> Iterator[None]:
    """In a worker: gather what the block leaves behind, for `replay`.

    Args:
        audience: what to gather; None in the calling process itself, where everything is heard anyway.
        keep: called once, at the end of the block, with the pickled echo; also where the block fails.
    """
    if audience is None:
        yield
        return
    records: list[Record] = []
    before = totals.read()

    def call_handlers(logger: logging.Logger, record: logging.LogRecord) -> None:
        if record.threadName == PREPARING:
            return
        try:
            records.append(_plain_record(logger, record))
        except Exception:
            return  # its message does not format: no handler could show it, and logging that would end here

    with (
        _heard_by(audience),
        # Every record of every logger that passes levels and filters comes by here; there is no one handler that
        # all of torch's would reach.
        patched(logging.Logger, "callHandlers", call_handlers),
        patched(logs.structured, "intern_string", Interned),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")  # the filters of the calling process decide which are shown
        try:
            yield
        finally:
            try:
                echo = Echo(records, _plain_warnings(caught), totals.added(before, totals.read()))
                pickled = pickle.dumps(echo)
            except Exception:
                log.info("frame-swap: the log records and counters of a compile cannot be sent", exc_info=True)
            else:
                keep(pickled)


@contextlib.contextmanager
def _heard_by(audience: Audience) -> Iterator[None]:
    """Loggers and trace of this process have the caller's levels, also loggers that are made in the block."""
    changed: dict[logging.Logger, int] = {}

    def set_level(logger: logging.Logger, level: int) -> None:
        if logger.level != level:
            changed[logger] = logger.level
            logger.setLevel(level)

    for name in audience.levels:
        logging.getLogger(name)
    for name, logger in loggers().items():
        asked_for = getattr(logger, "artifact_name", None) in audience.artifacts
        set_level(logger, logging.DEBUG if asked_for else audience.levels.get(name, logging.NOTSET))
    handlers = [logging.NullHandler()] if audience.tracing else []
    state = logs.LogState({}, set(audience.artifacts))
    try:
        with (
            patched(logs.torch_logging, "log_state", state),
            patched(logs.torch_logging, "GET_DTRACE_STRUCTURED", audience.tracing_details),
            patched(logs.trace_log, "handlers", handlers),
        ):
            yield
    finally:
        for logger, level in changed.items():
            logger.setLevel(level)


def _plain_record(logger: logging.Logger, record: logging.LogRecord) -> Record:
    attributes = {name: _plain(value) for name, value in vars(record).items() if name not in ("args", "exc_info")}
    attributes["msg"] = record.getMessage()
    if isinstance(record.exc_info, tuple) and not record.exc_text:
        attributes["exc_text"] = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
    if logger is logs.trace_log and "chromium_event" in attributes["metadata"]:
        _place_in_timeline(attributes)
    return Record(attributes, getattr(logger, "artifact_name", None))


def _place_in_timeline(attributes: dict[str, Any]) -> None:
    """Give a timeline event its process: they all say 0, and begin and end nest within one process only."""
    event = json.loads(attributes["payload"])
    event["pid"] = os.getpid()
    attributes["payload"] = json.dumps(event, indent=0)
    digest = hashlib.md5(attributes["payload"].encode(), usedforsecurity=False)
    attributes["metadata"]["has_payload"] = digest.hexdigest()


def _plain(value: Any) -> Any:
    """`value` as data that every process can unpickle; anything that is not plain becomes text."""
    if value is None or type(value) in (bool, int, float, str, Interned):
        return value
    for plain in (str, int, float):
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else [_plain(item) for item in value]
    return repr(value)


def _plain_warnings(caught: list[warnings.WarningMessage]) -> list[Warned]:
    if not caught:
        return []
    # Filters name modules, and each module remembers which of its warnings were shown.
    modules = {getattr(module, "__file__", None): name for name, module in list(sys.modules.items())}
    return [
        Warned(str(w.message), _known_category(w.category), w.filename, w.lineno, modules.get(w.filename, ""))
        for w in caught
    ]


def _known_category(category: type[Warning]) -> type[Warning]:
    """The nearest category that pickles: a class that was made within a function does not."""
    for known in category.__mro__:
        try:
            pickle.dumps(known)
            return known
        except Exception:
            log.debug("frame-swap: a warning's category does not pickle: %s", known)
    return Warning
