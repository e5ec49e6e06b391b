"""The report: frozen rows, and all of them as plain data; table.py makes text of them."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from .states import Purpose, State

if TYPE_CHECKING:
    from rich.console import Group

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
    artifact = _OfLatest("")
    artifact_reason = _OfLatest("")
    wrappers = _OfLatest[tuple[str, ...]](())
    cuda_graphs = _OfLatest("")
    verified = _OfLatest(0)
    profit = _OfLatest("")
    store = _OfLatest("")
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
        artifact, artifact_reason: what the code is: "inductor" for generated Python and its kernels, "aoti" for a
            package of AOTInductor's, "" while there is none; and why it is no package where that was wished.
        wrappers: AOTAutograd's wrappers that are still called around the code; most graphs need none.
        cuda_graphs: whether its CUDA graphs are recorded, after how many calls without, and how long the calls took
            that did it; "" where it has none.
        verified: how many calls `verify` compared with eager code and found equal.
        profit: what `profit` measured, on both sides; "" where it did not.
        store: "found" where an earlier run or another process has compiled it, "kept" where it is in the store for
            the next; else why it is not, or "" where there is no store.
        autotuned: whether Inductor has timed many kernels for one: the second tier of `tiers`.
        worker_pid: process id of the worker; None where none has compiled it.
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
    artifact: str
    artifact_reason: str
    wrappers: tuple[str, ...]
    cuda_graphs: str
    verified: int
    profit: str
    store: str
    autotuned: bool
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
        eager: the eager code: "graph" for Dynamo's graph as it is, "pair" for AOTAutograd's forward and backward;
            "" where there is none.
        eager_reason: why it is not the one that the setting `first` asks for; "" where it is.
        eager_calls: calls that eager code has served.
        ship_s: seconds spent packing the graph, in the call; None where it was not packed.
        compiles: every compile for it, the oldest first. `queue_s`, `compile_s`, `load_s`, `install_s`,
            `artifact_bytes`, `artifact`, `artifact_reason`, `wrappers`, `cuda_graphs`, `verified`, `profit`,
            `store`, `worker_pid`, `compile_span` and `installed_at` are those of the latest.
    """

    frame: str
    compile_id: str
    state: State
    reason: str
    eager: str
    eager_reason: str
    eager_calls: int
    ship_s: float | None
    compiles: tuple[Compile, ...]


class Report:
    """The regions of this process at one moment. `str()` is a table, `.regions` the rows, `.as_dict()` for JSON.

    Attributes:
        regions: a row for each.
        capturing: frames that are being captured in the background (`capture="background"`); they run as plain
            Python, and have no row yet.
    """

    def __init__(self, rows: Iterable[Region], capturing: Iterable[str] = ()) -> None:
        self.regions = list(rows)
        self.capturing = list(capturing)

    def as_dict(self) -> dict[str, Any]:
        """Plain values: `{"regions": [{..., "compiles": [{...}, ...]}, ...], "capturing": [...]}`.

        Times are in seconds, sizes in bytes.
        """
        summaries = ("artifacts", "late_guards", *_OF_LATEST)
        return {
            "regions": [
                _plain(dataclasses.asdict(region) | {name: getattr(region, name) for name in summaries})
                for region in self.regions
            ],
            "capturing": self.capturing,
        }

    def __str__(self) -> str:
        from .table import text  # imports rich, which the first call should not wait for

        return text(self)

    __repr__ = __str__  # what an interactive Python shows

    def _repr_html_(self) -> str:
        from .table import in_html

        return in_html(self)

    def __rich__(self) -> Group:
        from .table import rendered

        return rendered(self)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, enum.Enum) else value
