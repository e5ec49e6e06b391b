"""The report as text and as HTML: totals, a row for each graph, and each reason once, with what to do about it."""

from __future__ import annotations

import html
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .report import Compile, Region, Report
from .states import State
from .under_way import short

WIDTH = 80

_TITLES = ("eager\ncalls", "ship\ns", "queue\ns", "comp.\ns", "load\ns", "inst.\nms")

_ADVICE = {
    State.PENDING: "frame_swap.wait() blocks until compiled code is there, and shows how far it is",
    State.READY: 'the next call installs it; with when="manual", frame_swap.swap() does',
    State.FAILED: "nothing is wrong with the results: eager code goes on serving",
    State.REJECTED: "nothing is wrong with the results: eager code goes on serving",
    State.FOREGROUND: "its first call has waited for Inductor, as without frame-swap; later calls are as fast",
    State.STALE: "nothing is to be done: nobody calls it any more",
    State.EAGER: 'with frame_swap.configure(when="ready"), what is captured from then on is compiled',
}
"""What to do, where the reason does not say it."""


def text(report: Report) -> str:
    """The report as plain text, `WIDTH` columns wide."""
    console = Console(file=io.StringIO(), width=WIDTH, force_terminal=False, force_jupyter=False)
    console.print(rendered(report))
    printed: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in printed.splitlines()).strip("\n")


def rendered(report: Report) -> Group:
    """The report for a console of rich's."""
    parts: list[Table | Padding] = [_indented(line) for line in _totals(report)]
    if report.regions:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("frame", overflow="fold")
        for title in ("id", "state"):
            table.add_column(title, no_wrap=True)
        for title in _TITLES:
            table.add_column(title, justify="right", no_wrap=True)
        for row in _rows(report):
            table.add_row(*row)
        parts.append(table)
    for reason, advice in _reasons(report):
        parts.append(_indented(reason))
        if advice:
            parts.append(Padding(Text(f"→ {advice}"), (0, 0, 0, 4)))
    return Group(*parts)


def in_html(report: Report) -> str:
    """The report for a notebook. It has no colours of its own: the notebook's theme decides."""

    def cells(tag: str, values: Iterable[str]) -> str:
        return "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values)

    totals = "<br>".join(map(html.escape, _totals(report)))
    head = cells("th", ("frame", "id", "state", *(title.replace("\n", " ") for title in _TITLES)))
    rows = "".join(f"<tr>{cells('td', row)}</tr>" for row in _rows(report))
    reasons = "".join(
        f"<li>{html.escape(reason)}{'<br>→ ' if advice else ''}{html.escape(advice)}</li>"
        for reason, advice in _reasons(report)
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>" if rows else ""
    return f"<div>{totals}{table}<ul>{reasons}</ul></div>"


def _totals(report: Report) -> Iterator[str]:
    regions = report.regions
    if not regions and not report.capturing:
        yield "no graph captured yet"
        return
    counts = Counter(region.state for region in regions)
    yield f"{len(regions)} graph{'s' * (len(regions) != 1)}: {', '.join(f'{n} {s}' for s, n in counts.items())}"
    kinds = Counter(region.eager for region in regions if region.eager)
    if kinds:
        calls = sum(region.eager_calls for region in regions)
        on = ", ".join(f"{n} on the {kind}" for kind, n in kinds.items())
        served = f"eager code has served {calls} call{'s' * (calls != 1)}"
        yield f"before the swap: {on}; {served}; compiled code serves the others, and nobody counts these"
    found = sum(region.store == "found" for region in regions)
    firsts = [region.compiles[0] for region in regions if region.compiles]
    saved = sum(c.compile_s or 0 for c in firsts if c.state is not State.FOREGROUND and c.store != "found")
    waited = sum(c.compile_s or 0 for c in firsts if c.state is State.FOREGROUND)
    said = [f"first calls returned {saved:.1f} s sooner than if they had waited for Inductor"] if saved else []
    said += [f"first calls waited {waited:.1f} s for Inductor in the foreground"] if waited else []
    said += [f"{found} from the store"] if found else []
    if said:
        yield "; ".join(said)


def _rows(report: Report) -> Iterator[list[str]]:
    for region in report.regions:
        shared = [short(region.frame), region.compile_id, region.state, str(region.eager_calls)]
        yield [*shared, _number(region.ship_s, 2), *_times(region.compiles[:1])]
        for compile in region.compiles[1:]:
            what = "autotuned" if compile.autotuned else compile.purpose
            yield [f"  {what}", "", compile.state, "", "", *_times([compile])]


def _reasons(report: Report) -> Iterator[tuple[str, str]]:
    """What no column has room for, each sentence once with the graphs that it is about; and what to do about it."""
    for frame in report.capturing:
        yield f"{short(frame)}: is being captured, and runs as plain Python", ""
    of: dict[tuple[str, str], list[str]] = {}
    for region in report.regions:
        name = f"{region.compile_id} {short(region.frame)}".strip()
        for remark in _remarks(region):
            of.setdefault(remark, []).append(name)
    for (what, advice), names in of.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield f"{', '.join(names[:3])}{more}: {what}", advice


def _remarks(region: Region) -> Iterator[tuple[str, str]]:
    """Sentences about a region, and what to do about each."""
    if region.reason or region.state in (State.PENDING, State.READY):
        advice = "" if "; " in region.reason and region.state is State.FOREGROUND else _ADVICE.get(region.state, "")
        yield f"{region.state}{': ' if region.reason else ''}{region.reason}", advice
    if region.eager_reason:
        yield f"its eager code is the {region.eager}: {region.eager_reason}", ""
    for compile in region.compiles[1:]:
        if compile.autotuned and (said := compile.profit or compile.reason):
            yield f"autotuned code: {compile.state}: {said}", ""
    if region.late_guards:
        yield f"late guards, checked before each call: {'; '.join(region.late_guards)}", ""
    if region.artifact_reason:
        yield f"its compiled code is no package: {region.artifact_reason}", ""
    if region.store.startswith("not kept"):
        yield f"its compiled code is {region.store}", "the next run of the program compiles it again"
    if region.cuda_graphs:
        yield f"CUDA graphs: {region.cuda_graphs}", ""
    if region.wrappers:
        yield f"AOTAutograd's wrappers remain for {', '.join(region.wrappers)}", ""


def _indented(line: str) -> Padding:
    return Padding(Text(line), (0, 0, 0, 2))


def _times(compiles: Sequence[Compile]) -> Iterator[str]:
    for compile in compiles:
        yield from (_number(value, 2) for value in (compile.queue_s, compile.compile_s, compile.load_s))
        yield _number(compile.install_s and 1e3 * compile.install_s, 1)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
