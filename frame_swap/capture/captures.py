"""One capture beside the program, and all captures of one frame: under way, waiting for a call, or gone stale.

Guarantees:
- At most one capture of a frame is under way. Each result is handed to one call, or dropped.
- A result is handed over only if all that its trace has read, and then its guards, hold of the state that the
  calling thread sees; and what was read was still so when the guards were built. This is so for skips, too.
- A frame whose captures come to nothing is captured in a call, as without all this: after `PATIENCE` captures in a
  row that have gone stale, or in which Dynamo raised; and when more results wait than Dynamo compiles for a frame.
- `torch._dynamo.reset()` ends all of it: Dynamo makes a new `frame_state` then, and these are kept with that.

Assumed: a dictionary's `setdefault` and `pop` and a list's `remove` of an element that compares by identity are one
step, as they are under the GIL.
"""

from __future__ import annotations

import enum
import logging
from types import CodeType
from typing import Any

from ..internals import beside, dynamo
from ..internals import callback as dynamos
from ..internals.beside import GivenUp
from ..internals.read_log import ReadLog
from ..region.under_way import name_of

log = logging.getLogger(__name__)

PATIENCE = 3
"""How many captures in a row may come to nothing before a call captures the frame."""


class Outcome(enum.Enum):
    """How a capture has ended."""

    WAITS = enum.auto()  # for a call that it fits
    STALE = enum.auto()  # the program has changed what the trace read, or Dynamo has raised
    IMPOSSIBLE = enum.auto()  # only calls can do it
    STOPPED = enum.auto()  # a fork or another capture came first, or the program ends


class Capture:
    """One capture. It holds the frame's arguments until it has ended.

    Args:
        callback: Dynamo's, for one `torch.compile`.
        frame: what Dynamo asked the callback about; copied.
        frame_state: Dynamo's, for the code of the frame.

    Attributes:
        name: of the user's function, for the report.
        code: of the frame.
        limit: how many times Dynamo compiles the frame at most.
        stopped: set to end the capture early.
        result: what Dynamo has answered.
        notes: what the trace has read.
    """

    def __init__(self, callback: Any, frame: Any, frame_state: dict[Any, Any]) -> None:
        self.name = name_of(dynamos.users_code(frame))
        self.code: CodeType = frame.f_code
        self.limit = dynamo.recompile_limit()
        self.stopped = False
        self.result: Any = None
        self._callback = callback
        self._frame: Any = dynamos.copied(frame)
        self._frame_state = frame_state
        self._state = beside.CallersState()
        self._check_process = beside.process_checkpoint()
        self.notes = ReadLog(self._frame.f_locals, self._frame.f_globals, self._checkpoint)

    def run(self) -> Outcome:
        """Let Dynamo capture the frame, on the calling thread."""
        try:
            self.result = beside.trace(self._callback, self._frame, self._frame_state, self._state, self.notes)
            return Outcome.WAITS
        except GivenUp as error:
            log.info("frame-swap: the capture of %s ended early: %s", self.name, error)
            if self.stopped:
                return Outcome.STOPPED
            return Outcome.IMPOSSIBLE if error.lasting else Outcome.STALE
        except Exception:  # perhaps a race: guards, for example, that do not hold where they were built
            log.info("frame-swap: the capture of %s failed", self.name, exc_info=True)
            return Outcome.STALE
        finally:
            del self._callback, self._frame, self._frame_state, self._state

    def _checkpoint(self) -> None:
        if self.stopped:
            raise GivenUp("it was stopped")
        self._check_process()

    def fits(self, frame: Any) -> bool:
        """Whether the guards of the result hold of a call."""
        guarded = self.result.guarded_code
        return guarded is None or bool(guarded.guard_manager.check(frame.f_locals))

    def differs(self, frame: Any) -> str | None:
        """What the trace has read and is not so now, though the guards hold; None if there is nothing."""
        if (differs := self.notes.differs(frame.f_locals, frame.f_globals)) is not None:
            return differs
        return None if self.fits(frame) else "a guard"


class Captures:
    """All captures of one frame for one `torch.compile`.

    Attributes:
        calls: how many calls have asked.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._in_a_call = self._always_in_a_call = ""
        self._under_way: dict[str, Capture] = {}
        self._waiting: list[Capture] = []
        self._stale = 0

    @property
    def in_a_call(self) -> str:
        """Why the next call has to capture the frame; "" if it need not."""
        return self._always_in_a_call or self._in_a_call

    @property
    def is_under_way(self) -> bool:
        """Whether a capture is under way."""
        return bool(self._under_way)

    def begin(self, capture: Capture) -> bool:
        """Whether `capture` is the one that is under way from now on."""
        return self._under_way.setdefault("it", capture) is capture

    def forget(self, capture: Capture) -> None:
        """`capture` is not under way, after all."""
        if self._under_way.get("it") is capture:
            self._under_way.pop("it", None)

    def end(self, capture: Capture, outcome: Outcome) -> None:
        """The capture is over."""
        if outcome is Outcome.WAITS:
            self._waiting.append(capture)
            if len(self._waiting) > capture.limit:
                del self._waiting[0]
                self._in_a_call = "no calls come that fit what was captured"
        elif outcome is Outcome.STALE:
            self._count_stale()
        elif outcome is Outcome.IMPOSSIBLE:
            self._always_in_a_call = "it cannot be captured beside the program"
        self.forget(capture)

    def take(self, frame: Any) -> Any:
        """What was captured for a call; None if nothing fits it."""
        for capture in list(self._waiting):
            if not capture.fits(frame):
                continue
            try:
                self._waiting.remove(capture)
            except ValueError:  # another thread's call has it
                continue
            if (differs := capture.differs(frame)) is None:
                self._stale = 0
                return capture.result
            log.info("frame-swap: the capture of %s is stale: %s", capture.name, differs)
            self._count_stale()
        return None

    def captured_in_a_call(self) -> None:
        """A call has captured the frame: the next may be captured beside the program again."""
        self._in_a_call, self._stale = "", 0

    def _count_stale(self) -> None:
        self._stale += 1
        if self._stale >= PATIENCE:
            self._in_a_call = f"{self._stale} captures in a row have come to nothing"


_KEY = "frame-swap"


def captures_of(callback: Any, frame_state: dict[Any, Any]) -> Captures:
    """The captures of the frame whose `frame_state` this is, for `callback` and others that share cache entries."""
    kin = dynamos.kin(callback)
    known: list[tuple[Any, Captures]] = frame_state.setdefault(_KEY, [])
    if all(other != kin for other, _ in known):
        known.append((kin, Captures()))
        del known[: -dynamo.recompile_limit()]  # backends that never are equal
    return next((captures for other, captures in known if other == kin), known[-1][1])
