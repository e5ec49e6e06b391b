"""Each compiled call made twice: on eager code, and after the swap on equal arguments and random state.

With `when="manual"` every call of a graph first meets its trampoline, and all that a graph reads is in its
arguments and the generators. So the trampoline's call becomes:

1. eager code runs on a copy of the arguments, and then its backward, with a gradient for each output that differs
   from element to element;
2. the compile is waited for and installed: the frame is rewritten;
3. the compiled code runs on another copy, from the same random state, and then its backward;
4. outputs, gradients and arguments of both are compared: values, shapes, strides, dtypes, `requires_grad`;
5. the call itself starts over, through the rewritten frame, where this graph was the first thing that it ran.
   Elsewhere, where something would be done twice, compiled code serves it here.

Values are close where `torch.testing.assert_close` says so with its defaults for the dtype, as PyTorch's own tests
do. Where they are not, Dynamo's graph runs once more, op by op in double precision, and compiled code may be off
that by four times what eager code is off, and by the dtype's tolerance of the largest value. Values of graphs that
draw random numbers are compared only with `fallback_random`, since Inductor's own differ from eager's; those that
differ of a graph that makes uninitialised memory are excused.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.eval_frame import _TorchDynamoContext, skip_code

import frame_swap
from frame_swap import State, backend
from frame_swap.checking.arguments import Uncopyable
from frame_swap.checking.comparison import Comparison, RandomState, copy_of_graph, difference_in_layout, distance
from frame_swap.internals import dynamo, eval_frame, inductor
from frame_swap.serving.eager import EagerCode, eager_code
from frame_swap.serving.trampoline import Trampoline

mismatches: list[str] = []
"""What was found wrong since it was last cleared; the call goes on, so that a test cannot swallow it."""

counts: Counter[str] = Counter()
"""How many calls were compared, or why they were not."""

Call = Callable[..., Any]


class _Again(BaseException):
    """Compiled code is in: the call is to start over. Not an `Exception`, which a program might catch."""


@contextlib.contextmanager
def made_twice() -> Iterator[None]:
    """Within the block, calls of graphs captured with `when="manual"` are made twice and compared."""
    wrap = _TorchDynamoContext.__call__

    def keep_graph(gm: torch.fx.GraphModule, *rest: Any, **keywords: Any) -> EagerCode:
        graph = copy_of_graph(gm)
        code = eager_code(gm, *rest, **keywords)

        def call(*args: Any) -> Any:
            return code.call(*args)

        call.graph = graph  # type: ignore[attr-defined]
        return code._replace(call=call)

    def wrap_to_start_over(context: Any, target: Any) -> Any:
        wrapped = wrap(context, target)
        return _starting_over(wrapped) if isinstance(wrapped, FunctionType) else wrapped

    with (
        mock.patch.object(backend, "eager_code", keep_graph),
        mock.patch.object(_TorchDynamoContext, "__call__", wrap_to_start_over),
        mock.patch.object(Trampoline, "__call__", _call_twice),
    ):
        yield


class StrictComparison(Comparison):
    """Values are to be as close as PyTorch's own tests want them, and strides equal."""

    def difference(self, compiled: Call) -> str:
        difference = super().difference(compiled)
        # Inductor may return an argument itself for `x + 0`, with frame_swap or without: not an error, but counted.
        counts["with an output that shares an argument's memory on one side only"] += (
            self.actual.shared != self.expected.shared
        )
        counts[f"whose values are excused: {self.incomparable}"] += bool(self.incomparable)
        return difference

    def _difference_in_layout(self, name: str, have: Any, want: Any) -> str:
        return difference_in_layout(have, want, strides=not name.startswith("gradient"))

    def _difference_in_values(self, actual: dict[str, Any]) -> str:
        differing = [name for name, want in self.expected.values.items() if not _close(actual[name], want)]
        return self._beyond_reference(differing, actual) if differing else ""

    def _beyond_reference(self, differing: list[str], actual: dict[str, Any]) -> str:
        """Whether compiled code is further off what double precision gives than rounding explains."""
        reference = {} if self.random else self.in_double()
        for name in differing:
            have, want, right = actual[name], self.expected.values[name], reference.get(name)
            if not isinstance(want, Tensor):
                return f"{name}: {have!r}, eager code's {want!r}"
            if not isinstance(right, Tensor) or right.shape != want.shape:
                return f"{name}: value off eager code's by {distance(have, want):.3g}, and there is no reference"
            of_compiled, of_pair = distance(have, right), distance(want, right)
            if not of_compiled <= 4 * of_pair + _tolerance(want.dtype, right):
                return f"{name}: value off double precision by {of_compiled:.3g}, eager code's by {of_pair:.3g}"
        counts["judged by double precision"] += 1
        return ""


def _call_twice(trampoline: Trampoline, *args: Any) -> Any:
    """What `Trampoline.__call__` becomes."""
    compiled = trampoline.compiled_for(args)
    if compiled is not None:
        return compiled(*args)
    region = trampoline._record
    region.eager_calls += 1
    if trampoline.specialiser is not None:
        trampoline.specialiser.ask(args)
    if dynamo.compile_lock._is_owned():  # type: ignore[attr-defined]  # what loads compiled code needs the lock that this thread holds
        counts["not compared: called while Dynamo compiles"] += 1
        return trampoline.eager(*args)
    comparison = None
    try:
        if eval_frame.watched_by_mode():
            raise Uncopyable("a dispatch mode is active")
        same_numbers = inductor.inductor_config.fallback_random
        graph = getattr(trampoline.eager, "graph", None)
        comparison = StrictComparison(trampoline.eager, args, graph, same_numbers=same_numbers)
    except Uncopyable as error:
        counts[f"not compared: {error}"] += 1
    frame_swap.wait()
    trampoline.install()
    compiled = trampoline.compiled_for(args)
    if compiled is None:
        if comparison is not None:
            counts[f"not compared: {region.state}"] += 1
        return trampoline.eager(*args)
    if comparison is not None:
        counts["compared"] += 1
        counts["with random numbers"] += comparison.random
        if difference := comparison.difference(compiled):
            mismatches.append(f"graph {region.compile_id} of {region.frame}: {difference}")
    if region.state is State.INSTALLED and not region.reason and _first_of_its_call():
        counts["started over in the rewritten frame"] += 1
        raise _Again
    return compiled(*args)


def _first_of_its_call() -> bool:
    """Whether the frame that calls the trampoline is the one that `torch.compile`'s wrapper entered: Dynamo's code
    calls one graph each, before anything else, and what follows a graph break is in frames of its own."""
    entered_by = sys._getframe(3).f_code  # this function, `_call_twice`, Dynamo's code, its caller
    return entered_by.co_name == "compile_wrapper"


def _starting_over(wrapped: FunctionType) -> Call:
    @functools.wraps(wrapped)
    def call_until_swapped(*args: Any, **kwargs: Any) -> Any:
        state = RandomState()
        while True:
            try:
                return wrapped(*args, **kwargs)
            except _Again:
                state.restore()

    skip_code(call_until_swapped.__code__)  # type: ignore[attr-defined]
    return call_until_swapped


def _close(have: Any, want: Any) -> bool:
    if not isinstance(want, Tensor):
        return bool(have == want) or (have != have and want != want)
    try:
        torch.testing.assert_close(have, want, equal_nan=True)
    except AssertionError:
        return False
    return True


def _tolerance(dtype: torch.dtype, right: Tensor) -> float:
    """What `assert_close` grants the largest element."""
    relative, absolute = torch.testing._comparison.default_tolerances(dtype)
    finite = right.abs()[right.isfinite()]
    return absolute + relative * (float(finite.max()) if finite.numel() else 0.0)
