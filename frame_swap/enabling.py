"""`frame_swap.enable()`: `torch.compile` with its default backend means frame-swap, whoever calls it."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

VARIABLE = "FRAME_SWAP"
"""1 enables frame-swap in each process that imports torch, where this package is installed."""

_lock = threading.Lock()
_users: set[Enabled] = set()
_put_back: Callable[[], None] = lambda: None  # noqa: E731


class Enabled:
    """The time for which frame-swap is enabled: from `enable()` to the end of its `with` block, or for good."""

    def __enter__(self) -> Enabled:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """`torch.compile` means Inductor again, unless it is enabled elsewhere, too. What it has made stays."""
        with _lock:
            _users.discard(self)
            if not _users:
                _put_back()


def enable() -> Enabled:
    """Have `torch.compile` mean frame-swap from now on where it names no backend, or "inductor".

    That holds for the whole process: for functions that call `torch.compile` and for libraries that do. Other
    backends stay what they are, and so does what was compiled before. `mode`, `options`, `dynamic` and `fullgraph`
    mean what they mean for Inductor. A worker starts at once.

    Returns:
        A context manager, for those who want it for a block: `with frame_swap.enable(): ...`.
    """
    from .farm.workers import workers

    workers.start()  # before torch is imported, where it is not yet
    return _enable()


def enable_where_asked_for() -> None:
    """At the end of `import torch`: enable frame-swap if the variable `FRAME_SWAP` asks for it.

    No worker starts: the process may be a launcher, or a worker of a DataLoader's. The first `torch.compile` starts
    one.
    """
    if os.environ.get(VARIABLE) == "1" and not os.environ.get("FRAME_SWAP_WORKER"):
        _enable()
        return
    package = sys.modules[__package__]
    if package.imported_by_torch:  # the program's own import is yet to come, and is to start a worker
        for name in [name for name in sys.modules if name.partition(".")[0] == package.__name__]:
            del sys.modules[name]


def _enable() -> Enabled:
    global _put_back
    from .internals import default_backend

    enabled = Enabled()
    with _lock:
        if not _users:
            _put_back = default_backend.replace(_backend)
        _users.add(enabled)
    return enabled


def _backend() -> Callable[..., Any]:
    from .backend import frame_swap_backend
    from .farm.service import service

    service.start()
    return frame_swap_backend
