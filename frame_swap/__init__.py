"""torch.compile without the wait: eager at once, Inductor in the background, then the frame itself is rewritten.

model = torch.compile(model, backend="frame_swap")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backend import frame_swap_backend
    from .control import report, swap, wait
    from .decorator import opt_in
    from .errors import FrameSwapWarning
    from .region import Compile, Region, Report, State
    from .settings import configure

__all__ = [
    "Compile",
    "FrameSwapWarning",
    "Region",
    "Report",
    "State",
    "configure",
    "frame_swap_backend",
    "opt_in",
    "report",
    "swap",
    "wait",
]

_HOME = {
    "Compile": "region",
    "FrameSwapWarning": "errors",
    "Region": "region",
    "Report": "region",
    "State": "region",
    "configure": "settings",
    "frame_swap_backend": "backend",
    "opt_in": "decorator",
    "report": "control",
    "swap": "control",
    "wait": "control",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for.

    A worker imports this package before it has lowered its priority, so that must cost nothing. And whoever
    takes the backend or the decorator is about to use it: that is the earliest moment to start the workers.
    """
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("frame_swap_backend", "opt_in"):
        from .farm.service import service

        service.start()
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
