"""One region: a captured graph, and what has happened to it.

Guarantees:
- A region is settled once: its state changes away from PENDING once, and from READY to TRIAL or a settled one,
  from TRIAL to a settled one, and from INSTALLED to REJECTED where compiled code raises.
- What the compile was for may go at any moment: a region that was not settled then is STALE, and so is one whose
  capture was interrupted. The region itself stays for the report, and holds nothing.
- In a forked child, what was compiling is FAILED, and stays on the pair.
- A failure is warned of once, and a filter that turns the warning into an error does not make a call raise.
"""

from __future__ import annotations

import enum
import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import CodeType
from typing import TYPE_CHECKING, Any

from .errors import FrameSwapWarning

if TYPE_CHECKING:
    from .serving.trampoline import Trampoline


class State(enum.StrEnum):
    """What has become of a region."""

    PENDING = "pending"  # on the pair; a compile is queued, under way or being loaded
    READY = "ready"  # on the pair; compiled code is loaded and waits to be installed
    TRIAL = "trial"  # compiled code is being verified against the pair, or timed
    INSTALLED = "installed"  # on compiled code
    FAILED = "failed"  # on the pair, for good: the compile or the load failed
    REJECTED = "rejected"  # on the pair, for good: the compiled code does not fit, or has failed
    STALE = "stale"  # the frame was gone before compiled code came
    FOREGROUND = "foreground"  # could not be shipped: stock Inductor, compiled in the caller
    EAGER = "eager"  # on the pair, for good: when="never"


class Region:
    """The record of one captured graph: a row of the report.

    Attributes:
        frame: qualified name, file and line of the user's function.
        compile_id: Dynamo's, as in its logs: "frame/recompile".
        state, reason: what has become of it, and why where that needs saying.
        pair_calls: calls that the eager pair has served.
        ship_s, queue_s, compile_s, load_s, install_s: seconds spent packing the graph (in the call), waiting
            for a worker, compiling (in the worker), loading (on the loader thread), and installing (in a call).
            None until known.
        artifact_bytes: size of what the worker sent back.
        late_guards: conditions on shapes that compiles added, checked before compiled code is called; those of
            one artifact in a row.
        artifacts: how many are in place: more than one where a late guard made calls miss the first.
        specialising: whether a compile for such calls is queued, under way or being loaded.
        verified: how many calls were compared with the pair's and found equal, for `verify`.
        profit: what a call took on both sides, where `profit` had it measured; "" where not.
        wrappers: what of AOTAutograd's is still called around compiled code; most graphs need none of it.
        worker_pid: the process that compiled it.
        installed_at: seconds since the epoch, when its install ended.
        compile_span: seconds since the epoch, when its compile began and ended.
    """

    def __init__(self, code: CodeType | None, compile_id: str) -> None:
        self.frame = f"{code.co_qualname}, {code.co_filename}:{code.co_firstlineno}" if code else "no frame"
        self.compile_id = compile_id
        self.state = State.PENDING
        self.reason = ""
        self.pair_calls = 0
        self.ship_s: float | None = None
        self.queue_s: float | None = None
        self.compile_s: float | None = None
        self.load_s: float | None = None
        self.install_s: float | None = None
        self.artifact_bytes: int | None = None
        self.late_guards: tuple[str, ...] = ()
        self.artifacts = 0
        self.specialising = False
        self.wrappers: tuple[str, ...] = ()
        self.verified = 0
        self.profit = ""
        self.worker_pid: int | None = None
        self.compile_span: tuple[float, float] | None = None
        self.installed_at: float | None = None
        self.cancel: Callable[[], None] = _nothing
        self._trampoline: weakref.ref[Trampoline] | None = None

    def __repr__(self) -> str:
        return f"<Region {self.compile_id} {self.frame}: {self.state}>"

    @property
    def awaited(self) -> bool:
        """Whether a compile is queued, under way or being loaded."""
        return self.state is State.PENDING or self.specialising

    @property
    def trampoline(self) -> Trampoline | None:
        """What the frame calls, or names for where compiled code raises."""
        return self._trampoline() if self._trampoline is not None else None

    def belongs_to(self, trampoline: Trampoline) -> None:
        """`trampoline` serves its calls: when that goes, nobody waits for a compile."""
        self._trampoline = weakref.ref(trampoline)
        weakref.finalize(trampoline, self.abandon).atexit = False

    def settle(self, state: State, reason: str = "", *, unless: tuple[State, ...] = ()) -> bool:
        """Move to `state`; False where the region is already in one of `unless`, and nothing changes."""
        with _lock:
            if self.state in unless:
                return False
            self.state, self.reason = state, reason
            _changed.notify_all()
            return True

    def begin_specialising(self) -> None:
        """A compile for calls that no artifact fits is on its way."""
        with _lock:
            self.specialising = True

    def end_specialising(self, remark: str = "") -> None:
        """It has come, or will not come; `remark` says why."""
        with _lock:
            self.specialising = False
            self.reason = remark or self.reason
            _changed.notify_all()

    def fail(self, reason: str, state: State = State.FAILED) -> None:
        """The compiled code will not come: the pair stays, one warning says so."""
        calls = ""
        if self.specialising:
            calls = " for calls that its late guards turn away"
            self.end_specialising(f"it stays on the pair{calls}: {reason}")
        elif not self.settle(state, reason, unless=SETTLED):
            return
        self._warn(f"stays on its eager pair{calls}: {reason}")

    def reject(self, reason: str) -> None:
        """What was installed, or was about to be, is out of use: the pair is back, one warning says so."""
        with _lock:
            if self.state in (State.REJECTED, State.STALE):
                return
            self.state, self.reason, self.artifacts = State.REJECTED, reason, 0
            self.end_specialising()
        self.cancel_job()
        self._warn(f"is back on its eager pair: {reason}")

    def _warn(self, what: str) -> None:
        with suppress(Warning):  # a filter may turn it into an error, which must not reach anything
            warnings.warn(
                f"frame-swap: {self.frame} {what} (frame_swap.report() has all of it)",
                FrameSwapWarning,
                stacklevel=3,
            )

    def abandon(self, reason: str = "the frame left Dynamo's cache") -> None:
        """Nobody will call what is being compiled."""
        if self.specialising or self.settle(State.STALE, reason, unless=SETTLED):
            self.end_specialising()
            self.cancel_job()

    def cancel_job(self) -> None:
        """Drop the compile that is queued or under way, and what it holds."""
        cancel, self.cancel = self.cancel, _nothing
        cancel()

    @contextmanager
    def captured(self) -> Iterator[None]:
        """The block captures the frame, a row of the report from now on; nobody awaits it where the block fails."""
        try:
            with _lock:
                _regions.append(self)
            yield
        except BaseException as error:
            self.abandon(f"its capture ended with {type(error).__name__}")
            raise

    def record_compile(self, submitted: float, started: float, finished: float, pid: int) -> None:
        """When the compile was asked for, began and ended (seconds since the epoch), and where."""
        self.queue_s, self.compile_s = max(0.0, started - submitted), finished - started
        self.compile_span, self.worker_pid = (started, finished), pid or None
        self.cancel = _nothing  # there is nothing to cancel any more; the job, with the artifact, may go

    def note(self, findings: Mapping[str, Any]) -> None:
        """Set attributes, by name."""
        for name, value in findings.items():
            setattr(self, name, value)

    @contextmanager
    def timed(self, column: str) -> Iterator[None]:
        """Record the seconds that the block takes."""
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, column, time.perf_counter() - start)


def _nothing() -> None:
    """What cancels no job."""


SETTLED = tuple(state for state in State if state not in (State.PENDING, State.READY, State.TRIAL))

_NOT_PENDING = tuple(state for state in State if state is not State.PENDING)

_regions: list[Region] = []
_lock = threading.RLock()  # taken itself, not through the condition, which an interrupt can leave locked
_changed = threading.Condition(_lock)


def regions() -> list[Region]:
    """Every region of this process, oldest first."""
    with _lock:
        return list(_regions)


def after_fork_in_child() -> None:
    """The compiles that were under way are the parent's; what they were for stays on the pair here."""
    global _lock, _changed
    _lock = threading.RLock()
    _changed = threading.Condition(_lock)
    for region in _regions:
        region.settle(State.FAILED, "the process was forked while this was compiling", unless=_NOT_PENDING)
        region.specialising = False
        region.cancel = _nothing  # the job's locks may be held by threads that are not here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=after_fork_in_child)


def wait_until_settled(timeout: float | None = None) -> bool:
    """Block until no compile is awaited; False when `timeout` seconds passed first."""
    with _lock:
        return _changed.wait_for(lambda: not any(r.awaited for r in _regions), timeout)
