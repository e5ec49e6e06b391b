"""What compiled code has to pass before it serves alone."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Sides(NamedTuple):
    """What may be called with the graph's inputs.

    Attributes:
        pair: the eager pair, to serve the caller; the report counts that.
        compiled: the code on trial, to serve the caller; where it raises, the pair answers.
        bare_pair, bare_compiled: both without all that, to see what they do.
    """

    pair: Callable[..., Any]
    compiled: Callable[..., Any]
    bare_pair: Callable[..., Any]
    bare_compiled: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Findings:
    """Results of a trial for the report.

    Attributes:
        verified: calls on which compiled code and the pair agreed; None if the trial does not compare them.
        profit: time of a call on each side, as text; None if the trial has not measured it.
    """

    verified: int | None = None
    profit: str | None = None

    def known(self) -> dict[str, int | str]:
        """The results that this trial has, by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


class Trial(abc.ABC):
    """Calls of a region go through here, one at a time, until there is a verdict.

    Attributes:
        verdict: None until it is over; then "" where compiled code has passed, or what is wrong with it.
        remark: what the report is to say of compiled code that has passed; "" where nothing.
        findings: results so far; a new object after each result.
    """

    def __init__(self) -> None:
        self.verdict: str | None = None
        self.remark = ""
        self.findings = Findings()

    @abc.abstractmethod
    def call(self, sides: Sides, args: Sequence[Any]) -> Any:
        """What a call returns with the graph's inputs `args`; raises what the graph raises."""
