"""Torch's logs and structured trace."""

from __future__ import annotations

from .probe import names_looked_up

with names_looked_up():
    import torch._logging._internal as torch_logging
    from torch._logging import structured
    from torch._logging._internal import LazyTraceHandler, LogState, trace_log
    from torch._logging._internal import getArtifactLogger as artifact_logger

    # Looked up at each use, because torch assigns them anew or we do; here to see that they exist.
    _ASSIGNED = (torch_logging.log_state, torch_logging.GET_DTRACE_STRUCTURED, structured.intern_string)

__all__ = [
    "LazyTraceHandler",
    "LogState",
    "artifact_logger",
    "structured",
    "torch_logging",
    "trace_log",
]
