"""`verify=n`: the first `n` calls that compiled code could serve are made twice, and compared.

What the caller gets is the pair's, with the pair's autograd graph: the comparison runs before that, on copies, so
that inputs are changed once, no gradient is accumulated twice, and random numbers are drawn as if there was none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..internals import eval_frame
from .arguments import Uncopyable
from .comparison import Comparison
from .trial import Findings, Sides, Trial

log = logging.getLogger(__name__)

KeepRepro = Callable[[Sequence[Any], str], str]
"""Given a call's arguments and what differs, keeps them for `python -m frame_swap repro`; returns the command."""


class Verification(Trial):
    """Whether compiled code computes what the pair computes.

    Args:
        calls: how many to compare.
        graph: Dynamo's.
        keep_repro: called for a difference.
        same_numbers: whether compiled code draws the pair's random numbers.
        repeatable: whether a call may be made twice: a call has no effects besides its outputs and changed inputs.
    """

    def __init__(
        self,
        calls: int,
        graph: torch.fx.GraphModule,
        keep_repro: KeepRepro,
        *,
        same_numbers: bool,
        repeatable: bool,
    ) -> None:
        super().__init__()
        self._calls = calls
        self._graph = graph
        self._same_numbers = same_numbers
        self._keep_repro = keep_repro
        self._made = 0
        self.findings = Findings(verified=0)
        if not repeatable:
            self._pass("not verified: it has effects, which would happen more than once")

    def call(self, sides: Sides, args: Sequence[Any]) -> Any:
        if self.verdict is None and not eval_frame.watched_by_mode():
            try:
                self._compare(sides, tuple(args))
            except (Uncopyable, torch.OutOfMemoryError) as error:
                self._pass(f"not verified: {str(error).partition(chr(10))[0]}")
            except Exception as error:
                log.warning("frame-swap: verifying compiled code failed", exc_info=True)
                self._pass(f"not verified: {type(error).__name__}: {error}")
        return sides.pair(*args)

    def _compare(self, sides: Sides, args: tuple[Any, ...]) -> None:
        comparison = Comparison(sides.bare_pair, args, self._graph, same_numbers=self._same_numbers)
        if comparison.expected.error:
            return  # so will the call itself
        difference = comparison.difference(sides.bare_compiled)
        if difference:
            self.verdict = f"it is not what the pair computes: {difference}; {self._keep_repro(args, difference)}"
            return
        self._made += 1
        self.findings = Findings(verified=self._made)
        if self._made >= self._calls:
            why = comparison.incomparable
            self._pass(f"verified but for its values: {why}" if why else "")

    def _pass(self, remark: str) -> None:
        self.verdict, self.remark = "", remark
