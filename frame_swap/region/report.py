"""The report: frozen rows, as text in 80 columns and as plain data."""

from __future__ import annotations

import dataclasses
import enum
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from rich import box
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .states import Purpose, State

WIDTH = 80


T = TypeVar("T")


class _OfLatest(Generic[T]):
    """An attribute of the latest compile, read from its region; `default` where there is no compile."""

    def __init__(self, default: T) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name
        _OF_LATEST.append(name)

    def __get__(self, summary: Summary, owner: type) -> T:
        return cast(T, getattr(summary.latest, self._name, self._default))


_OF_LATEST: list[str] = []


class Summary:
    """What the compiles of a region say of it as a whole; of frozen rows and of live records alike."""

    if TYPE_CHECKING:

        @property
        def compiles(self) -> Sequence[Any]:
            """Every compile, the oldest first."""

    queue_s = _OfLatest[float | None](None)
    compile_s = _OfLatest[float | None](None)
    load_s = _OfLatest[float | None](None)
    install_s = _OfLatest[float | None](None)
    artifact_bytes = _OfLatest[int | None](None)
    wrappers = _OfLatest[tuple[str, ...]](())
    verified = _OfLatest(0)
    profit = _OfLatest("")
    worker_pid = _OfLatest[int | None](None)
    compile_span = _OfLatest[tuple[float, float] | None](None)
    installed_at = _OfLatest[float | None](None)

    @property
    def latest(self) -> Any:
        """The compile that arrived last; the first one while none has; None where there is none."""
        arrived = [compile for compile in self.compiles if compile.compile_s is not None]
        return (arrived or [*self.compiles[:1]] or [None])[-1]

    @property
    def artifacts(self) -> int:
        """How many are in place: more than one where late guards made calls miss the first."""
        return sum(compile.state is State.INSTALLED for compile in self.compiles)

    @property
    def late_guards(self) -> tuple[str, ...]:
        """The conditions on sizes that compiles added, of all compiles."""
        return tuple(guard for compile in self.compiles for guard in compile.late_guards)

    @property
    def specialising(self) -> bool:
        """Whether a further compile is queued, under way or being loaded."""
        return any(compile.state is State.PENDING for compile in self.compiles[1:])


@dataclasses.dataclass(frozen=True)
class Compile:
    """One compile for a region.

    Attributes:
        purpose: what it was for: the region's "first" code, other "sizes", or "better" code.
        state, reason: what has become of it, and why where that needs saying.
        queue_s, compile_s, load_s, install_s: seconds spent waiting for a worker, compiling (in the worker),
            loading (on the loader thread) and installing (in a call). None until known.
        artifact_bytes: size of what the worker sent back.
        late_guards: conditions on sizes that the compile added; they are checked before its code is called.
        wrappers: AOTAutograd's wrappers that are still called around the code; most graphs need none.
        verified: how many calls `verify` compared with eager code and found equal.
        profit: what `profit` measured, on both sides; "" where it did not.
        worker_pid: process id of the worker.
        compile_span: when the compile began and ended, in seconds since the epoch.
        installed_at: when its code was in place, in seconds since the epoch.
    """

    purpose: Purpose
    state: State
    reason: str
    queue_s: float | None
    compile_s: float | None
    load_s: float | None
    install_s: float | None
    artifact_bytes: int | None
    late_guards: tuple[str, ...]
    wrappers: tuple[str, ...]
    verified: int
    profit: str
    worker_pid: int | None
    compile_span: tuple[float, float] | None
    installed_at: float | None


@dataclasses.dataclass(frozen=True)
class Region(Summary):
    """One captured graph: a row of the report.

    Attributes:
        frame: qualified name, file and line of the user's function.
        compile_id: Dynamo's, as in its logs: "frame/recompile".
        state, reason: what serves its calls, and why where that needs saying.
        pair_calls: calls that eager code has served.
        ship_s: seconds spent packing the graph, in the call; None where it was not packed.
        compiles: every compile for it, the oldest first. `queue_s`, `compile_s`, `load_s`, `install_s`,
            `artifact_bytes`, `wrappers`, `verified`, `profit`, `worker_pid`, `compile_span` and `installed_at` are
            those of the latest.
    """

    frame: str
    compile_id: str
    state: State
    reason: str
    pair_calls: int
    ship_s: float | None
    compiles: tuple[Compile, ...]


class Report:
    """The regions of this process at one moment. `str()` is a table, `.regions` the rows, `.as_dict()` for JSON."""

    def __init__(self, rows: Iterable[Region]) -> None:
        self.regions = list(rows)

    def as_dict(self) -> dict[str, Any]:
        """Plain values: `{"regions": [{..., "compiles": [{...}, ...]}, ...]}`, times in seconds, sizes in bytes."""
        summaries = ("artifacts", "late_guards", *_OF_LATEST)
        return {
            "regions": [
                _plain(dataclasses.asdict(region) | {name: getattr(region, name) for name in summaries})
                for region in self.regions
            ]
        }

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=WIDTH, force_terminal=False)
        console.print(self)
        text: str = console.file.getvalue()  # type: ignore[attr-defined]
        return text

    def __rich__(self) -> Group:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("frame", overflow="fold")
        for title in ("id", "state"):
            table.add_column(title, no_wrap=True)
        for title in ("eager\ncalls", "ship\ns", "queue\ns", "comp.\ns", "load\ns", "inst.\nms"):
            table.add_column(title, justify="right", no_wrap=True)
        for region in self.regions:
            shared = _short(region.frame), region.compile_id, region.state, str(region.pair_calls)
            table.add_row(*shared, _number(region.ship_s, 2), *_times(region.compiles[:1]))
            for compile in region.compiles[1:]:
                table.add_row(f"  {compile.purpose}", "", compile.state, "", "", *_times([compile]))
        counts = Counter(region.state for region in self.regions)
        summary = ", ".join(f"{n} {state}" for state, n in counts.items()) or "no graph captured yet"
        lines = [summary, *(line for region in self.regions for line in _remarks(region))]
        return Group(table, *(Padding(Text(line), (0, 0, 0, 2)) for line in lines))


def _remarks(region: Region) -> Iterator[str]:
    """Sentences about a region that no column has room for."""
    name = f"{region.compile_id} {_short(region.frame)}".strip()
    if region.reason:
        yield f"{name}: {region.state}: {region.reason}"
    if region.late_guards:
        yield f"{name}: late guards: {'; '.join(region.late_guards)}"
    if region.wrappers:
        yield f"{name}: AOTAutograd's wrappers remain for {', '.join(region.wrappers)}"


def _times(compiles: Sequence[Compile]) -> Iterator[str]:
    for compile in compiles:
        yield from (_number(value, 2) for value in (compile.queue_s, compile.compile_s, compile.load_s))
        yield _number(compile.install_s and 1e3 * compile.install_s, 1)


def _short(frame: str) -> str:
    name, _, place = frame.rpartition(", ")
    return f"{name} {place.rpartition('/')[2]}".strip()


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, enum.Enum) else value
