"""Ask for compiled code that fits a call which all present code turns away.

Guarantees:
- One compile at a time is asked for, no sizes twice, and no more in all than the frame could have had recompiles.
- `ask` neither waits nor raises because of another thread; an interrupt leaves no lock taken.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from ..runtime import locks


class Specialiser:
    """Requests compiles for other sizes of one region.

    Args:
        sizes: what the symbols of the graph's shapes stand for in a call, by their names.
        compile: begins a compile for such sizes.
        limit: the most compiles.
    """

    def __init__(
        self,
        sizes: Callable[[Sequence[Any]], dict[str, int]],
        compile: Callable[[dict[str, int]], object],
        limit: int,
    ) -> None:
        self._sizes = sizes
        self._compile = compile
        self._left = limit
        self._asked: list[dict[str, int]] = []
        self._busy = threading.Lock()  # held from a request until its result is in place, or will not come
        self._busy.acquire()

    def ask(self, args: Sequence[Any]) -> None:
        """A call with the graph's inputs `args` was turned away."""
        taken: list[bool] = []
        try:
            locks.acquire_each([self._busy], taken, blocking=False)
            if not taken[0]:
                return
            sizes = self._sizes(args)
            if sizes in self._asked or not self._left:
                return
            self._asked.append(sizes)
            self._left -= 1
            self._compile(sizes)
            taken.clear()  # `resume` gives it back
        finally:
            if taken and taken[0]:  # no call, in which an interrupt could come before the release
                self._busy.release()  # last: another call may ask from then on

    def resume(self) -> None:
        """The code that was asked for is in place, or will not come."""
        if self._busy.locked():  # not where an interrupt came between the request and the note of it
            self._busy.release()
