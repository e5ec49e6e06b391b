"""The workers, and the thread that loads what they send back.

Guarantees:
- `submit` does not wait for a compile and does not raise: what goes wrong reaches `deliver`, or who waits, as
  an `Outcome` with `error` set.
- `deliver` is called at most once per job, always on the loader thread, one at a time. It is not called for a
  job that was cancelled in time, nor while the interpreter exits.
- `Job.cancel` never waits. A compile that has begun runs on in its worker; its outcome is dropped.
- At exit nothing is waited for: workers are killed together with their compilers.
- A forked child starts with no workers and no jobs of its parent's; it gets workers of its own when it needs
  them. The parent's are not touched. A fork waits while another thread starts workers.
- `Job.cancel` may be called anywhere, from a finalizer too: it takes no lock that the interrupted thread could hold
  and not take again.

Assumed: one lock guards the pool and the loader; neither is used while it is held, except to create them.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import loky

from .. import forks, settings
from . import artifact, worker
from .refusal import first_line
from .worker import Outcome

log = logging.getLogger(__name__)

NICENESS = 2
"""How far workers and their compilers stand back behind the program. Where they have a core of their own it does
not matter. Where they have none, more would starve them: at 10, a program that keeps two cores busy waits for
its swap for minutes; at 0, its steps take twice as long as at 2 and the swap comes no sooner."""

IDLE_SECONDS = 300
"""A worker with nothing to do for this long ends; the next compile starts it again."""

Deliver = Callable[[Outcome], None]


class Job:
    """One compile under way."""

    def __init__(self, deliver: Deliver | None, delay: float) -> None:
        self._deliver = deliver
        self._delay = delay
        self._future: Future[Outcome] = Future()
        self._hold: threading.Timer | None = None

    def cancel(self) -> None:
        """Drop this job: its outcome will not be delivered."""
        self._deliver = None
        self._future.cancel()
        if self._hold is not None:
            self._hold.cancel()

    def wait(self) -> Outcome:
        """Block until the compile has ended, for who cannot go on without it."""
        futures.wait([self._future])
        time.sleep(self._delay)
        return _outcome(self._future)

    def _run_delivery(self, outcome: Outcome) -> None:
        deliver, self._deliver = self._deliver, None
        if deliver is not None:
            deliver(outcome)


class Service:
    """Sends parcels to an executor and outcomes to whoever asked."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # reentrant, since garbage collection may cancel jobs at any allocation
        self._pool: loky.ProcessPoolExecutor | None = None
        self._pool_size = 0
        self._compiling = 0  # jobs in our own workers
        self._loader: ThreadPoolExecutor | None = None
        self._stopped = False

    def start(self) -> None:
        """Start the workers, so that they import torch while the program goes on. Returns at once."""
        needed = settings.current().executor is None and not settings.disabled()
        # Not in a child that multiprocessing made: a DataLoader's worker imports the user's module, and no more.
        if needed and multiprocessing.parent_process() is None:
            self._submit_to_pool(os.getpid)

    def submit(self, parcel: bytes, deliver: Deliver | None, sizes: dict[str, int] | None = None) -> Job:
        """Have `parcel` compiled, for other `sizes` than it was traced with where they are given.

        `deliver` gets the outcome; where it is None, the caller takes it from the job.
        """
        job = Job(deliver, settings.current().delay)
        compile_parcel = functools.partial(worker.compile_graph, parcel, sizes or {}, time.time())
        executor = settings.current().executor
        try:
            if executor is None:
                job._future = self._submit_to_pool(compile_parcel)
                self._count_compile(job._future)
            else:
                job._future = executor.submit(compile_parcel)
            if deliver is not None:
                self._load_soon(artifact.prepare)
        except Exception as error:
            advice = "frame_swap.configure(executor=None) uses frame-swap's own workers"
            whose = "the worker processes" if executor is None else f"{type(executor).__name__}; {advice}"
            job._future = Future()
            job._future.set_result(_failed(f"no compile could be started in {whose}: {first_line(error)}"))
        if deliver is not None:
            job._future.add_done_callback(functools.partial(self._done, job))
        return job

    def threads_for_program(self) -> int | None:
        """How many threads leave our workers a core each; None while they compile nothing."""
        busy = min(self._compiling, self._pool_size)
        return max(1, settings.usable_cpus() - busy) if busy > 0 else None

    @property
    def stopped(self) -> bool:
        """Whether the interpreter is on its way out."""
        return self._stopped

    def worker_pids(self) -> list[int]:
        """Process ids of our own workers, for tests and the curious."""
        with self._lock:
            return list(self._pool._processes) if self._pool is not None else []

    def stop(self) -> None:
        """End the workers now, without waiting for what they compile."""
        with self._lock:
            self._stopped = True
            pool, self._pool = self._pool, None
            loader, self._loader = self._loader, None
        if loader is not None:
            loader.shutdown(wait=False, cancel_futures=True)
        if pool is not None:
            for pid in list(pool._processes):
                worker.kill_group(pid)
            pool.shutdown(wait=True, kill_workers=True)

    def forget(self) -> None:
        """In a forked child: start over, leaving the parent's workers to the parent."""
        # Its locks may be held by threads that are not here: nothing touches it, finalizers least of all.
        _inherited.append(self._pool)
        loky.process_executor._threads_wakeups.clear()  # or loky would, at exit
        self.__init__()  # type: ignore[misc]

    def _submit_to_pool(self, call: Callable[[], Any]) -> Future[Any]:
        with forks.held_off():
            try:
                future: Future[Any] = self._own_pool().submit(call)
            except loky.process_executor.BrokenProcessPool:
                with self._lock:  # a worker died and took its pool along: make another, once
                    self._pool = None
                future = self._own_pool().submit(call)
            return future

    def _own_pool(self) -> Any:
        size = settings.current().workers
        with self._lock:
            if self._stopped:
                raise RuntimeError("the interpreter is shutting down")
            if self._pool is not None and self._pool_size != size:
                self._pool.shutdown(wait=False)  # what it compiles now is finished and delivered
                self._pool = None
            if self._pool is None:
                compilers = max(1, settings.usable_cpus() // size)
                self._pool = loky.ProcessPoolExecutor(
                    size,
                    timeout=IDLE_SECONDS,
                    initializer=worker.initialize,
                    initargs=(os.getpid(), NICENESS, compilers),
                    # Workers trace with the program's number of threads; those that wait must not spin.
                    env={"OMP_WAIT_POLICY": "passive"},
                )
                self._pool_size = size
                _stop_at_exit()
            return self._pool

    def _count_compile(self, future: Future[Outcome]) -> None:
        def done(_: Future[Outcome]) -> None:
            with self._lock:
                self._compiling -= 1

        with self._lock:
            self._compiling += 1
        future.add_done_callback(done)

    def _done(self, job: Job, future: Future[Outcome]) -> None:
        if job._deliver is None:  # cancelled
            return
        outcome = _outcome(future)
        if job._delay > 0:
            job._hold = threading.Timer(job._delay, self._finish, (job, outcome))
            job._hold.daemon = True
            job._hold.start()
        else:
            self._finish(job, outcome)

    def _finish(self, job: Job, outcome: Outcome) -> None:
        self._load_soon(functools.partial(job._run_delivery, outcome))

    def _load_soon(self, call: Callable[[], None]) -> None:
        with self._lock:
            if self._stopped:
                return
            if self._loader is None:
                self._loader = ThreadPoolExecutor(1, thread_name_prefix="frame-swap-loader")
            loader = self._loader
        with contextlib.suppress(RuntimeError):  # shut down in between
            loader.submit(_run_courteously, call).add_done_callback(_log_failure)


def _run_courteously(call: Callable[[], None]) -> None:
    """Run `call`, handing the GIL over after at most half a millisecond.

    A thread that wants the GIL back waits for the switch interval, 5 ms by default, and the program's calls
    want it back after each op.
    """
    usual = sys.getswitchinterval()
    sys.setswitchinterval(min(usual, 0.0005))
    try:
        call()
    finally:
        sys.setswitchinterval(usual)


def _log_failure(future: Future[None]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        log.error("frame-swap: delivering a compile failed", exc_info=error)


def _outcome(future: Future[Outcome]) -> Outcome:
    if future.cancelled():  # by `Job.cancel`, and then nobody listens; or by the user's executor
        return _failed("the executor cancelled it")
    if (error := future.exception()) is not None:
        return _failed(f"the worker was lost: {first_line(error)}")
    return future.result()


def _failed(error: str) -> Outcome:
    now = time.time()
    return Outcome(None, b"", error, "", now, now, now, 0)


service = Service()

_inherited: list[Any] = []
"""What a forked child keeps and never uses."""


@functools.cache
def _stop_at_exit() -> None:
    # concurrent.futures and loky wait for their work in a hook that runs before `atexit`'s. Hooks run last in,
    # first out, so ours comes before theirs, as long as it is registered after them: hence not at import.
    register = getattr(threading, "_register_atexit", atexit.register)
    service._pool and service._pool._ensure_executor_running()
    register(service.stop)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=service.forget)
