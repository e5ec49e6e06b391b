"""Stopping a thread of the program at a chosen moment, so that a test does something meanwhile.

with Moment(monkeypatch, load, "load") as loading:
    compiled(x)
    loading.wait()  # the loader thread is about to load, and goes no further
    torch._dynamo.reset()
"""

from __future__ import annotations

import faulthandler
import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, wait
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, TypeVar

import pytest

HANG = 120.0
"""Seconds after which what should have happened never will."""

T = TypeVar("T")


class Moment:
    """The first call of `owner.name` stops there until the block ends, before it does anything or `after` it has.

    Args:
        monkeypatch: undoes the patch at the end of the test.
        after: stop when the call has returned.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, after: bool = False) -> None:
        self._reached, self._released = threading.Event(), threading.Event()
        self._calls = itertools.count()
        inner = getattr(owner, name)

        def stopped(*args: Any, **keywords: Any) -> Any:
            first = next(self._calls) == 0
            if first and not after:
                self._stop()
            result = inner(*args, **keywords)
            if first and after:
                self._stop()
            return result

        monkeypatch.setattr(owner, name, stopped)

    def _stop(self) -> None:
        self._reached.set()
        assert self._released.wait(HANG), "nobody released this thread"

    def wait(self) -> None:
        """Until a thread stands there."""
        assert self._reached.wait(HANG), "no thread came by"

    def release(self) -> None:
        """Let it go on."""
        self._released.set()

    def __enter__(self) -> Moment:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.release()


class InBackground:
    """`call` in a thread of its own; `result()` is what it returned or raised."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._future: Future[T] = Future()

        def run(call: Callable[[], T]) -> None:
            try:
                self._future.set_result(call())
            except BaseException as error:
                self._future.set_exception(error)

        threading.Thread(target=run, args=(call,), daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, after at most so long."""
        return not wait([self._future], seconds).not_done

    def result(self) -> Any:
        return self._future.result(HANG)


class Canned(Executor):
    """Compiles each distinct parcel once, in frame-swap's own worker, and answers others with the same outcome.

    For tests that load and install one artifact many times. The first `submit` waits for the compile.
    """

    def __init__(self, submit: Callable[[Callable[[], Any]], Future[Any]]) -> None:
        self._submit_for_real = submit
        self._outcome: Any = None

    def submit(self, call: Callable[[], Any], /, *args: Any, **keywords: Any) -> Future[Any]:  # type: ignore[override]
        if self._outcome is None:
            self._outcome = self._submit_for_real(call).result(HANG)
        future: Future[Any] = Future()
        future.set_result(self._outcome)
        return future


def interrupted(at: int, files: tuple[str, ...], call: Callable[[], Any]) -> bool:
    """Run `call` with a KeyboardInterrupt at one of the points where Python raises them; False if it has so few.

    Python looks for signals where a function is entered and where C code has returned to Python code.

    Args:
        at: which point, from 0 on, of those in functions of `files`.
        files: the ends of file names.
    """
    points = itertools.count()
    raised = False

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal raised
        if event not in ("call", "c_return") or not frame.f_code.co_filename.endswith(files):
            return
        if next(points) == at:
            raised = True
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(profile)
    try:
        call()
    except KeyboardInterrupt:
        assert raised
    finally:
        sys.setprofile(None)
    return raised


@contextmanager
def stall_detector(progress: Callable[[], Any], limit: float = 60.0) -> Iterator[Callable[[], None]]:
    """Fail with every thread's stack where `progress()` has not changed for `limit` seconds.

    Yields what the block calls, instead of waiting for its threads without an end.
    """
    seen = [(progress(), time.monotonic())]

    def check() -> None:
        now = progress(), time.monotonic()
        if now[0] != seen[0][0]:
            seen[0] = now
        elif now[1] - seen[0][1] > limit:
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
            pytest.fail(f"no progress for {limit:.0f} s; the stacks are on stderr")

    yield check
