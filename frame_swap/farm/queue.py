"""Calls that wait for a worker. The one that will gain most comes first.

Guarantees:
- What somebody waits for comes first. The rest comes in the order of calls so far × size, and what is worth the
  same in the order of `put`.
- What the program has stopped calling, while it goes on calling others that wait here, comes after these. It keeps
  its place in the queue: once it is called again, it is worth what it was.
- A call that was put is taken once, or its future is cancelled, and then nothing here holds it for longer than
  until the next `take`.
- `put` and `cancel` take no lock, and neither does the `cancel` of a future: all of them may be called anywhere.

Assumed: appending to a list, copying it and removing an object from it are atomic.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

TURNS = 20
"""When one waiting graph has been called so often, others that the program still needs have been called, too. In
one step a graph is called several times if it stands in a loop: once for each level of a feature pyramid, say."""


@dataclasses.dataclass(frozen=True)
class Demand:
    """How much the program wants a compile.

    Attributes:
        calls: how many calls the compiled code would have served so far.
        size: of what is compiled, in nodes of the graph.
        awaited: whether somebody waits for it.
        begins: called when a worker takes it.
        lost: called with the reason when that worker was lost, and another is to try again.
    """

    calls: Callable[[], int] = lambda: 0
    size: int = 1
    awaited: bool = False
    begins: Callable[[], None] = lambda: None
    lost: Callable[[str], None] = lambda reason: None


NO_CALLS = Demand()
"""For calls to a worker that no graph's calls count for."""


class Entry:
    """A call that waits.

    Attributes:
        call: pickled.
        limit: seconds that it may take.
        wanted: whether somebody still wants its result.
        second: returns the call of another attempt, told why the first was lost; None: the same call.
        future: gets the result.
    """

    def __init__(
        self,
        call: bytes,
        limit: float,
        wanted: Callable[[], bool],
        demand: Demand,
        second: Callable[[str], Callable[[], Any]] | None = None,
    ) -> None:
        self.call = call
        self.limit = limit
        self.wanted = wanted
        self.second = second
        self.future: Future[Any] = Future()
        self._demand = demand
        self._counted: int | None = None  # its calls when they were last counted
        self._cold = False

    @property
    def worth(self) -> tuple[bool, bool, int]:
        """The larger, the sooner its turn comes."""
        cold = self._cold and not self.new_calls
        return self._demand.awaited, not cold, self._demand.calls() * self._demand.size

    @property
    def new_calls(self) -> int:
        """Calls since they were last counted."""
        return self._demand.calls() - (self._counted or 0)

    def begins(self) -> None:
        """A worker takes it."""
        self._demand.begins()

    def lost(self, reason: str) -> None:
        """The worker was lost, for this reason; another is to try again."""
        self._demand.lost(reason)

    def count(self) -> None:
        """Count its calls; without new ones it is cold."""
        self._cold = self._counted is not None and not self.new_calls
        self._counted = self._demand.calls()


class Queue:
    """Calls that wait, for threads that take them one by one."""

    def __init__(self) -> None:
        self._waiting: list[Entry] = []
        self._taking = threading.Lock()

    def put(self, entry: Entry) -> None:
        """Let a call wait for its turn."""
        self._waiting.append(entry)

    def take(self) -> Entry | None:
        """The call whose turn it is, its future running; None where none waits."""
        with self._taking:
            self._drop_cancelled()
            if max((entry.new_calls for entry in self._waiting), default=0) >= TURNS:
                for entry in list(self._waiting):
                    entry.count()
            for entry in sorted(self._waiting, key=lambda entry: entry.worth, reverse=True):  # stable
                self._waiting.remove(entry)
                if entry.future.set_running_or_notify_cancel():
                    entry.begins()
                    return entry
            return None

    def cancel(self) -> None:
        """Cancel all calls that wait."""
        for entry in list(self._waiting):
            entry.future.cancel()

    def _drop_cancelled(self) -> None:
        for entry in list(self._waiting):
            if entry.future.cancelled():
                self._waiting.remove(entry)
                entry.future.set_running_or_notify_cancel()  # wakes who waits for it
