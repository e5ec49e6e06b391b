"""`verify=n`: compare compiled code with eager code on the first `n` calls that compiled code could serve.

Eager code serves the caller, with its own autograd graph. The comparison runs before, on copies of the arguments:
so inputs are changed once, gradients are accumulated once, and the random numbers are the same as without it.
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
"""Takes a call's arguments and the difference, keeps them for `python -m frame_swap repro`, returns the command."""


class Verification(Trial):
    """The trial that rejects compiled code if its results differ from eager code's.

    Args:
        calls: the number of calls to compare.
        graph: Dynamo's graph; takes the tensors that it holds as its first inputs.
        held: these tensors. The calls that are compared get copies, as of all arguments.
        compiled: the code on trial, without recovery; takes what `graph` takes.
        keep_repro: called if there is a difference.
        same_numbers: whether compiled code draws the same random numbers as eager code.
        repeatable: whether a call may be made twice: it only returns outputs and changes inputs.
    """

    def __init__(
        self,
        calls: int,
        graph: torch.fx.GraphModule,
        keep_repro: KeepRepro,
        *,
        held: tuple[torch.Tensor, ...],
        compiled: Callable[..., Any],
        same_numbers: bool,
        repeatable: bool,
    ) -> None:
        super().__init__()
        self._calls = calls
        self._graph = graph
        self._held = held
        self._compiled = compiled
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
        return sides.current(*args)

    def _compare(self, sides: Sides, args: tuple[Any, ...]) -> None:
        eager_code = self._graph if self._held else sides.bare_eager
        args = (*self._held, *args)
        comparison = Comparison(eager_code, args, self._graph, same_numbers=self._same_numbers)
        if comparison.expected.error:
            return  # the call itself will raise it
        difference = comparison.difference(self._compiled)
        if difference:
            self.verdict = f"it is not what eager code computes: {difference}; {self._keep_repro(args, difference)}"
            return
        self._made += 1
        self.findings = Findings(verified=self._made)
        if self._made >= self._calls:
            why = comparison.incomparable
            self._pass(f"verified but for its values: {why}" if why else "")

    def _pass(self, remark: str) -> None:
        self.verdict, self.remark = "", remark
