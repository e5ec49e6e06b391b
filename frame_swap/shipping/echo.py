"""What a compile leaves behind besides code reaches the user as if it had been compiled here.

Totals (`torch._inductor.metrics`, Dynamo's `counters` and `compile_times`), warnings, log records and structured
trace records arise in the worker: `recorded` gathers them there, and `replay` hands them to whoever listens in
the calling process. What that process does besides, tracing the pair and loading the artifact, repeats much of
it, and is `muted`.

Guarantees:
- Neither half raises or changes what the compile does; what cannot be recorded or replayed is left out.
- Each thing is heard once, and not before the compile is over. Those who listen decide with the filters, levels
  and handlers that they have then; what is recorded, with those they had at capture.
- Where nobody listens, what travels is the totals and what reaches every user: warnings, and records of level
  WARNING or above. Text is made and sent only for those who asked for it.
- Meanwhile the worker writes to no log or trace of the program's: its handlers are not called.
- A compile in the calling process itself, in an executor of threads, is heard there anyway: nothing is recorded.

Assumed: one compile at a time in a worker. What its other threads say meanwhile belongs to that compile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pickle
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

from ..internals import dynamo, fake_tensors, logs

log = logging.getLogger(__name__)


# --- Whoever listens: captured with the process state, in the call -----------------------------------------


@dataclasses.dataclass(frozen=True)
class Audience:
    """What the calling process listens to; travels with the parcel.

    Attributes:
        levels: each logger's own level, by name, where it has one; the root's is "root".
        artifacts: what `TORCH_LOGS` or `set_logs` enables besides loggers, such as "output_code".
        tracing: whether structured trace records go anywhere.
        tracing_details: whether those of `TORCH_DTRACE` do.
    """

    levels: dict[str, int]
    artifacts: frozenset[str]
    tracing: bool
    tracing_details: bool

    @property
    def reads_code(self) -> bool:
        """Whether anyone might look at graphs and generated code."""
        return bool(self.artifacts) or self.tracing

    @classmethod
    def capture(cls) -> Audience:
        """Those who listen now."""
        return cls(
            {name: logger.level for name, logger in _loggers().items() if logger.level != logging.NOTSET},
            frozenset(logs.torch_logging.log_state.artifact_names),
            any(_hears(handler) for handler in logs.trace_log.handlers),
            logs.torch_logging.GET_DTRACE_STRUCTURED,
        )


def _hears(handler: logging.Handler) -> bool:
    """Not the one that torch installs in any case: without a directory it removes itself at the first record."""
    return not isinstance(handler, logs.LazyTraceHandler) or handler.root_dir is not None


def _loggers() -> dict[str, logging.Logger]:
    # Copied, since other threads make loggers; placeholders are names of which only a child was asked for.
    known = dict(logging.root.manager.loggerDict)
    return {"root": logging.root} | {n: found for n, found in known.items() if isinstance(found, logging.Logger)}


# --- In a worker -------------------------------------------------------------------------------------------


class _Record(NamedTuple):
    """A log record: its attributes, all plain, and the artifact's name where it is an artifact logger's."""

    attributes: dict[str, Any]
    artifact: str | None


class _Warning(NamedTuple):
    text: str
    category: type[Warning]
    filename: str
    lineno: int
    module: str


class _Totals(NamedTuple):
    """Numbers that a compile adds to, and lists that it appends to; or what one has added and appended."""

    metrics: dict[str, float]
    counters: dict[tuple[str, str], int]
    metric_lists: dict[str, list[Any]]
    times: dict[str, list[float]]


class _Echo(NamedTuple):
    records: list[_Record]
    warnings: list[_Warning]
    totals: _Totals


class _Interned(int):
    """A number that stands for a string in this process's trace, and would for another in the caller's."""

    text: str | None

    def __new__(cls, text: str | None) -> _Interned:
        interned = super().__new__(cls, -1)
        interned.text = text
        return interned

    def __reduce__(self) -> tuple[type[_Interned], tuple[str | None]]:
        return _Interned, (self.text,)


@contextlib.contextmanager
def recorded(audience: Audience | None, keep: Callable[[bytes], None]) -> Iterator[None]:
    """In a worker: gather what the block leaves behind, for `replay`; `keep` gets it also where the block fails.

    Args:
        audience: what to gather; None in the calling process itself, where everything is heard anyway.
        keep: called once, at the end of the block, with the pickled echo.
    """
    if audience is None:
        with _pair_counts():
            yield
        return
    records: list[_Record] = []
    before = _totals()

    def call_handlers(logger: logging.Logger, record: logging.LogRecord) -> None:
        try:
            records.append(_plain_record(logger, record))
        except Exception:
            return  # its message does not format: no handler could have shown it, and to log that would end here

    with (
        _heard_by(audience),
        # Past levels and filters every record of every logger comes by here; there is no one handler that all
        # of torch's would reach.
        mock.patch.object(logging.Logger, "callHandlers", call_handlers),
        mock.patch.object(logs.structured, "intern_string", _Interned),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")  # whether it is shown is for the filters in the calling process
        try:
            with _pair_counts():
                yield
        finally:
            try:
                echo = _Echo(records, _plain_warnings(caught), _added(before, _totals()))
                pickled = pickle.dumps(echo)
            except Exception:
                log.info("frame-swap: what a compile left behind cannot be sent", exc_info=True)
            else:
                keep(pickled)


@contextlib.contextmanager
def _heard_by(audience: Audience) -> Iterator[None]:
    """Loggers and trace of this process are as talkative as the caller's, also those that are yet to be made."""
    changed: dict[logging.Logger, int] = {}

    def set_level(logger: logging.Logger, level: int) -> None:
        if logger.level != level:
            changed[logger] = logger.level
            logger.setLevel(level)

    for name in audience.levels:
        logging.getLogger(name)
    for name, logger in _loggers().items():
        asked_for = getattr(logger, "artifact_name", None) in audience.artifacts
        set_level(logger, logging.DEBUG if asked_for else audience.levels.get(name, logging.NOTSET))
    handlers = [logging.NullHandler()] if audience.tracing else []
    state = logs.LogState({}, set(audience.artifacts))
    try:
        with (
            mock.patch.object(logs.torch_logging, "log_state", state),
            mock.patch.object(logs.torch_logging, "GET_DTRACE_STRUCTURED", audience.tracing_details),
            mock.patch.object(logs.trace_log, "handlers", handlers),
        ):
            yield
    finally:
        for logger, level in changed.items():
            logger.setLevel(level)


def _plain_record(logger: logging.Logger, record: logging.LogRecord) -> _Record:
    attributes = {name: _plain(value) for name, value in vars(record).items() if name not in ("args", "exc_info")}
    attributes["msg"] = record.getMessage()
    if isinstance(record.exc_info, tuple) and not record.exc_text:
        attributes["exc_text"] = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
    if logger is logs.trace_log and "chromium_event" in attributes["metadata"]:
        _place_in_timeline(attributes)
    return _Record(attributes, getattr(logger, "artifact_name", None))


def _place_in_timeline(attributes: dict[str, Any]) -> None:
    """Give a timeline event its process: they all say 0, and begin and end nest within one process only."""
    event = json.loads(attributes["payload"])
    event["pid"] = os.getpid()
    attributes["payload"] = json.dumps(event, indent=0)
    digest = hashlib.md5(attributes["payload"].encode(), usedforsecurity=False)
    attributes["metadata"]["has_payload"] = digest.hexdigest()


def _plain(value: Any) -> Any:
    """`value` in data that every process can unpickle; what is not plain, as text."""
    if value is None or type(value) in (bool, int, float, str, _Interned):
        return value
    for plain in (str, int, float):
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else [_plain(item) for item in value]
    return repr(value)


def _plain_warnings(caught: list[warnings.WarningMessage]) -> list[_Warning]:
    if not caught:
        return []
    # Filters name modules, and each module remembers which of its warnings were shown.
    modules = {getattr(module, "__file__", None): name for name, module in list(sys.modules.items())}
    return [
        _Warning(str(w.message), _known_category(w.category), w.filename, w.lineno, modules.get(w.filename, ""))
        for w in caught
    ]


def _known_category(category: type[Warning]) -> type[Warning]:
    """The nearest category that travels: a class that was made within a function does not."""
    for known in category.__mro__:
        try:
            pickle.dumps(known)
            return known
        except Exception:
            log.debug("frame-swap: a warning's category does not pickle: %s", known)
    return Warning


def _totals() -> _Totals:
    from torch._inductor import metrics

    numbers = {n: v for n, v in vars(metrics).items() if isinstance(v, (int, float)) and not n.startswith("_")}
    lists = {name: list(value) for name, value in vars(metrics).items() if isinstance(value, list)}
    counts = {
        (category, key): count
        for category, counter in list(dynamo.counters.items())
        for key, count in list(counter.items())
    }
    times = {name: list(seconds) for name, seconds in list(dynamo.compilation_time_metrics.items())}
    return _Totals(numbers, counts, lists, times)


def _added(before: _Totals, after: _Totals) -> _Totals:
    from torch._inductor.scheduler import BaseSchedulerNode

    def portable(item: Any) -> Any:  # a scheduler's node drags its graph along: its name stands for it
        if isinstance(item, tuple):
            return tuple(map(portable, item))
        return item.get_name() if isinstance(item, BaseSchedulerNode) else item

    def tails(old: dict[str, list[Any]], new: dict[str, list[Any]]) -> dict[str, list[Any]]:
        added = {name: items[len(old.get(name, ())) :] for name, items in new.items()}
        return {name: list(map(portable, items)) for name, items in added.items() if items}

    metrics = {name: number - before.metrics.get(name, 0) for name, number in after.metrics.items()}
    counters = {key: count - before.counters.get(key, 0) for key, count in after.counters.items()}
    return _Totals(
        {name: number for name, number in metrics.items() if number},
        {key: count for key, count in counters.items() if count},
        tails(before.metric_lists, after.metric_lists),
        tails(before.times, after.times),
    )


@contextlib.contextmanager
def _pair_counts() -> Iterator[None]:
    """That AOTAutograd has traced the graph is counted once: in the call, which traces the pair."""
    counter = dynamo.counters["aot_autograd"]
    counted = {key: counter[key] for key in ("total", "ok")}
    try:
        yield
    finally:
        for key, count in counted.items():
            counter[key] = count


# --- In the calling process --------------------------------------------------------------------------------


def replay(pickled: bytes, compile_id: str | None) -> None:
    """In the calling process, on the loader thread: everyone who listens hears what `recorded` has gathered.

    Args:
        pickled: what `keep` got; b"" where there is nothing.
        compile_id: Dynamo's, which formatters of log records print.
    """
    if not pickled:
        return
    try:
        echo: _Echo = pickle.loads(pickled)
        context = fake_tensors.CompileContext(fake_tensors.CompileId.from_string(compile_id))
        with dynamo.compile_lock:
            _add(echo.totals)
    except Exception:
        log.info("frame-swap: what a compile left behind cannot be replayed", exc_info=True)
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


def _log(record: _Record) -> None:
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
    if isinstance(value, _Interned):
        return logs.structured.intern_string(value.text)
    if isinstance(value, dict):
        return {key: _interned_here(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_interned_here(item) for item in value]
    return value


def _warn(warning: _Warning) -> None:
    module = sys.modules.get(warning.module)
    # Where `warnings.warn` would remember that this was shown: once per place, whichever process it came from.
    shown = _shown if module is None else vars(module).setdefault("__warningregistry__", {})
    warnings.warn_explicit(
        warning.text, warning.category, warning.filename, warning.lineno, warning.module or None, shown
    )


_shown: dict[Any, Any] = {}


def _add(totals: _Totals) -> None:
    from torch._inductor import metrics

    for name, number in totals.metrics.items():
        setattr(metrics, name, getattr(metrics, name) + number)
    for name, items in totals.metric_lists.items():
        getattr(metrics, name).extend(items)
    for (category, key), count in totals.counters.items():
        dynamo.counters[category][key] += count
    for name, seconds in totals.times.items():
        dynamo.compilation_time_metrics.setdefault(name, []).extend(seconds)


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Nobody hears what AOTAutograd and Inductor log and trace on this thread: the worker's echo says it.

    Warnings and errors are heard, and so is the timeline, since the time is spent here too.
    """
    thread = threading.get_ident()

    def is_heard(record: logging.LogRecord) -> bool:
        if record.thread != thread or record.levelno >= logging.WARNING:
            return True
        return not _TIMELINE.isdisjoint(getattr(record, "metadata", ()))

    talking = [
        logger
        for name, logger in _loggers().items()
        if name.startswith(("torch._functorch.", "torch._inductor.")) and logger.isEnabledFor(logging.INFO)
    ]
    if logs.trace_log.handlers:
        talking.append(logs.trace_log)
    for logger in talking:
        logger.addFilter(is_heard)
    try:
        yield
    finally:
        for logger in talking:
            logger.removeFilter(is_heard)


_TIMELINE = frozenset(("chromium_event", "str"))
"""Structured trace records: events of the timeline, and the numbering of strings, which later records refer to."""
