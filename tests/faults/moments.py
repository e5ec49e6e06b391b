"""Stop a thread of the program at a chosen moment, to do something meanwhile.

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
"""Seconds after which a test gives up waiting."""

T = TypeVar("T")


class Moment:
    """Stop the first call of `owner.name` until the block ends.

    Args:
        monkeypatch: undoes the patch at the end of the test.
        owner, name: the patched attribute.
        after: stop when the call is done; by default, before it begins.
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
        assert self._released.wait(HANG), "this thread was not released"

    def wait(self) -> None:
        """Wait until a thread has reached the moment."""
        assert self._reached.wait(HANG), "no thread came by"

    def release(self) -> None:
        """Let the thread go on."""
        self._released.set()

    def __enter__(self) -> Moment:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.release()


class InBackground:
    """Run `call` in a thread; `result()` returns its result, or raises its error."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._future: Future[T] = Future()

        def run(call: Callable[[], T]) -> None:
            try:
                self._future.set_result(call())
            except BaseException as error:
                self._future.set_exception(error)

        threading.Thread(target=run, args=(call,), daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """Wait at most `seconds`; return whether the call has ended."""
        return not wait([self._future], seconds).not_done

    def result(self) -> Any:
        return self._future.result(HANG)


class Canned(Executor):
    """An executor that compiles its first parcel in a worker, and gives every later one the same outcome.

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
    """Run `call`, and raise KeyboardInterrupt at one of the points where Python itself might.

    Python checks for signals when a function is entered and when C code returns to Python code.

    Args:
        at: the index of the point among those in functions of `files`.
        files: suffixes of file names.

    Returns:
        Whether there were that many points, and so an interrupt.
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
def stall_detector(progress: Callable[[], Any], limit: float = 150.0) -> Iterator[Callable[[], None]]:
    """Fail, and print all stacks, when `progress()` has not changed for `limit` seconds.

    Yields a function that the block calls regularly while it waits.
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
