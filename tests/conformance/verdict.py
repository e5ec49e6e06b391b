"""What a run lost against stock Inductor, and how its graphs fared."""

from __future__ import annotations

import dataclasses
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from .outcomes import Outcome

Outcomes = Mapping[str, Outcome]

LISTED = Path(__file__).with_name("listed.toml")


def read_listed(when: str, first: str, artifact: str = "inductor", path: Path = LISTED) -> dict[str, str]:
    """The tests that may be lost in a mode and with kinds of eager and compiled code, with the reason of each."""
    groups = [
        group
        for group in tomllib.loads(path.read_text()).get("group", [])
        if when in group["when"]
        and first in group.get("first", [first])
        and artifact in group.get("artifact", [artifact])
    ]
    return {test: group["reason"] for group in groups for test in group["tests"]}


@dataclasses.dataclass
class Verdict:
    """One file in one mode.

    Attributes:
        expected: the tests that stock passes, of those that were to run.
        ran: the outcomes of those that did.
        listed: tests that may be lost, with the reason.
        stock_too: tests that stock has failed this time, too: nothing that frame_swap has lost.
    """

    file: str
    when: str
    expected: set[str]
    ran: Outcomes
    listed: Mapping[str, str]
    stock_too: set[str] = dataclasses.field(default_factory=set)

    def __post_init__(self) -> None:
        """Keep to what concerns this file."""
        self.expected = {one for one in self.expected if one.startswith(f"{self.file}::")}
        self.ran = {name: outcome for name, outcome in self.ran.items() if name in self.expected}

    @property
    def lost(self) -> list[Outcome]:
        """What stock passes and frame_swap does not, for no reason that is listed."""
        return [o for o in self._not_passed() if o.id not in self.listed]

    @property
    def lost_but_listed(self) -> list[Outcome]:
        """What may be lost, and was."""
        return [o for o in self._not_passed() if o.id in self.listed]

    @property
    def no_longer_lost(self) -> list[str]:
        """What may be lost, and was not: it should leave the list."""
        return sorted(o.id for o in self.ran.values() if o.outcome == "passed" and o.id in self.listed)

    @property
    def not_run(self) -> list[str]:
        """What stock passes and has no outcome here."""
        return sorted(self.expected - self.ran.keys())

    def passed(self) -> int:
        """How many tests passed."""
        return sum(o.outcome == "passed" for o in self.ran.values())

    def graphs(self) -> Counter[str]:
        """How many graphs were captured in all, and how many of them ended in which state."""
        counts = self._total("regions")
        return Counter({"captured": counts.total(), **counts})

    def reasons(self) -> dict[str, Counter[str]]:
        """How many graphs were not shipped, or not swapped, for which reason."""
        return {state: self._total(state) for state in ("foreground", "failed", "rejected")}

    def wrappers(self) -> Counter[str]:
        """How many swapped graphs are still called through which of AOTAutograd's wrappers; "" for none."""
        return self._total("wrappers")

    def packages(self) -> Counter[str]:
        """How many swapped graphs are AOTInductor's packages, and why others are none; empty if none is to be."""
        return self._total("packages")

    def stores(self) -> Counter[str]:
        """How many graphs had their code from the store, or left it there, or why they did not."""
        return self._total("stores")

    def calls(self) -> Counter[str]:
        """Mode "ready": how many calls were made twice and compared, and why others were not."""
        return self._total("twice")

    def aside(self) -> int:
        """Graphs that tests compiled in ways that are not a Dynamo backend's, by stock Inductor."""
        return sum(o.aside for o in self.ran.values())

    def _not_passed(self) -> list[Outcome]:
        failed = (o for o in self.ran.values() if o.outcome != "passed" and o.id not in self.stock_too)
        return sorted(failed, key=lambda o: o.id)

    def _total(self, field: str) -> Counter[str]:
        total: Counter[str] = Counter()
        for outcome in self.ran.values():
            total.update(getattr(outcome, field))
        return total


_COLUMNS = ("file", "when", "stock passes", "of these passed", "lost", "lost, listed", "not run")
_GRAPHS = ("graphs", "swapped", "on eager code", "foreground", "rejected", "failed", "stale")


def _row(verdict: Verdict) -> tuple[str, ...]:
    graphs = verdict.graphs()
    states = ("captured", "installed", "eager", "foreground", "rejected", "failed", "stale")
    counts = (len(verdict.expected), verdict.passed(), len(verdict.lost), len(verdict.lost_but_listed))
    return (verdict.file, verdict.when, *map(str, (*counts, len(verdict.not_run), *(graphs[s] for s in states))))


def show(verdicts: Iterable[Verdict], console: Console) -> None:
    """Print one row for each verdict, and below it everything that is not as stock does it."""
    table = Table(box=None, pad_edge=False)
    for at, title in enumerate((*_COLUMNS, *_GRAPHS)):
        table.add_column(title, justify="left" if at < 2 else "right")
    remarks = []
    for verdict in verdicts:
        table.add_row(*_row(verdict))
        remarks += [f"  {line}" for line in _remarks(verdict)]
    console.print(Group(table, *map(Text, remarks)), soft_wrap=True)


def _remarks(verdict: Verdict) -> list[str]:
    lines = [f"LOST {o.id}: {o.reason or o.outcome}" for o in verdict.lost]
    lines += [f"lost, listed: {o.id}: {verdict.listed[o.id]}" for o in verdict.lost_but_listed]
    lines += [f"no longer lost: {name}: take it off the list" for name in verdict.no_longer_lost]
    lines += [f"stock fails here, too: {name}" for name in sorted(verdict.stock_too)]
    for state, reasons in verdict.reasons().items():
        lines += [f"{state}: {count} graphs: {reason}" for reason, count in reasons.most_common()]
    for which, count in verdict.wrappers().most_common():
        lines.append(f"called {f'through AOTAutograd: {which}' if which else 'directly'}: {count} graphs")
    lines += [f"package: {what}: {count} graphs" for what, count in verdict.packages().most_common()]
    lines += [f"store: {what}: {count} graphs" for what, count in verdict.stores().most_common()]
    lines += [f"calls {what}: {count}" for what, count in verdict.calls().most_common()]
    if verdict.aside():
        lines.append(f"compiled by stock Inductor, without Dynamo: {verdict.aside()} graphs")
    return [f"{verdict.file}, {verdict.when}: {line}" for line in lines]


def markdown(verdicts: Iterable[Verdict]) -> str:
    """The same as tables for a README: counts, foreground reasons, and each test that is lost, with its reason."""
    verdicts = list(verdicts)
    lines = _markdown_table((*_COLUMNS, *_GRAPHS), (_row(v) for v in verdicts))
    reasons = [
        (v.file, v.when, state, reason.replace("|", "\\|"), str(count))
        for v in verdicts
        for state, counts in v.reasons().items()
        for reason, count in counts.most_common()
    ]
    if reasons:
        lines += ["", *_markdown_table(("file", "when", "state", "reason", "graphs"), reasons)]
    lost = [(f"`{o.id}`", v.when, v.listed[o.id]) for v in verdicts for o in v.lost_but_listed]
    lost += [(f"`{o.id}`", v.when, f"not listed: {o.reason}") for v in verdicts for o in v.lost]
    if lost:
        lines += ["", *_markdown_table(("lost", "when", "reason"), lost)]
    return "\n".join(lines)


def _markdown_table(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (titles, ("---",) * len(titles), *rows)]
