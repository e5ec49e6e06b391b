"""Who listens in the calling process: captured in the call, and sent with the parcel."""

from __future__ import annotations

import dataclasses
import logging

from ...internals import logs


@dataclasses.dataclass(frozen=True)
class Audience:
    """What the calling process listens to.

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
        """The listeners of this moment."""
        return cls(
            {name: logger.level for name, logger in loggers().items() if logger.level != logging.NOTSET},
            frozenset(logs.torch_logging.log_state.artifact_names),
            any(_hears(handler) for handler in logs.trace_log.handlers),
            logs.torch_logging.GET_DTRACE_STRUCTURED,
        )


def loggers() -> dict[str, logging.Logger]:
    """All loggers of this process, by name."""
    # Copied, since other threads make loggers. A placeholder is a name of which only a child was asked for.
    known = dict(logging.root.manager.loggerDict)
    return {"root": logging.root} | {n: found for n, found in known.items() if isinstance(found, logging.Logger)}


def _hears(handler: logging.Handler) -> bool:
    """Whether records go anywhere. torch's own handler removes itself at the first record if it has no folder."""
    if isinstance(handler, logging.NullHandler):
        return False
    return not isinstance(handler, logs.LazyTraceHandler) or handler.root_dir is not None
