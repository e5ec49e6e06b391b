"""torch.compile without the wait: eager at once, Inductor in the background, then the frame itself is rewritten.

model = torch.compile(model, backend="frame_swap")

To import this package is to start a worker: a process that gets ready to compile while the program gets ready to
run. `FRAME_SWAP_DISABLE=1` starts none.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backend import frame_swap_backend
    from .control import export, report, swap
    from .decorator import opt_in
    from .enabling import enable
    from .errors import FrameSwapWarning
    from .region import Compile, Region, Report, State
    from .settings import configure
    from .ui.explain import explain
    from .ui.progress import wait, watch
    from .ui.timeline import timeline

__all__ = [
    "Compile",
    "FrameSwapWarning",
    "Region",
    "Report",
    "State",
    "configure",
    "enable",
    "explain",
    "export",
    "frame_swap_backend",
    "opt_in",
    "report",
    "swap",
    "timeline",
    "wait",
    "watch",
]

_HOME = {
    "Compile": "region",
    "FrameSwapWarning": "errors",
    "Region": "region",
    "Report": "region",
    "State": "region",
    "configure": "settings",
    "enable": "enabling",
    "explain": "ui.explain",
    "export": "control",
    "frame_swap_backend": "backend",
    "opt_in": "decorator",
    "report": "control",
    "swap": "control",
    "timeline": "ui.timeline",
    "wait": "ui.progress",
    "watch": "ui.progress",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: `import frame_swap` is not to import torch.

    Whoever takes the backend or the decorator is about to use it.
    """
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("frame_swap_backend", "opt_in"):
        from .farm.service import service

        service.start()
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def _start_a_worker() -> None:
    from .farm.workers import workers

    workers.start()


def _is_torchs_import() -> bool:
    """Whether torch imports this package, and not the program.

    It does so at the end of its own import, where nothing is to happen yet, and when it looks up the backend: then
    `__getattr__` is next, which knows whether a worker is needed.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] != "torch":
        frame = frame.f_back
    return frame is not None


imported_by_torch = _is_torchs_import()

# A worker imports this package before it has lowered its priority: that must cost nothing. And our command line,
# `python -m frame_swap`, compiles nothing itself.
if not os.environ.get("FRAME_SWAP_WORKER") and sys.argv[:1] != ["-m"] and not imported_by_torch:
    _start_a_worker()
