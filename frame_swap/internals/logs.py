"""The logs and the structured trace of torch, and the marks in its profiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.autograd import profiler

from .probe import names_looked_up

with names_looked_up():
    import torch._logging._internal as torch_logging
    from torch._guards import CompileId
    from torch._logging import structured
    from torch._logging._internal import LazyTraceHandler, LogState, trace_log, trace_structured
    from torch._logging._internal import getArtifactLogger as artifact_logger

    # These are looked up at each use, since torch or we assign them anew. Here they are only checked to exist.
    _ASSIGNED = (
        torch_logging.log_state,
        torch_logging.GET_DTRACE_STRUCTURED,
        structured.intern_string,
        profiler._is_profiler_enabled,
    )

__all__ = [
    "LazyTraceHandler",
    "LogState",
    "artifact_logger",
    "profiled",
    "structured",
    "torch_logging",
    "trace",
    "trace_log",
]


def trace(name: str, compile_id: str, payload: Callable[[], str]) -> None:
    """Add an artifact in JSON to the structured trace, where there is one: tlparse shows it beside torch's own.

    Args:
        compile_id: Dynamo's, of the graph that it is about.
        payload: returns the JSON; called only where somebody reads it.
    """
    if trace_log.handlers:
        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": name, "encoding": "json"},
            payload_fn=payload,
            compile_id=CompileId.from_string(compile_id) if compile_id else None,
        )


@contextmanager
def profiled(name: str) -> Iterator[None]:
    """The block has this name in profiles of torch's, and in NVTX where they emit it."""
    if not profiler._is_profiler_enabled:
        yield
        return
    with torch.profiler.record_function(name):
        yield
