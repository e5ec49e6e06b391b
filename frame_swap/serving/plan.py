"""Which compiled code serves which calls of a region, in what order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..artifacts.compiled import Compiled
from ..checking.trial import Trial
from ..codegen.conditions import Condition, predicate
from ..region import Attempt


class Served(NamedTuple):
    """Compiled code in place or on trial, and the calls that it fits.

    Attributes:
        attempt: the compile that it came of.
        compiled: the code.
        condition: what must hold of a call's inputs for calling it; None where it fits all calls.
        fits: the condition as a function of the inputs.
    """

    attempt: Attempt
    compiled: Compiled
    condition: Condition | None
    fits: Callable[..., bool] | None

    @classmethod
    def of(cls, attempt: Attempt, compiled: Compiled, condition: Condition | None = None) -> Served:
        """The code `compiled` that came of `attempt`."""
        return cls(attempt, compiled, condition, condition and predicate(condition))

    def serves(self, args: Sequence[Any]) -> bool:
        """Whether it fits a call with the graph's inputs `args`."""
        return self.fits is None or self.fits(*args)


class Offer(NamedTuple):
    """Loaded code, proposed to a trampoline.

    Attributes:
        served: the code, and the calls that it fits.
        trials: what it has to pass before it is installed, in order.
        replaces: the compile whose calls it serves better; None where it is for calls that no other code serves.
        remark: for the report, once it is installed.
        awaited: whether the call that captured the frame has waited for it. It may wait for the install, too.
    """

    served: Served
    trials: tuple[Trial, ...] = ()
    replaces: Attempt | None = None
    remark: str = ""
    awaited: bool = False

    @property
    def attempt(self) -> Attempt:
        """The compile that it came of."""
        return self.served.attempt


class Offers(list[Offer]):
    """Offers in the order of arrival: the first is the next to be installed, or on trial.

    Several threads use it at a time. What is called here is one step each, as under the GIL.
    """

    @property
    def first(self) -> Offer | None:
        """None where there is none."""
        try:
            return self[0]
        except IndexError:
            return None

    def exchange_first(self, offer: Offer, new: Offer) -> None:
        """`new` takes the place of `offer`, if that is the first."""
        if self.first is offer:
            self[0] = new


Plan = tuple[Served, ...]
"""In order: the first that fits a call serves it. At most one fits all calls, and comes last."""


def planned(plan: Plan, offer: Offer) -> Plan:
    """The plan with the code of `offer` in it.

    Code that replaces other code takes its place. Where the new code has a condition that the old one has not, the
    old code stays behind it, for calls that do not meet the condition.
    """
    new = offer.served
    replaced = next((served for served in plan if served.attempt is offer.replaces), None)
    others = [served for served in plan if served is not replaced]
    if new.condition is None and any(served.condition is None for served in others):
        if replaced is None:
            raise ValueError("two codes that fit all calls, and neither is to replace the other")
        # The replaced code had a condition: its calls, and no others, go to the new code.
        new = new._replace(condition=replaced.condition, fits=replaced.fits)
    entries: list[Served] = []
    for served in plan:
        if served is not replaced:
            entries.append(served)
            continue
        entries.append(new)
        if new.condition is not None and new.condition != replaced.condition:
            entries.append(replaced)
    if replaced is None:
        entries.append(new)
    return tuple(sorted(entries, key=lambda served: served.condition is None))
