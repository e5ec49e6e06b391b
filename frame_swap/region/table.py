"""The report as text: a table in 80 columns, and below it what no column has room for."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .report import Compile, Region, Report

WIDTH = 80


def text(report: Report) -> str:
    """The report as plain text, `WIDTH` columns wide."""
    console = Console(file=io.StringIO(), width=WIDTH, force_terminal=False)
    console.print(rendered(report))
    printed: str = console.file.getvalue()  # type: ignore[attr-defined]
    return printed


def rendered(report: Report) -> Group:
    """The report for a console of rich's."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("frame", overflow="fold")
    for title in ("id", "state"):
        table.add_column(title, no_wrap=True)
    for title in ("eager\ncalls", "ship\ns", "queue\ns", "comp.\ns", "load\ns", "inst.\nms"):
        table.add_column(title, justify="right", no_wrap=True)
    for region in report.regions:
        shared = _short(region.frame), region.compile_id, region.state, str(region.eager_calls)
        table.add_row(*shared, _number(region.ship_s, 2), *_times(region.compiles[:1]))
        for compile in region.compiles[1:]:
            what = "autotuned" if compile.autotuned else compile.purpose
            table.add_row(f"  {what}", "", compile.state, "", "", *_times([compile]))
    counts = Counter(region.state for region in report.regions)
    summary = ", ".join(f"{n} {state}" for state, n in counts.items()) or "no graph captured yet"
    kinds = Counter(region.eager for region in report.regions if region.eager)
    if kinds:
        summary += f"; before the swap: {', '.join(f'{n} on the {kind}' for kind, n in kinds.items())}"
    if found := sum(region.store == "found" for region in report.regions):
        summary += f"; {found} from the store"
    waiting = [f"{_short(frame)}: is being captured, and runs as plain Python" for frame in report.capturing]
    lines = [summary, *waiting, *(line for region in report.regions for line in _remarks(region))]
    return Group(table, *(Padding(Text(line), (0, 0, 0, 2)) for line in lines))


def _remarks(region: Region) -> Iterator[str]:
    """Sentences about a region that no column has room for."""
    name = f"{region.compile_id} {_short(region.frame)}".strip()
    if region.reason:
        yield f"{name}: {region.state}: {region.reason}"
    if region.eager_reason:
        yield f"{name}: its eager code is the {region.eager}: {region.eager_reason}"
    for compile in region.compiles[1:]:
        if compile.autotuned and (said := compile.profit or compile.reason):
            yield f"{name}: autotuned code: {compile.state}: {said}"
    if region.late_guards:
        yield f"{name}: late guards: {'; '.join(region.late_guards)}"
    if region.store.startswith("not kept"):
        yield f"{name}: its compiled code is {region.store}"
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
