"""The thread that captures, one frame at a time.

Guarantees:
- A capture begins when the call that asked for it is over, or `CALL_PATIENCE` seconds later.
- `submit` waits for no capture. It takes `LONGEST_QUEUE` frames at most. It holds their arguments until it
  has captured them.
- A fork, a capture in a call and the exit of the program stop the capture that is under way, at its next look at
  the program's state: it takes one for each operator, value and guard, but none while it builds guards and packs
  the graph. It is done again when a later call asks.
- In a forked child nothing is under way. If the parent's capture could not be stopped in time, Dynamo's compile
  lock is made anew there: the thread that holds it does not exist.

Assumed: appending to a list or a deque, and taking from it, are one step, as they are under the GIL.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NamedTuple

import torch

from ..internals import dynamo
from ..region import under_way
from ..runtime import locks, machine, openmp
from .captures import Capture, Outcome

log = logging.getLogger(__name__)

LONGEST_QUEUE = 16

CALL_PATIENCE = 1.0
"""A trace beside the very call that asked for it slows that call and races with it. One that takes longer than this
may take for ever."""

SHORTEST_PAUSE, LONGEST_PAUSE = 0.001, 0.02
"""Seconds between two looks whether that call is over."""

EXIT_PATIENCE = 5.0
"""How many seconds the end of the program waits for the capture that it has stopped."""

Done = Callable[[Capture, Outcome], None]


class _Job(NamedTuple):
    """A capture, who asked for it, and who hears of its end.

    Attributes:
        caller: the identity of the thread that asked.
        threads: how many threads the ops of that thread use.
        asked_again: whether a later call of the frame has come by.
    """

    capture: Capture
    done: Done
    caller: int
    threads: int
    asked_again: Callable[[], bool]


class CaptureThread:
    """Runs captures. The first starts the thread."""

    def __init__(self) -> None:
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._jobs: deque[_Job] = deque()
        self._current: _Job | None = None
        self._holds: list[object] = []
        self._wake = threading.Semaphore(0)
        self._starting = threading.Lock()
        self._ends = False
        self._thread: threading.Thread | None = None

    # On any thread

    def submit(self, capture: Capture, done: Done, asked_again: Callable[[], bool]) -> bool:
        """Run `capture` on the thread, and give its outcome to `done`. False if too many wait already."""
        if len(self._jobs) >= LONGEST_QUEUE or self._ends:
            return False
        locks.call_holding(self._starting, self._start, wait=True)
        job = _Job(capture, done, threading.get_ident(), torch.get_num_threads(), asked_again)
        try:
            under_way.capture_begins(capture.name)
            self._jobs.append(job)
        except BaseException:  # an interrupt
            if job not in self._jobs:
                under_way.capture_ends(capture.name)
            raise
        self._wake.release()
        return True

    def _start(self) -> None:
        if self._thread is None:
            thread = threading.Thread(target=self._run, daemon=True, name="frame-swap-capture")
            thread.start()
            self._thread = thread

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within the block no capture begins, and the one under way stops."""
        who = object()
        try:
            self.hold(who)
            yield
        finally:
            self.let_go(who)

    def hold(self, who: object = None) -> None:
        """Begin no capture, and stop the one under way, until `who` lets go. Does not wait for that."""
        self._holds.append(who)
        if (job := self._current) is not None:  # `_run` looks at the holds after it has set this
            job.capture.stopped = True

    def let_go(self, who: object = None) -> None:
        """End what `hold` began for `who`."""
        with contextlib.suppress(ValueError):  # a child that was forked within has none
            self._holds.remove(who)
        self._wake.release()

    def stop(self) -> None:
        """The program ends: stop for good, and wait for the thread."""
        self._ends = True
        self.hold()
        self._wake.release()
        if self._thread is not None:
            self._thread.join(EXIT_PATIENCE)
        while self._jobs and self._jobs[0] is not self._current:  # it would wait for one that has not stopped
            self._finish(self._jobs[0], Outcome.STOPPED)

    def forked(self) -> None:
        """This is a forked child, without the thread."""
        jobs = [job for job in (self._current, *self._jobs) if job is not None]
        if self._current is not None:
            dynamo.renew_compile_lock()
        self._begin_anew()
        for job in jobs:
            job.done(job.capture, Outcome.STOPPED)

    # On the thread

    def _run(self) -> None:
        while not self._ends:
            self._wake.acquire()
            while self._jobs and not self._holds:
                self._current = self._jobs[0]
                if not self._holds:
                    self._finish(self._current, self._outcome(self._current))
                self._current = None

    def _outcome(self, job: _Job) -> Outcome:
        try:
            self._wait_for_call(job)
            if torch.get_num_threads() != job.threads:  # guards compare it
                if (library := openmp.library()) is not None:
                    library.omp_set_num_threads(job.threads)
                if torch.get_num_threads() != job.threads:
                    return Outcome.IMPOSSIBLE
            sleepers = openmp.Sleepers(1)  # as beside a worker
            try:
                return machine.run_courteously(job.capture.run)
            finally:
                sleepers.end()
        except BaseException:
            log.exception("frame-swap: a mistake in frame-swap; the program is not affected")
            return Outcome.IMPOSSIBLE

    def _finish(self, job: _Job, outcome: Outcome) -> None:
        self._jobs.popleft()
        job.done(job.capture, outcome)
        under_way.capture_ends(job.capture.name)

    def _wait_for_call(self, job: _Job) -> None:
        """Return when the call that asked is over, but not before long."""
        end, pause = time.monotonic() + CALL_PATIENCE, SHORTEST_PAUSE
        while time.monotonic() < end and not job.capture.stopped and not job.asked_again():
            if not _is_running(job):
                return
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)


def _is_running(job: _Job) -> bool:
    """Whether the thread that asked runs the frame's code."""
    frame: FrameType | None = sys._current_frames().get(job.caller)
    while frame is not None:
        if frame.f_code is job.capture.code:
            return True
        frame = frame.f_back
    return False


thread = CaptureThread()

if hasattr(os, "register_at_fork"):  # after the hooks of runtime.forks: this `before` runs first
    os.register_at_fork(before=thread.hold, after_in_parent=thread.let_go, after_in_child=thread.forked)
atexit.register(thread.stop)
