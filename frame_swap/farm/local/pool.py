"""A pool of worker processes, and for each a thread here that hands it one call at a time.

Guarantees:
- `submit` neither waits for a call nor raises because of one. Each future ends: with what the call returned or
  raised; with `Lost`, which says why, where its process was lost; or cancelled, while it had not begun.
- A thread that is free takes the call that gains most; see queue.py.
- A process that is lost concerns the call that it ran, and no other. That call is tried again once, or another in
  its place, in a fresh process; not where it went beyond a limit, where nobody wants it any more, or while the pool
  is being killed.
- A lost process is replaced when there is something to do. One that has nothing to do for `idle_timeout` ends. One
  that holds memory of a GPU ends after `GPU_IDLE`, and a fresh one, which holds none, is started in its place.
- `kill` ends all processes and waits for no call; `retire` lets what was submitted end first.
- A forked child has none of its parent's processes, and touches none.

Assumed: `changing` guards the lists of all pools.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import pickle
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ...errors import first_line
from ...runtime import machine
from ..queue import NO_CALLS, Demand, Entry, Queue
from .process import Lost, Process, Terms, changing, forget_all

if TYPE_CHECKING:
    from ...runtime.openmp import Sleepers

log = logging.getLogger(__name__)

GPU_IDLE = 20.0
"""Seconds after which a process with nothing to do ends if it holds memory of a GPU. A fresh one replaces it."""


class Busy:
    """How many calls run in worker processes, or load what these have made. Each takes a CPU.

    While any does, threads of ops sleep where they wait; see openmp.py. Its lock is for threads of ours alone.

    Attributes:
        count: the calls.
        sleepers: what makes those threads sleep, while `count` is not 0.
    """

    def __init__(self) -> None:
        self.count = 0
        self.sleepers: Sleepers | None = None
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def one_more(self, workers: int) -> Iterator[None]:
        """Within the block, one call more runs; in one of so many workers, or on one thread."""
        from ...runtime import openmp  # it imports torch, which the program has done by now

        with self._lock:
            self.count += 1
            if self.sleepers is None:
                self.sleepers = openmp.Sleepers(workers)
        try:
            yield
        finally:
            with self._lock:
                self.count -= 1
                if not self.count:
                    self.sleepers.end()
                    self.sleepers = None

    def forget(self) -> None:
        """In a forked child: no call runs, and the sleepers are the parent's."""
        self.__init__()  # type: ignore[misc]


busy = Busy()


class Pool:
    """Processes on the same terms, and the calls that wait for them."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        # A process inherits the signals that the starting thread blocks. Ctrl-C is for the program alone.
        block = (signal.SIG_BLOCK, [signal.SIGINT])
        self._threads = ThreadPoolExecutor(terms.size, "frame-swap-worker", signal.pthread_sigmask, block)
        self._queue = Queue()
        self._starts: list[Future[None]] = []
        self._heir: Pool | None = None
        self._processes: set[Process] = set()
        self._free: dict[Process, threading.Timer] = {}  # and the timers that will end them
        self._killed = False
        _all.add(self)

    def start(self) -> None:
        """Begin to start the first process; do not wait.

        Raises:
            RuntimeError: as for `submit`.
        """
        # The program's first calls run beside this.
        start = functools.partial(machine.run_courteously, self._start_one)
        self._starts.append(self._threads.submit(start))

    def submit(
        self,
        call: Callable[[], Any],
        limit: float = math.inf,
        wanted: Callable[[], bool] = lambda: True,
        demand: Demand = NO_CALLS,
        second: Callable[[str], Callable[[], Any]] | None = None,
    ) -> Future[Any]:
        """Run `call` in a process of the pool; `call` and its result must pickle.

        Args:
            limit: seconds that it may take; where its process has yet to start, that included.
            wanted: asked before it is tried again.
            demand: decides when its turn comes.
            second: returns the call of a second attempt, told why the first was lost; None: the same call.

        Raises:
            RuntimeError: the pool is retired or killed, or there is no thread.
        """
        entry = Entry(pickle.dumps(call), limit, wanted, demand, second)
        self._queue.put(entry)
        try:
            self._threads.submit(self._run_next)
        except BaseException:
            entry.future.cancel()
            raise
        return entry.future

    def pids(self) -> list[int]:
        """PIDs of live workers, including those still starting."""
        futures.wait(self._starts)
        return [process.pid for process in list(self._processes) if process.alive]

    def end_idle(self) -> None:
        """End the processes that have nothing to do; the next call starts one."""
        for start in self._starts:
            start.cancel()
        with changing:
            for process in list(self._free):
                self._end(process)

    def retire(self, heir: Pool | None = None) -> None:
        """End as soon as all submitted calls have ended.

        Args:
            heir: gets the processes that have nothing to do, where it would start the like.
        """
        self._threads.shutdown(wait=False)
        with changing:
            if heir is not None and heir.terms[2:] == self.terms[2:]:  # what a process is started with
                self._heir = heir
                for process in list(self._free)[: heir.terms.size]:
                    self._free.pop(process).cancel()
                    self._processes.discard(process)
                    heir.adopt(process)
            self.terms = self.terms._replace(idle_timeout=min(self.terms.idle_timeout, 1))
            for process in list(self._free):
                self._end(process)

    def adopt(self, process: Process) -> None:
        """Take over a process that has nothing to do."""
        self._processes.add(process)
        self._give_back(process)

    def kill(self) -> None:
        """End all processes now."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._queue.cancel()
        with changing:
            self._killed = True
            for process in list(self._processes):
                self._end(process)

    def _run_next(self) -> None:
        entry = self._queue.take()
        if entry is None:  # its call was cancelled, or another thread has run it
            return
        with busy.one_more(self.terms.size):  # what the result sets off begins within: it takes a CPU, too
            try:
                result = self._run(entry)
            except BaseException as error:
                entry.future.set_exception(error)
                del entry  # a cycle: the error's traceback holds this frame
            else:
                entry.future.set_result(result)

    def _run(self, entry: Entry) -> Any:
        try:
            return self._run_once(entry.call, entry.limit)
        except Lost as lost:
            if not lost.again or not entry.wanted() or self._killed:
                del entry  # as in `_run_next`
                raise
            reason = str(lost)  # a log record with the error in it would hold the process
            log.info("frame-swap: a call is tried again: %s\n%s", reason, lost.details)
            entry.lost(reason)
            call = entry.call if entry.second is None else pickle.dumps(entry.second(reason))
        limit = entry.limit
        del entry
        try:
            return self._run_once(call, limit)
        except Lost as lost:
            raise Lost(f"{lost} (tried twice)", lost.details) from None

    def _run_once(self, call: bytes, limit: float) -> Any:
        try:
            process = self._take()
        except Exception as error:
            raise Lost(f"no worker could be started: {first_line(error)}") from error
        try:
            return process.run(call, limit)
        finally:
            self._give_back(process)

    def _start_one(self) -> None:
        with changing:
            if self._heir is not None:
                return self._heir._start_one()
            if not self._processes:
                with contextlib.suppress(Exception):  # the first call reports it
                    self._give_back(self._take_fresh())

    def _take(self) -> Process:
        with changing:
            while self._free:
                process, alarm = self._free.popitem()
                alarm.cancel()
                if process.usable:
                    return process
                self._end(process)
            return self._take_fresh()

    def _take_fresh(self) -> Process:
        if self._killed:
            raise RuntimeError("the interpreter is shutting down")
        process = Process(self.terms)
        self._processes.add(process)
        return process

    def _give_back(self, process: Process) -> None:
        with changing:
            if process.ended or self._killed:
                return self._end(process)
            idle = min(self.terms.idle_timeout, threading.TIMEOUT_MAX)
            if process.holds_gpu:
                idle = min(idle, GPU_IDLE)
            # Its thread outlives a cancel by a moment, and must not keep the process and its pipes.
            alarm = self._free[process] = threading.Timer(idle, self._end_free, [weakref.ref(process)])
            alarm.daemon = True
            with contextlib.suppress(RuntimeError):  # out of threads: the process stays
                alarm.start()

    def _end_free(self, reference: weakref.ref[Process]) -> None:
        with changing:
            process = reference()
            if process is not None and process in self._free:
                self._end(process)
                if process.holds_gpu and self.terms.idle_timeout > GPU_IDLE:
                    self._start_one()  # that one holds none

    def _end(self, process: Process) -> None:
        self._processes.discard(process)
        if alarm := self._free.pop(process, None):
            alarm.cancel()
        process.end()


_all: weakref.WeakSet[Pool] = weakref.WeakSet()
_parents: list[Pool] = []
"""In a forked child: the parent's pools, kept because a freed executor wakes its thread, which is the parent's."""


def kill_all() -> None:
    """End the processes of all pools, retired ones included."""
    for pool in list(_all):
        pool.kill()


def _forget() -> None:
    _parents.extend(_all)
    _all.clear()
    busy.forget()
    forget_all()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
