"""Which private names of torch are missing, and which versions of torch frame-swap is tested on.

The other modules of this package look their names up when they are imported, inside `names_looked_up`. A name that
is gone is recorded here; `backend.py` then compiles with stock Inductor and warns once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

CHECKED = "2.11 to 2.15"

_missing: list[str] = []


@contextlib.contextmanager
def names_looked_up() -> Iterator[None]:
    """The block imports private names of torch; record the first that is gone instead of raising."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        _missing.append(str(error))


def missing() -> str | None:
    """What this torch lacks of what frame-swap needs, or None."""
    from . import aot, dispatcher, dynamo, eager, eval_frame, fake_tensors, inductor, logs  # noqa: F401

    return _missing[0] if _missing else None


__all__ = [
    "CHECKED",
    "missing",
    "names_looked_up",
    "version_checked",
]


def version_checked() -> bool:
    """Whether this torch is of a version that frame-swap is tested on."""
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return (2, 11) <= (major, minor) <= (2, 15)
