"""How far the compiles of this process are, at one moment."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

from ... import settings
from ...region import Attempt, Record, State, capturing, records
from ...region.under_way import short


class Pending(NamedTuple):
    """A compile that has yet to end.

    Attributes:
        name: of its graph: Dynamo's compile id, function, file and line.
        doing: what happens to it now.
        seconds: how long a worker has been at it; None where none is.
        size: of the graph, in nodes.
    """

    name: str
    doing: str
    seconds: float | None
    size: int

    @property
    def took(self) -> str:
        """The seconds as text; "" where no worker is at it."""
        return "" if self.seconds is None else f"{self.seconds:.0f} s"


@dataclasses.dataclass(frozen=True)
class Progress:
    """What has been compiled, what is being compiled, and what serves meanwhile.

    Attributes:
        done, known: graphs.
        compiled: graphs on compiled code, foreground included.
        pending: compiles; those that workers are at come first.
        calls: how many calls eager code has served.
        elapsed: seconds since somebody began to look.
        left: seconds until all is done, estimated from the sizes of graphs; None before the first compile ends.
    """

    done: int
    known: int
    compiled: int
    pending: Sequence[Pending]
    calls: int
    elapsed: float
    left: float | None

    @classmethod
    def now(cls, since: float) -> Progress:
        """Of this moment; `since`: when somebody began to look, in seconds since the epoch."""
        known = records()
        awaited = [(r, a) for r in known for a in r.attempts if a.state is State.PENDING]
        pending = sorted((_pending(*one) for one in awaited), key=lambda one: -(one.seconds or 0.0))
        frames = [Pending(short(frame), "is being captured", None, 0) for frame in capturing()]
        compiled = (State.READY, State.INSTALLED, State.FOREGROUND, State.TRIAL)
        return cls(
            done=sum(not record.awaited for record in known),
            known=len(known) + len(frames),
            compiled=sum(record.state in compiled for record in known),
            pending=[*pending, *frames],
            calls=sum(record.eager_calls for record in known),
            elapsed=time.time() - since,
            left=_left(known, awaited),
        )


def _pending(record: Record, attempt: Attempt) -> Pending:
    name = f"{record.compile_id} {short(record.frame)}"
    if attempt.compile_s is not None:
        return Pending(name, "is being loaded", None, record.size)
    if attempt.begun_at is None:
        return Pending(name, "waits for a worker", None, record.size)
    doing = "is being autotuned" if attempt.autotuned else "is being compiled"
    return Pending(name, doing, time.time() - attempt.begun_at, record.size)


def _left(known: Sequence[Record], awaited: Sequence[tuple[Record, Attempt]]) -> float | None:
    """Seconds until all of `awaited` is done, if a node takes as long as in the compiles that have ended."""
    ended = [a.compile_s / max(1, r.size) for r in known for a in r.attempts if a.compile_s and a.worker_pid]
    if not ended or any(attempt.autotuned for _, attempt in awaited):  # tuning has little to do with size
        return None
    now, a_node = time.time(), statistics.median(ended)
    each = [max(0.0, a_node * r.size - (now - a.begun_at if a.begun_at else 0.0)) for r, a in awaited]
    return sum(each) / max(1, min(settings.current().workers, len(each)))
