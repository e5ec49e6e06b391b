"""In the calling process: hand what a worker has recorded to the listeners."""

from __future__ import annotations

import logging
import pickle
import sys
import warnings
from collections.abc import Callable
from typing import Any

from ...internals import dynamo, fake_tensors, logs
from . import totals
from .message import Echo, Interned, Record, Warned

log = logging.getLogger(__name__)


def replay(pickled: bytes, compile_id: str | None) -> None:
    """On the loader thread: log, warn, trace and count what `recorded` has gathered.

    Args:
        pickled: the argument of `keep`; b"" where there is none.
        compile_id: Dynamo's, which formatters of log records print.
    """
    if not pickled:
        return
    try:
        echo: Echo = pickle.loads(pickled)
        context = fake_tensors.CompileContext(fake_tensors.CompileId.from_string(compile_id))
        with dynamo.compile_lock:
            totals.add(echo.totals)
    except Exception:
        log.info("frame-swap: the log records and counters of a compile cannot be replayed", exc_info=True)
        return
    with fake_tensors.compile_context(context):
        for record in echo.records:
            _each(_log, record)
        for warning in echo.warnings:
            _each(_warn, warning)


def _each(hand_over: Callable[[Any], None], item: Any) -> None:
    try:
        hand_over(item)
    except Exception:
        return  # a filter makes errors of warnings, or a handler of the program's raises: not for this thread


def _log(record: Record) -> None:
    heard = logging.makeLogRecord(record.attributes)
    if heard.name == logs.trace_log.name:
        if logs.trace_log.handlers:
            vars(heard)["metadata"] = _interned_here(record.attributes["metadata"])
            logs.trace_log.handle(heard)
        return
    module, _, _ = heard.name.rpartition(".")
    logger = logs.artifact_logger(module, record.artifact) if record.artifact else logging.getLogger(heard.name)
    if logger.isEnabledFor(heard.levelno):
        logger.handle(heard)


def _interned_here(value: Any) -> Any:
    """`value` with this process's numbers of its strings; a string's first use writes its number to the trace."""
    if isinstance(value, Interned):
        return logs.structured.intern_string(value.text)
    if isinstance(value, dict):
        return {key: _interned_here(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_interned_here(item) for item in value]
    return value


def _warn(warning: Warned) -> None:
    module = sys.modules.get(warning.module)
    # `warnings.warn` remembers here that this was shown: once per place, from whichever process it came.
    shown = _shown if module is None else vars(module).setdefault("__warningregistry__", {})
    warnings.warn_explicit(
        warning.text, warning.category, warning.filename, warning.lineno, warning.module or None, shown
    )


_shown: dict[Any, Any] = {}
"""The registry of warnings that name no module of this process."""
