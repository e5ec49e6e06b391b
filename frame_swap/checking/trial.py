"""What compiled code has to pass before it serves alone."""

from __future__ import annotations

import abc
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


class Trial(abc.ABC):
    """Calls of a region go through here, one at a time, until there is a verdict.

    Attributes:
        verdict: None until it is over; then "" where compiled code has passed, or what is wrong with it.
        remark: what the report is to say of compiled code that has passed; "" where nothing.
        findings: attributes of the region to set, by name, as far as they are known.
    """

    def __init__(self) -> None:
        self.verdict: str | None = None
        self.remark = ""
        self.findings: dict[str, Any] = {}

    @abc.abstractmethod
    def call(self, sides: Sides, args: Sequence[Any]) -> Any:
        """What a call returns with the graph's inputs `args`; raises what the graph raises."""
