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
from concurrent.futures import Future, InvalidStateError

from ..artifacts.store.entry import Claim, Entry, Store
from .kept import outcome_of
from .protocol import Outcome

log = logging.getLogger(__name__)

PAUSE = 0.1
"""Seconds between two looks whether another process is done."""

Start = Callable[[], "Future[Outcome]"]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A compile that some process is to make once.

    Attributes:
        store, key: where its result is kept.
        loading: what loading it takes besides, as an `Entry` has it.
        start: begins the compile here.
        still: whether anybody wants it.
        patience: seconds to wait for another process.
    """

    store: Store
    key: str
    loading: Callable[[], bytes]
    start: Start
    still: Callable[[], bool]
    patience: float


class Once:
    """Compiles of this process that others may want, too."""

    def __init__(self) -> None:
        self._claims: list[Claim] = []
        self._waiting: list[tuple[Wanted, Future[Outcome], float]] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def begin(self, wanted: Wanted) -> Future[Outcome]:
        """The result of a compile: of one that begins now, or of another process's. It is in the store by then."""
        future: Future[Outcome] = Future()
        end = time.monotonic() + wanted.patience
        if not self._is_over(wanted, future, end):
            with self._lock:
                self._waiting.append((wanted, future, end))
                if self._thread is None:
                    self._thread = threading.Thread(target=self._watch, name="frame-swap-store", daemon=True)
                    self._thread.start()
        return future

    def forget(self) -> None:
        """In a forked child: start over."""
        for claim in self._claims:
            claim.forget()
        self.__init__()  # type: ignore[misc]

    def _is_over(self, wanted: Wanted, future: Future[Outcome], end: float) -> bool:
        """Whether there is no need to wait for another process: `future` gets the result, or nobody wants it."""
        if not wanted.still():
            future.cancel()
            return True
        claim = wanted.store.claim(wanted.key)
        if claim is None and time.monotonic() < end:
            return False
        if claim is not None:
            self._claims.append(claim)
        try:
            if (entry := wanted.store.get(wanted.key)) is not None:
                begun: Future[Outcome] = Future()
                begun.set_result(outcome_of(entry))
            else:
                begun = wanted.start()
        except BaseException:
            self._end(claim)
            raise
        future.add_done_callback(lambda done: done.cancelled() and begun.cancel())
        begun.add_done_callback(lambda done: self._finish(wanted, claim, done, future, keep=entry is None))
        return True

    def _finish(
        self, wanted: Wanted, claim: Claim | None, done: Future[Outcome], future: Future[Outcome], *, keep: bool
    ) -> None:
        """A compile of this process has ended, or was cancelled before it began."""
        outcome = None if done.cancelled() or done.exception() is not None else done.result()
        if keep and outcome is not None and outcome.artifact is not None:
            failure = wanted.store.put(wanted.key, Entry(outcome.artifact, outcome.late_guards, wanted.loading()))
            outcome = dataclasses.replace(outcome, store=f"not kept: {failure}" if failure else "kept")
        self._end(claim)
        with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
            if outcome is not None:
                future.set_result(outcome)
            elif done.cancelled():
                future.cancel()
            else:
                future.set_exception(done.exception())

    def _end(self, claim: Claim | None) -> None:
        if claim is not None:
            with contextlib.suppress(ValueError):  # forgotten, in a child
                self._claims.remove(claim)
                claim.release()

    # On the thread that waits

    def _watch(self) -> None:
        while True:
            time.sleep(PAUSE)
            with self._lock:
                waiting = list(self._waiting)
                if not waiting:
                    self._thread = None
                    return
            for one in waiting:
                wanted, future, end = one
                try:
                    over = self._is_over(wanted, future, end)
                except Exception as error:
                    over = True
                    with contextlib.suppress(InvalidStateError):
                        future.set_exception(error)
                if over:
                    with self._lock:
                        self._waiting.remove(one)
