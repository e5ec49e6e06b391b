"""The logs and the structured trace of torch."""

from __future__ import annotations

from .probe import names_looked_up

with names_looked_up():
    import torch._logging._internal as torch_logging
    from torch._logging import structured
    from torch._logging._internal import LazyTraceHandler, LogState, trace_log
    from torch._logging._internal import getArtifactLogger as artifact_logger

    # These are looked up at each use, since torch or we assign them anew. Here they are only checked to exist.
    _ASSIGNED = (torch_logging.log_state, torch_logging.GET_DTRACE_STRUCTURED, structured.intern_string)

__all__ = [
    "LazyTraceHandler",
    "LogState",
    "artifact_logger",
    "structured",
    "torch_logging",
    "trace_log",
]
