"""The service that queues compiles, and the thread that delivers their outcomes.

Guarantees:
- `submit` neither waits for a compile nor raises. A failure reaches `deliver`, or the caller of `Job.wait`, as an
  `Outcome` with `error` set.
- A lost worker fails only the compile that it ran, and only at the second attempt; see local/pool.py.
- Of the compiles that wait for frame-swap's own workers, the one that will gain most comes first; see queue.py.
- `deliver` is called at most once per job, always on the loader thread, one job at a time. It is not called for a
  job that was cancelled in time, nor while the interpreter exits.
- `Job.cancel` never waits. A compile that has begun runs on in its worker; its outcome is dropped, and it is not
  tried again.
- After an outcome is delivered, or its job cancelled, nothing here holds the artifact's bytes.
- At exit no outcome is waited for; see workers.py.
- A forked child starts without jobs.
- `Job.cancel` may be called anywhere, also from a finalizer: it takes no lock that the interrupted thread might
  hold and could not take again.

Assumed: one lock guards which loader there is, and how many wait. A user's executor gives its own guarantees:
nothing is tried again there.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from .. import settings
from ..artifacts import load
from ..errors import first_line
from ..internals import dynamo, probe
from ..runtime import forks, machine, rests
from ..shipping import values
from ..shipping.parcel import Parcel
from .compile import compile_graph
from .local.pool import busy
from .local.process import Lost, register_at_exit
from .protocol import Outcome, Request
from .queue import NO_CALLS, Demand
from .reuse import Place, uses
from .single_flight import SingleFlight, Wanted
from .workers import wanted_here, workers

log = logging.getLogger(__name__)

Deliver = Callable[[Outcome], None]

LEISURE = 10.0
"""Seconds in which no compile was asked for or under way: then one comes that the last run has not waited for."""

PATIENCE = 2.0
"""Seconds from the first compile until the import of the modules that loading needs. The import holds the GIL for
most of a second. After this time most of the calls that ask for a first compile are over. An artifact that comes
sooner imports the modules itself."""


class Job:
    """One compile under way."""

    def __init__(self, deliver: Deliver | None, delay: float) -> None:
        self._deliver = deliver
        self._delay = delay
        self._cancelled = False
        self._future: Future[Outcome] = Future()
        self._hold: threading.Timer | None = None

    @property
    def wanted(self) -> bool:
        """Whether its outcome is still wanted."""
        return not self._cancelled

    def cancel(self) -> None:
        """Drop this job: its outcome will not be delivered."""
        self._cancelled = True
        self._deliver = None
        self._future.cancel()
        hold, self._hold = self._hold, None
        if hold is not None:
            hold.cancel()

    def wait(self) -> Outcome:
        """Block until the compile has ended, and return its outcome; for callers that need the result."""
        with contextlib.suppress(futures.CancelledError):
            self._future.exception()  # unlike `futures.wait`, it is woken by `cancel`
        time.sleep(self._delay)
        outcome, self._future = _outcome(self._future), Future()  # the old one leads to the artifact's bytes
        return outcome

    def file(self) -> Path:
        """A path in a folder of this job's, which goes with it."""
        folder = tempfile.mkdtemp(prefix="frame-swap-values-")  # 0700
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return Path(folder, "values")

    def _hold_back(self, finish: Callable[[], None]) -> None:
        """Call `finish` when the delay is over."""
        self._hold = threading.Timer(self._delay, finish)
        self._hold.daemon = True
        self._hold.start()
        if self._cancelled:  # meanwhile
            self.cancel()

    def _run_delivery(self, outcome: Outcome) -> None:
        deliver, self._deliver = self._deliver, None
        self._hold, self._future = None, Future()  # they lead to the outcome
        if deliver is not None:
            deliver(outcome)


class Service:
    """Sends parcels to an executor, and outcomes to the callables that want them."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._loader: ThreadPoolExecutor | None = None
        self._flight = SingleFlight()
        self._asked = 0
        self._waits_for_leisure = False
        self._prepares_loading = False
        self._in_a_hurry = 0
        self._stopped = False

    def start(self) -> None:
        """Get ready for the first compile, and return at once: the program is about to use frame-swap.

        A worker imports torch while the program runs on. Where the store has all that the program's last run has
        used, that is loaded ahead, and the worker is not needed.
        """
        if not wanted_here():
            return
        all_there = settings.current().when != "never" and uses.prepare(self._load_at_once)
        if uses.unfinished and not self._waits_for_leisure:
            self._waits_for_leisure = True
            self._at_leisure()
        if all_there:  # to end one takes a tenth of a second
            with contextlib.suppress(RuntimeError):  # out of threads: it stays until it is idle for too long
                threading.Thread(target=workers.make_way, name="frame-swap-way", daemon=True).start()
        else:
            workers.start()

    def _at_leisure(self) -> None:
        """Once nothing was compiled for a while, compile what the last run has not waited for, one by one."""
        asked = self._asked

        def begin() -> None:
            if self._stopped or settings.current().when == "never":
                return
            if self._asked == asked and not self.compiling and (taken := uses.take_unfinished()) is not None:
                place, parcel, sizes = taken
                self.submit(parcel, None, sizes, place=place)
            if uses.unfinished:
                self._at_leisure()

        timer = threading.Timer(LEISURE, begin)
        timer.daemon = True
        with contextlib.suppress(RuntimeError):  # out of threads
            timer.start()

    def make_way(self) -> None:
        """The program is about to compile in the foreground: end workers that have nothing to do.

        They import torch, or look for vector instructions, where it needs the cores. The next compile starts them.
        """
        if machine.crowded_by(settings.current().workers):
            workers.make_way()

    def submit(
        self,
        parcel: Parcel,
        deliver: Deliver | None,
        sizes: dict[str, int] | None = None,
        demand: Demand = NO_CALLS,
        place: Place | None = None,
    ) -> Job:
        """Compile `parcel`.

        Args:
            deliver: gets the outcome; where it is None, the caller takes it from the job.
            sizes: of symbols in shapes, where they are to differ from the traced ones.
            demand: decides which of the waiting compiles comes next. A user's executor has its own order.
            place: where the result is kept. If another process compiles for it, the job waits for that.
        """
        self._asked += 1
        job = Job(deliver, settings.current().delay)
        request = Request(parcel.content, parcel.envelope, sizes or {}, time.time())
        executor, patience = settings.current().executor, settings.current().job_timeout

        def start() -> Future[Outcome]:
            sent = request
            if parcel.frozen:
                sent = request._replace(
                    values=values.save(list(parcel.held), job.file() if executor is None else None)
                )
            compile_parcel = functools.partial(compile_graph, sent)
            if executor is not None:
                return executor.submit(compile_parcel)
            return workers.submit(compile_parcel, lambda: job.wanted, demand, _as_no_package(sent))

        try:
            if place is None:
                job._future = start()
            else:
                job._future = self._flight.begin(Wanted(place, parcel.loading, start, lambda: job.wanted, patience))
            _stop_at_exit()
            if deliver is not None:
                self._prepare_loading()
        except Exception as error:
            advice = "frame_swap.configure(executor=None) uses frame-swap's own workers"
            whose = "the worker processes" if executor is None else f"{type(executor).__name__}; {advice}"
            job._future = Future()
            job._future.set_result(_failed(f"no compile could be started in {whose}: {first_line(error)}"))
        if deliver is not None:
            job._future.add_done_callback(functools.partial(self._done, job))
        return job

    @contextlib.contextmanager
    def hurried(self) -> Iterator[None]:
        """Within the block the program waits for compiles: what is loaded meanwhile is loaded without rests."""
        with self._lock:
            self._in_a_hurry += 1
        try:
            yield
        finally:
            with self._lock:
                self._in_a_hurry -= 1

    @property
    def compiling(self) -> bool:
        """Whether something is being compiled by frame-swap's own workers, or loaded."""
        return busy.count > 0

    @property
    def stopped(self) -> bool:
        """Whether the interpreter is on its way out."""
        return self._stopped

    def stop(self) -> None:
        """Deliver nothing any more."""
        with self._lock:
            self._stopped = True
            loader, self._loader = self._loader, None
        if loader is not None:
            loader.shutdown(wait=False, cancel_futures=True)

    def forget(self) -> None:
        """In a forked child: start over."""
        self._flight.forget()
        self.__init__()  # type: ignore[misc]

    def _done(self, job: Job, future: Future[Outcome]) -> None:
        if self._stopped or not job.wanted:
            return
        finish = functools.partial(self._finish, job, _outcome(future))
        if job._delay > 0:
            job._hold_back(finish)
        else:
            finish()

    def _finish(self, job: Job, outcome: Outcome) -> None:
        def deliver() -> None:
            with busy.one_more(1):
                job._run_delivery(outcome)

        self._load_soon(deliver)

    def _prepare_loading(self) -> None:
        """Import what loading needs, `PATIENCE` seconds after the first compile was asked for.

        A package needs nothing; a graph that is none pays for the import when it is loaded.
        """
        if not self._prepares_loading and settings.current().artifact != "aoti":
            self._prepares_loading = True
            timer = threading.Timer(PATIENCE, self._load_soon, [load.prepare])
            timer.daemon = True
            with contextlib.suppress(RuntimeError):  # out of threads: then loading imports them
                timer.start()

    def _load_soon(self, call: Callable[[], None]) -> None:
        """Have the loader thread call it, with rests: the program makes its steps meanwhile."""
        self._load_at_once(functools.partial(rests.with_rests, call, lambda: self._in_a_hurry > 0))

    def _load_at_once(self, call: Callable[[], None]) -> None:
        with self._lock:
            if self._stopped:
                return
            if self._loader is None:
                _stop_at_exit()
                self._loader = ThreadPoolExecutor(1, thread_name_prefix="frame-swap-loader")
            loader = self._loader
        with contextlib.suppress(RuntimeError):  # shut down meanwhile
            loader.submit(machine.run_courteously, call).add_done_callback(_log_failure)


def _as_no_package(request: Request) -> Callable[[str], Callable[[], Outcome]]:
    """The compile that follows one whose worker was lost: a package may have crashed it, and is left.

    PyTorch's runner of packages crashes the process on some machines, such as those with another C++ library.
    """

    def second(why: str) -> Callable[[], Outcome]:
        return functools.partial(compile_graph, request._replace(unpackaged=why))

    return second


def _log_failure(future: Future[None]) -> None:
    if not future.cancelled() and (error := future.exception()) is not None:
        log.error("frame-swap: delivering a compile failed", exc_info=error)


def _outcome(future: Future[Outcome]) -> Outcome:
    if future.cancelled():  # by `Job.cancel`, and then nobody wants the outcome; or by the user's executor
        return _failed("the executor cancelled it")
    error = future.exception()
    if isinstance(error, Lost):
        return _failed(str(error), error.details)
    if error is not None:
        return _failed(f"the worker was lost: {first_line(error)}")
    return future.result()


def _failed(error: str, details: str = "") -> Outcome:
    now = time.time()
    return Outcome(None, b"", error, details, now, now, now, 0)


service = Service()


@functools.cache
def _stop_at_exit() -> None:
    # Hooks run in reverse order: this one runs before that of concurrent.futures, which waits for the loader.
    register_at_exit(service.stop)


if probe.missing() is None:
    forks.add_dynamos(dynamo.compile_lock)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=service.forget)
