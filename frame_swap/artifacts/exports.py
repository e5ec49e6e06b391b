"""Packages of AOTInductor's that are in place, for `frame_swap.export`.

Guarantees:
- Nothing here keeps a function of the user's, or its code, alive.
- Each function may be called on any thread.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from types import CodeType
from typing import NamedTuple


class Installed(NamedTuple):
    """A package for one graph of a frame.

    Attributes:
        package: its bytes.
        inputs: where the frame has the tensors that it takes, as Dynamo names them, in order.
        serves: whether its code serves calls.
    """

    package: bytes
    inputs: tuple[str, ...]
    serves: Callable[[], bool]


_lock = threading.Lock()
_of: weakref.WeakKeyDictionary[CodeType, list[Installed]] = weakref.WeakKeyDictionary()


def keep(code: CodeType, installed: Installed) -> None:
    """Remember a package that is about to serve the frames of `code`."""
    with _lock:
        _of.setdefault(code, []).append(installed)


def known(code: CodeType) -> list[Installed]:
    """The packages that were made for frames of `code`, the oldest first."""
    with _lock:
        return list(_of.get(code, ()))
