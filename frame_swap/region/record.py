"""The live record of one region: a captured graph, what serves it, and its compiles.

Guarantees:
- Once the callable that serves a region's calls is gone, what is still compiling for it is cancelled and STALE, and
  so is a region whose capture was interrupted. The record stays for the report, and holds nothing.
- In a forked child, what was compiling is FAILED, and stays on eager code.
- A warning that a filter turns into an error does not make a call raise.
"""

from __future__ import annotations

import os
import time
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import CodeType
from typing import Any

from ..errors import FrameSwapWarning, first_line
from .attempt import Attempt
from .journal import Journal
from .registry import changed, lock
from .report import Region, Summary
from .states import Event, Purpose, State, leading
from .under_way import capturing, name_of


class Record(Summary):
    """The attributes are those of `Region`, the row of the report that is made of this, live.

    Args:
        code: of the user's function; None where the graph was called outside of a frame.
        compile_id: Dynamo's.

    Attributes:
        size: of the graph, in nodes.
        journal: of its capture.
    """

    def __init__(self, code: CodeType | None, compile_id: str) -> None:
        self.frame = name_of(code) if code else "no frame"
        self.compile_id = compile_id
        self.eager = self.eager_reason = ""
        self.eager_calls = 0
        self.size = 0
        self.journal = Journal()
        self.attempts: list[Attempt] = [Attempt(self)]
        self._server: weakref.ref[Any] | None = None

    def __repr__(self) -> str:
        return f"<Record {self.compile_id} {self.frame}: {self.state}>"

    @property
    def compiles(self) -> tuple[Attempt, ...]:
        """Every compile, the oldest first."""
        return tuple(self.attempts)

    @property
    def state(self) -> State:
        """What serves the region's calls, or what will."""
        return leading(attempt.state for attempt in self.attempts)

    @property
    def reason(self) -> str:
        """Why, where that needs saying: of the latest compile that has come to an end."""
        undecided = (State.PENDING, State.READY, State.TRIAL, State.REPLACED)
        ended = [a for a in self.attempts if a.state not in undecided]
        lasting = [a for a in ended if a.state is not State.STALE] or ended
        if not lasting:
            return ""
        return lasting[-1].outcome if self.state is State.INSTALLED else lasting[-1].reason

    @property
    def ship_s(self) -> float | None:
        """Seconds spent packing the graph; None where it was not packed."""
        return self.journal.seconds("ship")

    @property
    def awaited(self) -> bool:
        """Whether a compile is queued, under way or being loaded, or its end has yet to be told."""
        return any(attempt.state is State.PENDING or attempt.untold for attempt in self.attempts)

    @property
    def server(self) -> Any | None:
        """What the frame calls while compiled code does not serve: a trampoline, or None once that is gone."""
        return self._server() if self._server is not None else None

    def served_by(self, server: object) -> None:
        """`server` serves the region's calls: when it goes, nobody waits for a compile."""
        self._server = weakref.ref(server)
        weakref.finalize(server, self.abandon).atexit = False

    def row(self) -> Region:
        """The region as it is now, as a frozen row of the report."""
        with lock:
            compiles = tuple(a.row() for a in self.attempts if a.state is not State.EAGER)
            return Region(
                self.frame,
                self.compile_id,
                self.state,
                self.reason,
                self.eager,
                self.eager_reason,
                self.eager_calls,
                self.ship_s,
                compiles,
            )

    def begin(self, attempt: Attempt) -> None:
        """Add a compile for the region, which is now awaited."""
        with lock:
            self.attempts.append(attempt)

    def reject(self, reason: str) -> None:
        """Compiled code is out of use, all that there is and will be; one warning says so."""
        with lock:
            in_use = (State.READY, State.TRIAL, State.INSTALLED)
            rejected = [a.move(Event.REJECTED, reason) for a in self.attempts if a.state in in_use]
            pending = [a for a in self.attempts if a.move(Event.ABANDONED, reason)]
        for attempt in pending:
            attempt.cancel_job()
        if any(rejected):
            self.warn(f"is back on its eager code, with the same results: {reason}")

    def abandon(self, reason: str = "the frame left Dynamo's cache") -> None:
        """Nobody will call what is being compiled."""
        for attempt in self.attempts:
            if attempt.move(Event.ABANDONED, reason):
                attempt.cancel_job()

    def warn(self, text: str) -> None:
        """Warn the user of something about this region."""
        with suppress(Warning):  # a filter may turn it into an error, which must not reach a call
            warnings.warn(
                f"frame-swap: {self.frame} {text} (frame_swap.report() has all of it)",
                FrameSwapWarning,
                stacklevel=3,
            )

    @contextmanager
    def captured(self, began: float | None = None) -> Iterator[None]:
        """The block captures the region, which is in the report from now on. Abandon it where the block raises.

        Args:
            began: when Dynamo began to trace its frame, in seconds since the epoch; None where it did not.
        """
        began = began or time.time()
        try:
            with lock:
                _records.append(self)
            yield
        except BaseException as error:
            self.abandon(f"its capture ended with {first_line(error)}")
            raise
        finally:
            self.journal.worked("capture", began)


_records: list[Record] = []


def records() -> list[Record]:
    """Every region of this process, the oldest first."""
    with lock:
        return list(_records)


def forget_all() -> None:
    """Empty the report; for tests."""
    with lock:
        _records.clear()


def wait_for_compiles(timeout: float | None = None) -> bool:
    """Block until no capture and no compile is awaited; False when `timeout` seconds passed first."""
    with lock:
        return changed.wait_for(lambda: not capturing() and not any(r.awaited for r in _records), timeout)


def is_quiet() -> bool:
    """Whether no frame is being captured, and each graph has got its compiled code, if not the best."""
    with lock:
        attempts = (attempt for record in _records for attempt in record.attempts)
        awaited = (a.state is State.PENDING and a.purpose is not Purpose.BETTER for a in attempts)
        return not capturing() and not any(awaited)


def _after_fork_in_child() -> None:
    for record in _records:
        for attempt in record.attempts:
            attempt.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
