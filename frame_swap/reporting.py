"""What the user sees: one row per region, as text and as data; and the calls that wait and swap."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from .region import Region, State, regions, wait_until_settled
from .serving.trampoline import Trampoline

_COLUMNS = (
    "frame",
    "compile_id",
    "state",
    "reason",
    "pair_calls",
    "ship_s",
    "queue_s",
    "compile_s",
    "load_s",
    "install_s",
    "artifact_bytes",
    "late_guards",
    "artifacts",
    "wrappers",
    "verified",
    "profit",
    "worker_pid",
)


class Report:
    """The regions of this process at one moment. `str()` is a table, `.regions` the rows, `.as_dict()` for JSON.

    `frame_swap.Region` says what each column is.
    """

    def __init__(self, rows: list[Region]) -> None:
        self.regions = rows

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=160, force_terminal=False)
        console.print(self)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text

    def __rich__(self) -> Group:
        table = Table(box=box.SIMPLE_HEAD)
        for title in ("frame", "id", "state"):
            table.add_column(title, overflow="fold")
        for title in (
            "pair calls",
            "ship s",
            "queue s",
            "compile s",
            "load s",
            "install ms",
            "kB",
            "guards",
            "wrappers",
            "pid",
        ):
            table.add_column(title, justify="right")
        for r in self.regions:
            table.add_row(
                _short(r.frame),
                r.compile_id,
                str(r.state),
                str(r.pair_calls),
                *(_number(v, 2) for v in (r.ship_s, r.queue_s, r.compile_s, r.load_s)),
                _number(r.install_s and 1e3 * r.install_s, 1),
                _number(r.artifact_bytes and r.artifact_bytes / 1e3, 0),
                str(len(r.late_guards) or ""),
                ", ".join(r.wrappers),
                str(r.worker_pid or ""),
            )
        counts = Counter(str(region.state) for region in self.regions)
        summary = ", ".join(f"{n} {state}" for state, n in counts.items()) or "no graph captured yet"
        reasons = (f"{r.compile_id} {_short(r.frame)}: {r.state}: {r.reason}" for r in self.regions if r.reason)
        return Group(table, *(Text(f"  {line}") for line in (summary, *reasons)))

    def as_dict(self) -> dict[str, Any]:
        """Plain values: `{"regions": [{column: value, ...}, ...]}`, times in seconds, sizes in bytes."""
        return {"regions": [{name: _plain(getattr(r, name)) for name in _COLUMNS} for r in self.regions]}


def report() -> Report:
    """What has been captured so far, and what has become of it."""
    return Report(regions())


def swap() -> Report:
    """Install all compiled code that is ready, on the calling thread; returns the report. For when="manual"."""
    for trampoline in _offered():
        trampoline.install(wait=True)
    return report()


def wait(timeout: float | None = None) -> Report:
    """Block until no compile is pending, at most `timeout` seconds; then install, except for when="manual".

    Returns the report; rows that are still pending when the time is up say so.
    """
    wait_until_settled(timeout)
    for trampoline in _offered():
        trampoline.install_unless_manual()
    return report()


def _offered() -> list[Trampoline]:
    trampolines = (region.trampoline for region in regions())
    return [trampoline for trampoline in trampolines if trampoline is not None and trampoline.offered]


def _short(frame: str) -> str:
    name, _, place = frame.rpartition(", ")
    return f"{name} {place.rpartition('/')[2]}".strip()


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, State) else value
