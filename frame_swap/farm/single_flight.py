"""One compile at a time for a key, among all processes that use a store.

A process that wants what another is compiling waits for it in the background, and takes over where it dies.

Guarantees:
- `begin` waits for nothing, and the program's calls for nothing here.
- A compile waits for another process's at most `job_timeout` seconds; then it begins all the same.
- A claim is released once: when its compile has ended and its result is in the store, or when it is cancelled.
- A forked child holds none of its parent's claims, and waits for nothing that the parent waits for.

Assumed: appending to a list, and replacing it, are one step, as they are under the GIL.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError

from ..artifacts.store.entry import Claim, Entry
from ..errors import first_line
from ..runtime import forks
from .protocol import Outcome
from .reuse import Place, find

log = logging.getLogger(__name__)

_claiming = forks.lock()
"""Held while a claim is made: a forked child knows of all that it has to forget."""

PAUSE = 0.1
"""Seconds between two looks whether another process is done."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A compile that some process is to make once.

    Attributes:
        place: where its result is kept.
        loading: what loading it takes besides, as an `Entry` has it.
        start: begins the compile here.
        still: whether anybody wants it.
        timeout: seconds to wait for another process.
    """

    place: Place
    loading: Callable[[], bytes]
    start: Callable[[], Future[Outcome]]
    still: Callable[[], bool]
    timeout: float


class SingleFlight:
    """Compiles of this process that others may want, too."""

    def __init__(self) -> None:
        self._claims: list[Claim] = []
        self._waiting: list[tuple[Wanted, Future[Outcome], float]] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def begin(self, wanted: Wanted) -> Future[Outcome]:
        """The result of a compile: of one that begins now, or of another process's. It is in the store by then."""
        future: Future[Outcome] = Future()
        deadline = time.monotonic() + wanted.timeout
        if wanted.place.store.is_far or not self._is_over(wanted, future, deadline):
            with self._lock:
                if self._thread is None:
                    thread = threading.Thread(target=self._watch, name="frame-swap-store", daemon=True)
                    thread.start()  # which waits for the lock
                    self._thread = thread
                self._waiting.append((wanted, future, deadline))
        return future

    def forget(self) -> None:
        """In a forked child: hold none of the parent's claims."""
        for claim in self._claims:
            claim.forget()
        self._claims.clear()

    def _is_over(self, wanted: Wanted, future: Future[Outcome], deadline: float) -> bool:
        """Whether there is no need to wait for another process: `future` gets the result, or nobody wants it."""
        if not wanted.still():
            future.cancel()
            return True
        wanted.place.store.fetch(wanted.place.key)
        if wanted.place.store.is_far and (found := find(wanted.place)) is not None:
            with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
                future.set_result(found)
            return True
        with _claiming:
            claim = wanted.place.store.claim(wanted.place.key)
            if claim is not None:
                self._claims.append(claim)
        if claim is None and time.monotonic() < deadline:
            return False
        try:
            # Look once more: whoever had the claim may have been done since the first look.
            if (found := find(wanted.place)) is not None:
                begun: Future[Outcome] = Future()
                begun.set_result(found)
            else:
                begun = wanted.start()
        except BaseException:
            self._end(claim)
            raise

        def drop(done: Future[Outcome]) -> None:
            if done.cancelled():
                begun.cancel()

        future.add_done_callback(drop)
        begun.add_done_callback(lambda done: self._finish(wanted, claim, done, future))
        return True

    def _finish(self, wanted: Wanted, claim: Claim | None, done: Future[Outcome], future: Future[Outcome]) -> None:
        """A compile of this process has ended, or was cancelled before it began."""
        try:
            outcome = _kept(wanted, done.result())
        except CancelledError:
            self._end(claim)
            future.cancel()
        except BaseException as error:
            self._end(claim)
            with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
                future.set_exception(error)
        else:
            self._end(claim)
            with contextlib.suppress(InvalidStateError):
                future.set_result(outcome)

    def _end(self, claim: Claim | None) -> None:
        if claim is not None:
            with contextlib.suppress(ValueError):  # forgotten, in a child
                self._claims.remove(claim)
                claim.release()

    # On the thread that waits

    def _watch(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
            self.look()
            time.sleep(PAUSE)

    def look(self) -> None:
        """See of each compile that is waited for whether it is over, or can begin here. Raises nothing."""
        with self._lock:
            waiting = list(self._waiting)
        for one in waiting:
            wanted, future, deadline = one
            try:
                over = self._is_over(wanted, future, deadline)
            except Exception as error:
                over = True
                with contextlib.suppress(InvalidStateError):
                    future.set_exception(error)
            if over:
                with self._lock:
                    self._waiting.remove(one)


def _kept(wanted: Wanted, outcome: Outcome) -> Outcome:
    """`outcome`, with its artifact in the store if that can be."""
    if outcome.artifact is None or outcome.store:
        return outcome
    try:
        entry = Entry(outcome.artifact, outcome.late_guards, wanted.loading(), outcome.echo)
        failure = wanted.place.store.put(wanted.place.key, entry)
    except Exception as error:  # the state holds a setting that only looked as if it could be pickled
        failure = first_line(error)
    return dataclasses.replace(outcome, store=f"not kept: {failure}" if failure else "kept")
