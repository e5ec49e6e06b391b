"""A trial: a test that compiled code has to pass before it serves all calls that fit."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Sides(NamedTuple):
    """The two sides of a trial. Each takes the graph's inputs.

    Attributes:
        current: what serves now, eager code or the compiled code in place, to serve the caller; the report counts
            this call.
        compiled: the code on trial, to serve the caller; if it raises, the call is recovered on eager code.
        bare_eager: eager code, without counting; to compare with it.
    """

    current: Callable[..., Any]
    compiled: Callable[..., Any]
    bare_eager: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Findings:
    """Results of a trial for the report.

    Attributes:
        verified: calls on which compiled code and eager code agreed; None if the trial does not compare them.
        profit: time of a call on each side, as text; None if the trial has not measured it.
    """

    verified: int | None = None
    profit: str | None = None


class Trial(abc.ABC):
    """Serves calls of a region, one at a time, until there is a verdict.

    Attributes:
        verdict: None until the trial is over. Then "" if compiled code has passed, else the reason why not.
        expected: whether code that has not passed is nothing to warn of.
        remark: a remark for the report on compiled code that has passed; "" if there is none.
        findings: results so far; a new object after each result.
    """

    def __init__(self) -> None:
        self.verdict: str | None = None
        self.expected = False
        self.remark = ""
        self.findings = Findings()

    @abc.abstractmethod
    def call(self, sides: Sides, args: Sequence[Any]) -> Any:
        """Serve a call with the graph's inputs `args`: return its outputs, or raise the error of the graph."""
