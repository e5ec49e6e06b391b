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
from ..region.under_way import short

Event = dict[str, Any]

NO_PROCESS = 2**22 + 1
"""A process id that no process has (Linux has none above 2**22): for what no process does."""

WAITS, ELSEWHERE = 100, 100_000
"""The first tracks of what waits, and of compiles that are not known to be in a worker."""

ROUNDING = 1e-3
"""Seconds by which a phase may stick out of the one around it: more than that, and it is of another thread."""

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
        self._lanes: dict[tuple[int, int], list[list[tuple[float, float]]]] = {}  # what each lane holds
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
            if name == "queue":
                track = self._lane(NO_PROCESS, WAITS, "waits for a worker", began, ended)
            else:
                track = self._worker(attempt.worker_pid, began, ended)
            self._slice(track, f"{name} {title}", Span(name, began, ended, track[1], ""), told)
            steps.append((track, began, ended))
            if name == "compile":
                self._phases(track, attempt, began, ended)
        for name in ("load", "install"):
            spans = [span for span in attempt.journal.spans if span.name == name][-1:]
            if steps:  # not the load that failed before this compile
                spans = [span for span in spans if span.began >= steps[-1][1]]
            steps += [((os.getpid(), span.thread), span.began, span.ended) for span in spans]
        self._arrows(steps)

    def _waits_and_compiles(self, region: Record, attempt: Attempt) -> Iterator[tuple[str, float, float, bool]]:
        """Name, begin and end in seconds, and whether it is over."""
        if attempt.store == "found":
            return
        shipped = (span.ended for span in region.journal.spans if span.name == "ship")
        again = (moment.at for moment in attempt.journal.moments if moment.name == "compiled again")
        begun = attempt.begun_at
        asked = min(max([attempt.journal.began, *shipped, *again]), begun or self._now)
        if attempt.compile_span is not None:
            began, ended = attempt.compile_span
            if attempt.worker_pid is not None:
                yield "queue", began - (attempt.queue_s or 0.0), began, True
                yield "compile", began, ended, True
            elif begun is not None:  # its worker was lost, and could not say when it began
                yield "queue", asked, begun, True
                yield "compile", begun, max(begun, ended), True
        elif attempt.state is State.PENDING:
            yield "queue", asked, begun or self._now, begun is not None
            if begun is not None:
                yield "compile", begun, self._now, False

    def _phases(self, track: tuple[int, int], attempt: Attempt, began: float, ended: float) -> None:
        """torch's own phases, within the compile; those of threads beside it are on tracks of their own."""
        around = [(began + 2 * INSIDE, ended)]  # arrows are the compile's
        for name, start, end in sorted(attempt.phases, key=lambda phase: (phase[1], -phase[2])):
            while len(around) > 1 and start >= around[-1][1]:
                around.pop()
            first, last = around[-1]
            start, end = max(start, first), min(end, ended)
            if end > last + ROUNDING:
                beside = self._lane(track[0], track[0] + NO_PROCESS, "compilers", start, end)
                self._slice(beside, name, Span("phase", start, end, beside[1], ""), {})
            elif (end := min(end, last)) > start:
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

    def _worker(self, pid: int | None, began: float, ended: float) -> tuple[int, int]:
        """The track of a worker; of a user's executor where that runs compiles in this process, or has not said."""
        if pid is None or pid == os.getpid():
            return self._lane(NO_PROCESS, ELSEWHERE, "compiles under way, or elsewhere", began, ended)
        return self._lane(pid, pid, "compiles", began, ended)

    def _lane(self, pid: int, first: int, name: str, began: float, ended: float) -> tuple[int, int]:
        """A track where nothing else happens then, `first` if possible: slices of a track may not overlap."""
        lanes = self._lanes.setdefault((pid, first), [])
        free = (at for at, held in enumerate(lanes) if all(e <= began or ended <= b for b, e in held))
        lane = next(free, len(lanes))
        if lane == len(lanes):
            lanes.append([])
        lanes[lane].append((began, ended))
        track = pid, first + lane
        self._names.setdefault(track, name)
        return track


def _name(kind: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}
