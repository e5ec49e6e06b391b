"""What has happened to a region or one of its compiles: kept for the timeline, and told to those who listen.

Those are the logger `frame_swap`, stderr with the setting `verbose`, and torch's structured trace (`TORCH_TRACE`).

Guarantees:
- Nothing here raises an `Exception`, whatever a handler of the program's does.
- A note costs microseconds where nobody listens. No call of installed code makes one.
- A forked child keeps what was noted before the fork, and goes on by itself.

Assumed: appending to a list is atomic.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from .. import settings
from ..internals import logs
from .under_way import short

log = logging.getLogger(__name__)


class Span(NamedTuple):
    """A piece of work: its name, when it began and ended in seconds since the epoch, and on which thread.

    Attributes:
        thread: the native id, as profilers and Perfetto show it.
        thread_name: Python's.
    """

    name: str
    began: float
    ended: float
    thread: int
    thread_name: str


class Moment(NamedTuple):
    """Something that happened at once; the attributes are as for `Span`."""

    name: str
    at: float
    reason: str
    thread: int
    thread_name: str


class Journal:
    """The spans and moments of one region, or of one compile, in the order in which they ended.

    Attributes:
        began: when this was made, in seconds since the epoch.
    """

    def __init__(self) -> None:
        self.began = time.time()
        self.spans: list[Span] = []
        self.moments: list[Moment] = []

    def note(self, name: str, reason: str = "") -> None:
        """Something has happened just now."""
        self.moments.append(Moment(name, time.time(), reason, *_here()))

    def worked(self, name: str, began: float, ended: float | None = None) -> None:
        """This thread has done some work since `began`, until `ended` or now, in seconds since the epoch."""
        self.spans.append(Span(name, began, time.time() if ended is None else ended, *_here()))

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """The block is a piece of work; profilers of torch's that are on show it, and NVTX with theirs."""
        began, start = time.time(), time.perf_counter()
        try:
            with logs.profiled(f"frame_swap: {name}"):
                yield
        finally:
            self.worked(name, began, began + time.perf_counter() - start)  # the clock may be set meanwhile

    def seconds(self, name: str) -> float | None:
        """How long the latest span of this name was; None where there is none."""
        return next((span.ended - span.began for span in reversed(self.spans) if span.name == name), None)


class News(NamedTuple):
    """One line for those who listen.

    Attributes:
        what: "shipped", "compiling", "installed", and so on.
        compile_id, frame: of the region, as in `Region`.
        tier: which of its compiles: "default", "autotuned" or "sizes".
        seconds: how long that has taken; None where it took no time.
        size: with its unit; "" where there is none.
        reason: why, where that needs saying.
    """

    what: str
    compile_id: str
    frame: str
    tier: str
    seconds: float | None = None
    size: str = ""
    reason: str = ""

    def __str__(self) -> str:
        took = "" if self.seconds is None else f"{self.seconds:.2f} s"
        line = f"{self.compile_id:6} {self.tier:9} {self.what:10} {took:>8} {self.size:>10}  {short(self.frame)}"
        return f"{line}{': ' if self.reason else ''}{self.reason}"


TOLD_AT_INFO = ("shipped", "found", "installed", "failed", "rejected", "foreground")
"""What the log has at level INFO; the rest is at DEBUG."""


def tell(news: News) -> None:
    """Tell those who listen."""
    with suppress(Exception):
        if settings.current().verbose:
            print(f"frame-swap {time.time() - _program_began():8.2f} s  {news}", file=sys.stderr, flush=True)
        log.log(logging.INFO if news.what in TOLD_AT_INFO else logging.DEBUG, "frame-swap: %s", news)
        logs.trace(f"frame_swap_{news.what}", news.compile_id, lambda: json.dumps(news._asdict()))


def _here() -> tuple[int, str]:
    return threading.get_native_id(), threading.current_thread().name


@functools.cache
def _program_began() -> float:
    """When this process began, in seconds since the epoch."""
    import psutil

    return psutil.Process().create_time()
