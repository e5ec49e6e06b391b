"""One compile for a region, from the request to installed code, and what it cost.

Guarantees:
- The state changes only by the table in states.py. `move` is atomic, and wakes those who wait for compiles.
- A failure is warned of once. A filter that turns the warning into an error does not make a call raise.
- What has happened is told, and warned of, before those who wait for it wake up.
- When an attempt is abandoned, its job is cancelled, and nothing here keeps the job alive.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..internals.cuda_graphs import Recording
from ..internals.phases import Phase
from .journal import Journal, News, tell
from .registry import changed, lock
from .report import Compile
from .states import Event, IllegalTransition, Purpose, State, following

if TYPE_CHECKING:
    from .record import Record

log = logging.getLogger(__name__)

STRICT = "FRAME_SWAP_STRICT"
"""Variable that makes an illegal transition raise, in tests; otherwise it is logged, and the state stays."""


_INSTEAD = {
    Purpose.FIRST: "stays on its eager code, with the same results",
    Purpose.SIZES: "stays on its eager code for calls that its late guards turn away",
    Purpose.BETTER: "keeps the compiled code that it has",
}


class Attempt:
    """One compile for a region. The attributes are those of `Compile`, live.

    Args:
        record: the region.
        purpose: what it is for.

    Attributes:
        begun_at: when a worker began with it, in seconds since the epoch; None before, and in a user's executor.
        phases: of the compile in the worker.
        journal: of what was done for it in this process.
        recording: of its CUDA graphs, if it has any.
        untold: whether its state has changed, and a thread is about to say so.
    """

    def __init__(self, record: Record, purpose: Purpose = Purpose.FIRST) -> None:
        self._record = record
        self.purpose = purpose
        self.state = State.PENDING
        self.reason = ""
        self.queue_s: float | None = None
        self.compile_s: float | None = None
        self.artifact_bytes: int | None = None
        self.late_guards: tuple[str, ...] = ()
        self.wrappers: tuple[str, ...] = ()
        self.artifact = self.artifact_reason = ""
        self.verified = 0
        self.profit = ""
        self.store = ""
        self.autotuned = False
        self.worker_pid: int | None = None
        self.compile_span: tuple[float, float] | None = None
        self.installed_at: float | None = None
        self.begun_at: float | None = None
        self.phases: tuple[Phase, ...] = ()
        self.journal = Journal()
        self.recording: Recording | None = None
        self.untold = False
        self._cancel: Callable[[], None] | None = None

    def __repr__(self) -> str:
        return f"<Attempt {self.purpose} of {self._record.compile_id} {self._record.frame}: {self.state}>"

    @property
    def load_s(self) -> float | None:
        """Seconds spent loading; None until it is over."""
        return self.journal.seconds("load")

    @property
    def install_s(self) -> float | None:
        """Seconds spent installing; None until it is over."""
        return self.journal.seconds("install")

    @property
    def cuda_graphs(self) -> str:
        """Whether its CUDA graphs are recorded, and what that took; "" where it has none."""
        return str(self.recording or "")

    @property
    def tier(self) -> str:
        """In a word, which of the region's compiles it is."""
        return "autotuned" if self.autotuned else "sizes" if self.purpose is Purpose.SIZES else "default"

    @property
    def outcome(self) -> str:
        """The reason, in words that fit the region where other code is installed."""
        if self.reason and self.purpose is not Purpose.FIRST and self.state in (State.FAILED, State.REJECTED):
            return f"it {_INSTEAD[self.purpose]}: {self.reason}"
        return self.reason

    def row(self) -> Compile:
        """The attempt as it is now, as a frozen row of the report."""
        with lock:
            return Compile(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Compile)})

    def move(self, event: Event, reason: str = "", warning: str = "") -> bool:
        """`event` has happened; False where it changes nothing.

        Args:
            warning: what the user is warned of, if anything.

        Raises:
            IllegalTransition: the table does not allow it, and FRAME_SWAP_STRICT is set.
        """
        with lock:
            try:
                new = following(self.state, event)
            except IllegalTransition:
                if os.environ.get(STRICT):
                    raise
                log.error("frame-swap: a mistake in frame-swap; the program is not affected", exc_info=True)
                return False
            if new is self.state and event is not Event.INSTALLED:
                return False
            self.state, self.reason = new, reason
            self.untold = True
        try:
            self._tell(event, reason)
            if warning:
                self._record.warn(warning)
        finally:
            with lock:
                self.untold = False
                changed.notify_all()
        return True

    def tell(self, what: str, seconds: float | None = None, size: str = "", reason: str = "") -> None:
        """Tell those who listen; the arguments are as for `News`."""
        record = self._record
        tell(News(what, record.compile_id, record.frame, self.tier, seconds, size, reason))

    def _tell(self, event: Event, reason: str) -> None:
        self.journal.note(event.name.lower(), reason)
        seconds = {Event.LOADED: self.load_s, Event.INSTALLED: self.install_s, Event.FOREGROUND: self.compile_s}
        if event is not Event.FORKED:  # each child of the program would tell the same
            self.tell(event.name.lower(), seconds.get(event), reason=reason)

    def fail(self, event: Event, reason: str, *, warn: bool = True) -> None:
        """Its code will not come, or is not to be used (`event`: FAILED or REJECTED): one warning says why."""
        if self.move(event, reason, f"{_INSTEAD[self.purpose]}: {reason}" if warn else ""):
            self.cancel_job()

    def began(self, cancel: Callable[[], None]) -> None:
        """A job was submitted, which `cancel` cancels."""
        self._cancel = cancel
        if self.state is not State.PENDING or self.compile_s is not None:  # the frame went, or the outcome came
            self.cancel_job()

    def begins(self) -> None:
        """A worker begins with it."""
        self.begun_at = time.time()
        self.tell("compiling")

    def tried_again(self, reason: str) -> None:
        """Its worker was lost, for this reason; another begins anew."""
        self.journal.note("tried again", reason)
        self.tell("tried again", reason=reason)

    def cancel_job(self) -> None:
        """Drop the job, if one is queued or under way, and what it holds."""
        cancel, self._cancel = self._cancel, None
        if cancel is not None:
            cancel()

    def compiled(
        self, submitted: float, started: float, finished: float, pid: int, phases: tuple[Phase, ...] = ()
    ) -> None:
        """The compile was asked for, began and ended at these times (seconds since the epoch), in process `pid`."""
        self.queue_s, self.compile_s = max(0.0, started - submitted), finished - started
        self.compile_span, self.worker_pid, self.phases = (started, finished), pid or None, phases
        self._cancel = None  # nothing is left to cancel, and the job holds the artifact

    def begin_again(self, reason: str) -> None:
        """Forget an outcome that cannot be used, for this reason: a new compile begins."""
        self.journal.note("compiled again", reason)
        self.queue_s = self.compile_s = self.artifact_bytes = self.compile_span = self.begun_at = None
        self.store = ""

    def forked(self) -> None:
        """This is a forked child: what was under way is the parent's."""
        self._cancel = None  # the job's locks may be held by threads that do not exist here
        self.untold = False  # nor does the thread that was about to
        self.move(Event.FORKED, "the process was forked while this was compiling")
