"""What became of each test: JSON lines, one test each, written as a run goes on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


@dataclasses.dataclass
class Outcome:
    """One test in one mode.

    Attributes:
        id: file, class and name, as pytest writes them: `test_torchinductor.py::CpuTests::test_abs_cpu`.
        outcome: "passed", "failed" or "skipped" (which is also what an expected failure is).
        reason: first line of what it failed with; "" where it passed.
        seconds: how long it took.
        peak_mb: the most memory that its process held meanwhile, in MiB; 0 where unknown.
        regions: how many captured graphs ended in which state.
        foreground, failed, rejected: how many for which reason.
        stores: how many had their code from the store, or left it there, or why they did not.
        packages: how many of the swapped are packages of AOTInductor's, or why they are none.
        wrappers: how many of the swapped are still called through which wrappers of AOTAutograd's; "" for none.
        aside: graphs that the test compiled in a way that is not a Dynamo backend's, left to stock Inductor.
        twice: how many calls were made twice and compared, and how many were not for which reason.
    """

    id: str
    outcome: str
    reason: str = ""
    seconds: float = 0.0
    peak_mb: int = 0
    regions: dict[str, int] = dataclasses.field(default_factory=dict)
    foreground: dict[str, int] = dataclasses.field(default_factory=dict)
    failed: dict[str, int] = dataclasses.field(default_factory=dict)
    rejected: dict[str, int] = dataclasses.field(default_factory=dict)
    stores: dict[str, int] = dataclasses.field(default_factory=dict)
    packages: dict[str, int] = dataclasses.field(default_factory=dict)
    wrappers: dict[str, int] = dataclasses.field(default_factory=dict)
    aside: int = 0
    twice: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def file(self) -> str:
        """The test file."""
        return self.id.partition("::")[0]

    def line(self) -> str:
        """As JSON, without what is empty."""
        return json.dumps({k: v for k, v in dataclasses.asdict(self).items() if v or k == "id"})


def read(path: Path) -> dict[str, Outcome]:
    """The outcomes in a file by id, the last one of each; empty where there is no file yet."""
    if not path.exists():
        return {}
    return {one.id: one for one in map(_parse, path.read_text().splitlines()) if one is not None}


def write(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Replace the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{one.line()}\n" for one in outcomes))


def append(path: Path, outcome: Outcome) -> None:
    """Add one, so that an interrupted run loses nothing."""
    with path.open("a") as file:
        file.write(f"{outcome.line()}\n")


def _parse(line: str) -> Outcome | None:
    try:
        fields: dict[str, Any] = json.loads(line)
    except ValueError:  # the last line of a run that was killed
        return None
    return Outcome(**fields)
