"""Each compiled call made twice: on the eager pair, and after the swap on equal arguments and random state.

With `when="manual"` every call of a graph first meets its trampoline, and all that a graph reads is in its
arguments and the generators. So the trampoline's call becomes:

1. the pair runs on a copy of the arguments, and then its backward, with a gradient for each output that differs
   from element to element;
2. the compile is waited for and installed: the frame is rewritten;
3. the compiled code runs on another copy, from the same random state, and then its backward;
4. outputs, gradients and arguments of both are compared: values, shapes, strides, dtypes, `requires_grad`;
5. the call itself starts over, through the rewritten frame, where this graph was the first thing that it ran.
   Elsewhere, where something would be done twice, compiled code serves it here.

Values are close where `torch.testing.assert_close` says so with its defaults for the dtype, as PyTorch's own tests
do. Where they are not, Dynamo's graph runs once more, op by op in double precision, and compiled code may be off
that by four times what the pair is off, and by the dtype's tolerance of the largest value. Values of graphs that
draw random numbers are compared only with `fallback_random`, since Inductor's own differ from eager's; those of a
graph that hands out uninitialised memory are excused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
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
from frame_swap import State, backend, internals
from frame_swap.pair import trace_pair
from frame_swap.region import Trampoline

from .arguments import Arguments, Uncopyable, wider

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

    def trace_and_keep_graph(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Call:
        graph = torch.fx.Graph(tracer_cls=gm.graph._tracer_cls)
        graph.output(graph.graph_copy(gm.graph, {}))
        pair = trace_pair(gm, example_inputs)
        pair.graph = torch.fx.GraphModule(gm, graph)  # type: ignore[attr-defined]
        return pair

    def wrap_to_start_over(context: Any, target: Any) -> Any:
        wrapped = wrap(context, target)
        return _starting_over(wrapped) if isinstance(wrapped, FunctionType) else wrapped

    with (
        mock.patch.object(backend, "trace_pair", trace_and_keep_graph),
        mock.patch.object(_TorchDynamoContext, "__call__", wrap_to_start_over),
        mock.patch.object(Trampoline, "__call__", _call_twice),
    ):
        yield


@dataclasses.dataclass
class Observation:
    """All that can be seen of one call.

    Attributes:
        error: what it raised, in which case there is nothing else.
        values: outputs, arguments after the call and gradients, by what they are.
        differentiable: which of the outputs require a gradient.
        shared: for each output, the first argument whose memory it shares, or -1.
    """

    error: str
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    differentiable: list[str] = dataclasses.field(default_factory=list)
    shared: dict[str, int] = dataclasses.field(default_factory=dict)


class Comparison:
    """The pair's call, against which compiled code's is held.

    Args:
        pair: runs at once, on a copy of the arguments.
        arguments: what the graph is called with; not touched.
        graph: Dynamo's, the reference where values differ.

    Attributes:
        random: whether the pair has drawn random numbers.

    Raises:
        Uncopyable: there is no telling.
    """

    def __init__(self, pair: Call, arguments: tuple[Any, ...], graph: Call | None = None) -> None:
        self._arguments = arguments
        self._graph = graph
        self._state = RandomState()
        self._expected = observe(pair, Arguments(arguments))
        self.random = self._state.differs() or any(isinstance(x, torch.Generator) for x in arguments)
        self._state.restore()

    def difference(self, compiled: Call) -> str:
        """What compiled code does otherwise; "" where nothing. The random state is left as it was found."""
        actual = observe(compiled, Arguments(self._arguments))
        # Inductor may return an argument itself for `x + 0`, with frame_swap or without: not an error, but counted.
        counts["with an output that shares an argument's memory on one side only"] += (
            actual.shared != self._expected.shared
        )
        self._state.restore()
        try:
            return self._difference(actual)
        finally:
            self._state.restore()

    def _difference(self, actual: Observation) -> str:
        expected = self._expected
        if expected.error or actual.error:
            if expected.error and actual.error:
                return ""
            return f"compiled code raises {actual.error or 'nothing'}, the pair {expected.error or 'nothing'}"
        if expected.values.keys() != actual.values.keys():
            return f"compiled code gives {', '.join(actual.values)}; the pair {', '.join(expected.values)}"
        for name, want in expected.values.items():
            if why := _difference_in_layout(actual.values[name], want, strides=not name.startswith("gradient")):
                return f"{name}: {why}"
        if actual.differentiable != expected.differentiable:
            return f"outputs that require a gradient: {actual.differentiable}, the pair's {expected.differentiable}"
        if self.random and not internals.inductor_config.fallback_random:
            return ""
        differing = [name for name, want in expected.values.items() if not _close(actual.values[name], want)]
        return self._beyond_reference(differing, actual.values) if differing else ""

    def _beyond_reference(self, differing: list[str], actual: dict[str, Any]) -> str:
        """Whether compiled code is further off what double precision gives than rounding explains."""
        if self._graph is not None and _hands_out_uninitialised(self._graph):
            counts["whose values are excused: uninitialised memory"] += 1
            return ""
        reference = self._in_double()
        for name in differing:
            have, want, right = actual[name], self._expected.values[name], reference.get(name)
            if not isinstance(want, Tensor):
                return f"{name}: {have!r}, the pair's {want!r}"
            if not isinstance(right, Tensor) or right.shape != want.shape:
                return f"{name}: value off the pair's by {_distance(have, want):.3g}, and there is no reference"
            of_compiled, of_pair = _distance(have, right), _distance(want, right)
            if not of_compiled <= 4 * of_pair + _tolerance(want.dtype, right):
                return f"{name}: value off double precision by {of_compiled:.3g}, the pair's by {of_pair:.3g}"
        counts["judged by double precision"] += 1
        return ""

    def _in_double(self) -> dict[str, Any]:
        if self._graph is None or self.random:
            return {}
        return observe(self._graph, Arguments(self._arguments, double=True)).values


def observe(call: Call, arguments: Arguments) -> Observation:
    """Call, run the backward of everything that has one then, and note what came of it."""
    try:
        outputs = call(*arguments.values)
        outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        seen = {f"output {at}": value for at, value in enumerate(outputs)}
        seen |= {f"argument {at}": value for at, value in enumerate(arguments.values)}
        values = {name: v.detach() if isinstance(v, Tensor) else v for name, v in seen.items()}
        differentiable = [name for name, v in seen.items() if isinstance(v, Tensor) and v.requires_grad]
        shared = {f"output {at}": _sharing(value, arguments.values) for at, value in enumerate(outputs)}
        ends = {id(v): v for v in seen.values() if isinstance(v, Tensor) and v.grad_fn is not None}.values()
        if ends:
            torch.autograd.backward(list(ends), [_uneven(end) for end in ends])
    except Exception as error:
        return Observation(f"{type(error).__name__}: {error}".partition("\n")[0])
    values |= {f"gradient {at}": leaf.grad for at, leaf in enumerate(arguments.leaves)}
    return Observation("", values, differentiable, shared)


class RandomState:
    """The state of every random number generator that a program might use, as it is now."""

    def __init__(self) -> None:
        with torch.utils._python_dispatch._disable_current_modes():
            self._cpu = torch.get_rng_state()
            self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self._python = random.getstate()

    def restore(self) -> None:
        """Go back to it."""
        with torch.utils._python_dispatch._disable_current_modes():
            torch.set_rng_state(self._cpu)
            if self._cuda:
                torch.cuda.set_rng_state_all(self._cuda)
        random.setstate(self._python)

    def differs(self) -> bool:
        """Whether PyTorch's generators have moved on since."""
        now = RandomState()
        pairs = zip([self._cpu, *self._cuda], [now._cpu, *now._cuda], strict=True)
        return not all(torch.equal(before, after) for before, after in pairs)


def _call_twice(trampoline: Trampoline, *args: Any) -> Any:
    """What `Trampoline.__call__` becomes."""
    compiled = trampoline.compiled_for(args)
    if compiled is not None:
        return compiled(*args)
    region = trampoline._region
    region.pair_calls += 1
    if trampoline.specialiser is not None:
        trampoline.specialiser.ask(args)
    if internals.compile_lock._is_owned():  # type: ignore[attr-defined]  # what loads compiled code needs the lock that this thread holds
        counts["not compared: called while Dynamo compiles"] += 1
        return trampoline.pair(*args)
    comparison = None
    try:
        if torch._C._len_torch_dispatch_stack():
            raise Uncopyable("a dispatch mode is active")
        comparison = Comparison(trampoline.pair, args, getattr(trampoline.pair, "graph", None))
    except Uncopyable as error:
        counts[f"not compared: {error}"] += 1
    frame_swap.wait()
    trampoline.install()
    compiled = trampoline.compiled_for(args)
    if compiled is None:
        if comparison is not None:
            counts[f"not compared: {region.state}"] += 1
        return trampoline.pair(*args)
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


def _difference_in_layout(have: Any, want: Any, *, strides: bool) -> str:
    if not isinstance(want, Tensor):
        return "" if type(have) is type(want) else f"a {type(have).__name__}, the pair's a {type(want).__name__}"
    if not isinstance(have, Tensor):
        return f"a {type(have).__name__}, the pair's a tensor"
    for what in ("dtype", "shape", "device", "layout"):
        if getattr(have, what) != getattr(want, what):
            return f"{what} {getattr(have, what)}, the pair's {getattr(want, what)}"
    if strides and want.layout is torch.strided and _significant_strides(have) != _significant_strides(want):
        return f"stride {have.stride()}, the pair's {want.stride()} (shape {tuple(want.shape)})"
    return ""


def _significant_strides(tensor: Tensor) -> list[int]:
    """Without those of dimensions of size 1, and none where there are no elements: these say nothing."""
    sizes_and_strides = zip(tensor.shape, tensor.stride(), strict=True)
    return [stride for size, stride in sizes_and_strides if size > 1] if tensor.numel() else []


def _close(have: Any, want: Any) -> bool:
    if not isinstance(want, Tensor):
        return bool(have == want) or (have != have and want != want)
    try:
        torch.testing.assert_close(have, want, equal_nan=True)
    except AssertionError:
        return False
    return True


def _distance(have: Tensor, want: Tensor) -> float:
    """The largest difference between two elements."""
    if not want.numel():
        return 0.0
    wide = wider(want.dtype)
    if not (wide.is_floating_point or wide.is_complex):
        wide = torch.float64
    have, want = have.to(wide), want.to(wide)
    same = (have == want) | (have.isnan() & want.isnan())
    return float(torch.where(same, 0.0, (have - want).abs()).nan_to_num(nan=torch.inf).max())


def _tolerance(dtype: torch.dtype, right: Tensor) -> float:
    """What `assert_close` grants the largest element."""
    relative, absolute = torch.testing._comparison.default_tolerances(dtype)
    finite = right.abs()[right.isfinite()]
    return absolute + relative * (float(finite.max()) if finite.numel() else 0.0)


def _hands_out_uninitialised(graph: Call) -> bool:
    modules = graph.modules() if isinstance(graph, torch.nn.Module) else ()
    targets = (str(n.target) for m in modules if isinstance(m, torch.fx.GraphModule) for n in m.graph.nodes)
    return any("empty" in target or "resize" in target for target in targets)


def _sharing(output: Any, arguments: list[Any]) -> int:
    """The first argument whose memory an output shares; -1 for none."""
    memory = _memory(output)
    shared = (at for at, value in enumerate(arguments) if memory is not None and _memory(value) == memory)
    return next(shared, -1)


def _memory(value: Any) -> int | None:
    if not isinstance(value, Tensor) or value.layout is not torch.strided or not value.numel():
        return None
    with contextlib.suppress(RuntimeError, NotImplementedError):  # a subclass that has none
        return value.untyped_storage().data_ptr()
    return None


def _uneven(end: Tensor) -> Tensor:
    """A gradient that differs from element to element, so that mixed-up elements show."""
    weights = torch.linspace(0.5, 1.5, end.numel(), device=end.device)
    return weights.to(end.dtype).reshape(end.shape)
