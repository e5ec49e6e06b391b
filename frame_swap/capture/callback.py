"""Dynamo's callback: what happens to a frame that no cache entry fits.

Guarantees:
- With `capture="background"` a call runs as plain Python, or on what was captured for it. It does not wait for a
  trace, unless its frame has to be captured in the call: then it waits as without frame-swap.
- No mistake made here reaches the call: the frame is then captured in it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any, Protocol

from .. import settings
from ..internals import beside, dynamo
from ..internals import callback as dynamos
from ..runtime import locks, machine
from .captures import Capture, Captures, captures_of
from .thread import thread

log = logging.getLogger(__name__)


class CallbackInCalls(dynamos.CatchErrorsWrapper):
    """Dynamo's callback for a `torch.compile` with frame-swap's backend, where frames are captured in their calls.

    Python's full garbage collections are put off meanwhile: a capture makes enough objects for one, of tenths of a
    second.
    """

    def __call__(self, frame: Any, cache_entry: Any, frame_state: dict[Any, Any]) -> Any:
        """What Dynamo is to do with `frame`, which no cache entry fits."""
        capture = functools.partial(super().__call__, frame, cache_entry, frame_state)
        return capture() if settings.disabled() else machine.run_without_full_collections(capture)


class Callback(CallbackInCalls):
    """The same where frames can also be captured in the background, or restored from an earlier run."""

    def __call__(self, frame: Any, cache_entry: Any, frame_state: dict[Any, Any]) -> Any:
        """What Dynamo is to do with `frame`, which no cache entry fits."""
        if dynamos.is_called_disabled(depth=1):
            return dynamos.disabled()
        at_once, captures = False, None
        try:
            at_once = dynamos.decides_at_once(frame)
            if not at_once and _is_wanted() and (captures := self._captures(frame, frame_state)) is not None:
                if (answer := self._answer(captures, frame, frame_state)) is not None:
                    return answer
                log.info("frame-swap: a call captures %s: %s", frame.f_code.co_qualname, captures.in_a_call)
        except Exception:
            log.exception("frame-swap: a mistake in frame-swap; the call captures its frame, as without it")
        if at_once:
            return super().__call__(frame, cache_entry, frame_state)
        with contextlib.ExitStack() as stack:
            if (place := _place(self, frame)) is not None:
                if (answer := place.restored(frame_state)) is not None:
                    return answer
                stack.enter_context(place.keeping())
            stack.enter_context(thread.held())  # or the call would wait for Dynamo's lock
            result = super().__call__(frame, cache_entry, frame_state)
        if captures is not None and result.guarded_code is not None:
            captures.captured_in_a_call()
        return result

    def _captures(self, frame: Any, frame_state: dict[Any, Any]) -> Captures | None:
        """The captures of `frame`; None if it can only be captured in a call."""
        if (reason := dynamos.reason_for_the_call(self)) is None:
            return captures_of(self, frame_state)
        log.info("frame-swap: a call captures %s: %s", frame.f_code.co_qualname, reason)
        return None

    def _answer(self, captures: Captures, frame: Any, frame_state: dict[Any, Any]) -> Any:
        """The answer without a trace; None if the frame is to be captured in the call."""
        dynamos.expect_resets(frame.f_code)
        captures.calls += 1
        if (result := captures.take(frame)) is not None:
            return self._handle_skip(result, frame)
        if captures.is_under_way:
            return dynamos.plainly()
        if captures.in_a_call:
            return None
        if (skipped := dynamos.skip(frame)) is not None:
            return self._handle_skip(skipped, frame)
        fits: list[bool] = []
        locks.call_holding(dynamo.compile_lock, lambda: fits.append(dynamos.fits_an_entry(self, frame)))
        if fits == [False]:  # otherwise Dynamo is at work, and a later call asks again
            self._begin(captures, frame, frame_state)
        return dynamos.plainly()

    def _begin(self, captures: Captures, frame: Any, frame_state: dict[Any, Any]) -> None:
        """Ask the thread for a capture, unless another call has done so just now."""
        capture, calls = Capture(self, frame, frame_state), captures.calls
        submitted = False
        try:
            if captures.begin(capture):
                submitted = thread.submit(capture, captures.end, lambda: captures.calls > calls)
        finally:
            if not submitted:
                captures.forget(capture)


def _is_wanted() -> bool:
    """Whether frames that are captured from now on are to be captured in the background."""
    now = settings.current()
    return now.capture == "background" and now.when != "wait" and not settings.disabled()


class Place(Protocol):
    """Where frames like one that Dynamo asks about are kept for the program's next run."""

    def restored(self, frame_state: dict[Any, Any]) -> Any | None:
        """The answer about the frame, where an earlier run has left one that fits; else None. Raises nothing."""

    def keeping(self) -> contextlib.AbstractContextManager[None]:
        """Within the block Dynamo traces the frame, which is kept for the next run if it can be."""


FindPlace = Callable[[Callback, Any], Place | None]
"""Takes the callback and a frame; returns where it is kept, or None where it is not. Raises nothing."""

_find_place: FindPlace | None = None


def _place(callback: Callback, frame: Any) -> Place | None:
    wanted = settings.current().keep_frames and not settings.disabled()
    return _find_place(callback, frame) if wanted and _find_place is not None else None


def install(backend: Callable[..., Any], find_place: FindPlace) -> None:
    """Have Dynamo ask our callback about the frames of `backend`, from the next `torch.compile` on."""
    global _find_place
    _find_place = find_place
    dynamos.replace_callback(Callback if beside.is_possible() else CallbackInCalls, backend)
