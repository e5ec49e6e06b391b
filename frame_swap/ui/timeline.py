"""`frame_swap.timeline(path)`: what has happened so far, as a trace that Perfetto reads.

The format is Chrome's trace events, in JSON. Slices of a track nest; a flow event belongs to the slice around it
(https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU).
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..region import Attempt, Record, State, records
from ..region.journal import Journal, Span
from ..region.table import short

Event = dict[str, Any]

NO_PROCESS = 2**22 + 1
"""A process id that no process has (Linux has none above 2**22): for what no process does."""

INSIDE = 1e-6
"""Seconds from the begin of a slice to its arrows. Perfetto gives an arrow to the slice that was begun last, be it
over or not, and draws it from the end of the first slice to the begin of the second."""


def timeline(path: str | os.PathLike[str]) -> None:
    """Write what has happened so far to `path`, for https://ui.perfetto.dev or `python -m frame_swap timeline`.

    A track for each thread has captures, loads, installs and first compiled calls; a track for each worker has its
    compiles with Inductor's phases inside; and there is one for the graphs that wait. Arrows lead from there to the
    worker and on to the install. What is not over yet ends now, and is marked as unfinished.

    Raises:
        OSError: `path` cannot be written; what was there before is still there.
    """
    text = json.dumps({"traceEvents": events(records(), time.time()), "displayTimeUnit": "ms"})
    path = Path(path)
    try:
        handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
            os.replace(unfinished, path)
        except BaseException:
            os.unlink(unfinished)
            raise
    except OSError as error:
        advice = "give a file in a folder that is there and can be written to"
        raise type(error)(
            error.errno, f"the timeline cannot be written: {error.strerror}; {advice}", str(path)
        ) from None


def events(regions: Sequence[Record], now: float) -> list[Event]:
    """The trace events of these regions, for a moment in seconds since the epoch."""
    trace = _Trace(now)
    for at, region in enumerate(regions):
        about = {"region": at, "frame": region.frame, "id": region.compile_id, "nodes": region.size}
        title = f"{region.compile_id} {short(region.frame)}"
        trace.add_journal(region.journal, title, about | {"state": str(region.state)})
        for attempt in region.attempts:
            trace.add_attempt(region, attempt, title, about)
    return trace.all()


class _Trace:
    def __init__(self, now: float) -> None:
        self._now = now
        self._events: list[Event] = []
        self._names: dict[tuple[int, int], str] = {}
        self._lanes: list[float] = []  # for each lane of those that wait, when its last one is over
        self._flows = 0

    def all(self) -> list[Event]:
        """Every event, and the names of tracks."""
        here = os.getpid()
        processes = {pid: f"worker {pid}" for pid, _ in self._names} | {here: "program", NO_PROCESS: "queue"}
        named = [_name("process_name", pid, 0, name) for pid, name in processes.items()]
        named += [_name("thread_name", *track, name) for track, name in self._names.items()]
        order = {here: 0, NO_PROCESS: 1}
        named += [
            {
                "ph": "M",
                "name": "process_sort_index",
                "pid": pid,
                "tid": 0,
                "args": {"sort_index": order.get(pid, 2)},
            }
            for pid in processes
        ]
        return named + sorted(self._events, key=lambda event: (event["ts"], -event.get("dur", 0.0)))

    def add_journal(self, journal: Journal, title: str, about: Event) -> None:
        """What threads of this process did, and what happened at once."""
        for span in journal.spans:
            self._slice(self._thread(span.thread, span.thread_name), f"{span.name} {title}", span, about)
        for moment in journal.moments:
            pid, tid = self._thread(moment.thread, moment.thread_name)
            self._events.append(
                {
                    "ph": "i",
                    "s": "t",
                    "name": f"{moment.name} {title}",
                    "cat": moment.name,
                    "ts": moment.at * 1e6,
                    "pid": pid,
                    "tid": tid,
                    "args": about | {"reason": moment.reason},
                }
            )

    def add_attempt(self, region: Record, attempt: Attempt, title: str, about: Event) -> None:
        """One compile: where it waited, which worker did it, and what this process made of the result."""
        about = about | {
            "tier": attempt.tier,
            "state": str(attempt.state),
            "reason": attempt.reason,
            "store": attempt.store,
            "artifact_bytes": attempt.artifact_bytes,
        }
        self.add_journal(attempt.journal, title, about)
        steps: list[tuple[tuple[int, int], float, float]] = []
        for name, began, ended, over in self._waits_and_compiles(region, attempt):
            told = about if over else about | {"unfinished": True}
            track = self._lane(began, ended) if name == "queue" else self._worker(attempt.worker_pid)
            self._slice(track, f"{name} {title}", Span(name, began, ended, track[1], ""), told)
            steps.append((track, began, ended))
            if name == "compile":
                self._phases(track, attempt, began, ended)
        for name in ("load", "install"):
            spans = [span for span in attempt.journal.spans if span.name == name]
            steps += [((os.getpid(), span.thread), span.began, span.ended) for span in spans[-1:]]
        self._arrows(steps)

    def _waits_and_compiles(self, region: Record, attempt: Attempt) -> Iterator[tuple[str, float, float, bool]]:
        """Name, begin and end in seconds, and whether it is over."""
        if attempt.compile_span is not None:
            if attempt.worker_pid is None:  # from the store
                return
            began, ended = attempt.compile_span
            yield "queue", began - (attempt.queue_s or 0.0), began, True
            yield "compile", began, ended, True
        elif attempt.state is State.PENDING:
            asked = max([attempt.journal.began, *(s.ended for s in region.journal.spans if s.name == "ship")])
            begun = attempt.begun_at
            yield "queue", asked, begun or self._now, begun is not None
            if begun is not None:
                yield "compile", begun, self._now, False

    def _phases(self, track: tuple[int, int], attempt: Attempt, began: float, ended: float) -> None:
        """torch's own phases. They nest, but for the rounding of clocks."""
        around = [(began + 2 * INSIDE, ended)]  # arrows are the compile's
        for name, start, end in sorted(attempt.phases, key=lambda phase: (phase[1], -phase[2])):
            while len(around) > 1 and start >= around[-1][1]:
                around.pop()
            first, last = around[-1]
            start, end = min(max(start, first), last), min(max(end, first), last)
            if end > start:
                self._slice(track, name, Span("phase", start, end, track[1], ""), {})
                around.append((start, end))

    def _slice(self, track: tuple[int, int], name: str, span: Span, args: Event) -> None:
        pid, tid = track
        self._events.append(
            {
                "ph": "X",
                "name": name,
                "cat": span.name,
                "ts": span.began * 1e6,
                "dur": max(0.0, span.ended - span.began) * 1e6,
                "pid": pid,
                "tid": tid,
                "args": args | {"seconds": round(span.ended - span.began, 6)},
            }
        )

    def _arrows(self, steps: Sequence[tuple[tuple[int, int], float, float]]) -> None:
        """Arrows from each step to the next."""
        for (here, began, ended), (there, begins, ends) in itertools.pairwise(steps):
            self._flows += 1
            self._arrow("s", here, began + min(INSIDE, (ended - began) / 2))
            self._arrow("f", there, begins + min(INSIDE, (ends - begins) / 2))

    def _arrow(self, kind: str, track: tuple[int, int], at: float) -> None:
        pid, tid = track
        self._events.append(
            {
                "ph": kind,
                "bp": "e",
                "id": self._flows,
                "name": "to the swap",
                "cat": "flow",
                "ts": at * 1e6,
                "pid": pid,
                "tid": tid,
            }
        )

    def _thread(self, thread: int, name: str) -> tuple[int, int]:
        track = os.getpid(), thread
        self._names.setdefault(track, name)
        return track

    def _worker(self, pid: int | None) -> tuple[int, int]:
        """The track of a worker; of a user's executor where that runs compiles in this process, or has not said."""
        if pid is None or pid == os.getpid():
            track = NO_PROCESS, 1
            self._names.setdefault(track, "compiles under way, or elsewhere")
        else:
            track = pid, pid
            self._names.setdefault(track, "compiles")
        return track

    def _lane(self, began: float, ended: float) -> tuple[int, int]:
        """A track where nothing else waits at that time: slices of a track may not overlap."""
        free = (lane for lane, until in enumerate(self._lanes) if until <= began)
        lane = next(free, len(self._lanes))
        self._lanes[lane : lane + 1] = [ended]
        track = NO_PROCESS, 100 + lane
        self._names.setdefault(track, "waits for a worker")
        return track


def _name(kind: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}
