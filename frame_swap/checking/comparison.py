"""Make one call twice, with eager code and with compiled code; compare outputs, gradients and changed arguments.

Both sides run forward and backward on copies of the arguments, from the same random state. Two values are equal
if PyTorch's accuracy checks take them for equal (`torch._dynamo.utils.same`): they are close, or the error of
compiled code is hardly larger than that of eager code. Dynamo's graph, run op by op in double precision, gives the
correct values for this.

In two cases only types and shapes are compared, since values differ from run to run: the graph draws random numbers
and compiled code draws others, or values differ and the graph makes uninitialised memory. A graph draws random
numbers if eager code's run changed the state of a generator.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..internals import dynamo, eager
from .arguments import Arguments, wider

Call = Callable[..., Any]


@dataclasses.dataclass
class Observation:
    """The visible results of one call.

    Attributes:
        error: the exception that the call raised, as text; the other attributes are empty then. Else "".
        values: outputs, arguments after the call, and gradients, as "output 0", "argument 0", "gradient 0".
        differentiable: keys of the outputs and arguments that require a gradient.
        shared: by output, the index of the first argument whose memory it shares, or -1.
    """

    error: str
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    differentiable: list[str] = dataclasses.field(default_factory=list)
    shared: dict[str, int] = dataclasses.field(default_factory=dict)


class Comparison:
    """Eager code's results for one call, to compare those of compiled code with.

    Args:
        eager_code: called at once, on a copy of the arguments.
        arguments: the arguments of the call; not changed.
        graph: Dynamo's graph, which gives the correct values if the two sides differ.
        same_numbers: whether compiled code draws the same random numbers as eager code.

    Attributes:
        expected, actual: the results of eager code, and of compiled code.
        random: whether eager code has drawn random numbers.
        incomparable: why values are not compared; "" if they are.

    Raises:
        Uncopyable: the arguments cannot be copied, so nothing can be compared.
        torch.OutOfMemoryError: there is no memory for it; `difference` may raise it, too.
    """

    def __init__(
        self,
        eager_code: Call,
        arguments: tuple[Any, ...],
        graph: Call | None = None,
        *,
        same_numbers: bool = False,
    ) -> None:
        self._arguments = arguments
        self._graph = graph
        self._state = RandomState()
        self.expected = observe(eager_code, Arguments(arguments))
        self.random = self._state.differs() or any(isinstance(x, torch.Generator) for x in arguments)
        self._state.restore()
        self.actual = self.expected
        self.incomparable = ""
        if self.random and not same_numbers:
            self.incomparable = "it draws random numbers, and compiled code draws others"

    def difference(self, compiled: Call) -> str:
        """The first difference of compiled code from eager code; "" if there is none. Restores the random state."""
        self.actual = observe(compiled, Arguments(self._arguments))
        self._state.restore()
        try:
            return self._difference(self.actual)
        finally:
            self._state.restore()

    def _difference(self, actual: Observation) -> str:
        expected = self.expected
        if expected.error or actual.error:
            if expected.error and actual.error:
                return ""
            return f"compiled code raises {actual.error or 'nothing'}, eager code {expected.error or 'nothing'}"
        if expected.values.keys() != actual.values.keys():
            return f"compiled code gives {', '.join(actual.values)}; eager code {', '.join(expected.values)}"
        for name, want in expected.values.items():
            if why := self._difference_in_layout(name, actual.values[name], want):
                return f"{name}: {why}"
        if actual.differentiable != expected.differentiable:
            have, want = actual.differentiable, expected.differentiable
            return f"outputs that require a gradient: {have}, eager code's {want}"
        if self.incomparable:
            return ""
        difference = self._difference_in_values(actual.values)
        if difference and isinstance(self._graph, torch.nn.Module) and makes_uninitialised(self._graph):
            self.incomparable = "it hands out uninitialised memory"
            return ""
        return difference

    def _difference_in_layout(self, name: str, have: Any, want: Any) -> str:
        """Strides are not compared: Inductor pads some outputs, also without frame-swap."""
        return difference_in_layout(have, want, strides=False)

    def _difference_in_values(self, actual: dict[str, Any]) -> str:
        reference: dict[str, Any] | None = None
        for name, want in self.expected.values.items():
            have = actual[name]
            if _same(want, have, None):
                continue
            if reference is None:
                reference = self.in_double()
            right = reference.get(name)
            if not isinstance(right, Tensor) or not isinstance(want, Tensor) or right.shape != want.shape:
                return f"{name}: {_how_far(have, want)}"
            if not _same(want, have, right):
                return f"{name}: {_how_far(have, want)}, which is {distance(want, right):.3g} off double precision"
        return ""

    def in_double(self) -> dict[str, Any]:
        """The results of Dynamo's graph in double precision; empty if it cannot run so."""
        if self._graph is None:
            return {}
        graph = self._graph
        if isinstance(graph, torch.fx.GraphModule):
            graph = eager.in_double(graph)
        try:
            return observe(graph, Arguments(self._arguments, double=True)).values
        finally:
            self._state.restore()


def _same(want: Any, have: Any, right: Tensor | None) -> bool:
    return eager.same(
        want,
        have,
        right,
        tol=eager.accuracy_tolerance(),
        equal_nan=True,
        log_error=lambda *_: None,  # the report has it
    )


def _how_far(have: Any, want: Any) -> str:
    if not isinstance(want, Tensor):
        return f"{have!r}, eager code's {want!r}"
    return f"up to {distance(have, want):.3g} off eager code's"


def observe(call: Call, arguments: Arguments) -> Observation:
    """Call, then run the backward of all results that have one; return what is visible of both."""
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
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return Observation(f"{type(error).__name__}: {error}".partition("\n")[0])
    values |= {f"gradient {at}": leaf.grad for at, leaf in enumerate(arguments.leaves)}
    return Observation("", values, differentiable, shared)


class RandomState:
    """The present state of PyTorch's and Python's random number generators."""

    def __init__(self) -> None:
        with eager.disable_current_modes():
            self._cpu = torch.get_rng_state()
            self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self._python = random.getstate()

    def restore(self) -> None:
        """Set the generators to this state."""
        with eager.disable_current_modes():
            torch.set_rng_state(self._cpu)
            if self._cuda:
                torch.cuda.set_rng_state_all(self._cuda)
        random.setstate(self._python)

    def differs(self) -> bool:
        """Whether the state of PyTorch's generators has changed since."""
        now = RandomState()
        pairs = zip([self._cpu, *self._cuda], [now._cpu, *now._cuda], strict=True)
        return not all(torch.equal(before, after) for before, after in pairs)


def difference_in_layout(have: Any, want: Any, *, strides: bool) -> str:
    """The first difference other than in values; "" if there is none."""
    if not isinstance(want, Tensor):
        return "" if type(have) is type(want) else f"a {type(have).__name__}, eager code's a {type(want).__name__}"
    if not isinstance(have, Tensor):
        return f"a {type(have).__name__}, eager code's a tensor"
    for what in ("dtype", "shape", "device", "layout"):
        if getattr(have, what) != getattr(want, what):
            return f"{what} {getattr(have, what)}, eager code's {getattr(want, what)}"
    if strides and want.layout is torch.strided and _significant_strides(have) != _significant_strides(want):
        return f"stride {have.stride()}, eager code's {want.stride()} (shape {tuple(want.shape)})"
    return ""


def _significant_strides(tensor: Tensor) -> list[int]:
    """The strides that mean something: of dimensions with several elements, none for an empty tensor."""
    sizes_and_strides = zip(tensor.shape, tensor.stride(), strict=True)
    return [stride for size, stride in sizes_and_strides if size > 1] if tensor.numel() else []


def distance(have: Tensor, want: Tensor) -> float:
    """The largest absolute difference between elements; inf if only one of two is nan."""
    if not want.numel():
        return 0.0
    wide = wider(want.dtype)
    if not (wide.is_floating_point or wide.is_complex):
        wide = torch.float64
    have, want = have.to(wide), want.to(wide)
    same = (have == want) | (have.isnan() & want.isnan())
    return float(torch.where(same, 0.0, (have - want).abs()).nan_to_num(nan=torch.inf).max())


def makes_uninitialised(graph: torch.nn.Module) -> bool:
    """Whether an operator of the graph returns uninitialised memory, even if all of it is written later."""
    targets = (str(n.target) for m in graph.modules() if isinstance(m, torch.fx.GraphModule) for n in m.graph.nodes)
    return any("empty" in target or "resize" in target for target in targets)


def copy_of_graph(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """A copy of `gm`; tracing a pair changes the original."""
    graph = torch.fx.Graph(tracer_cls=dynamo.tracer_class(gm))
    graph.output(graph.graph_copy(gm.graph, {}))
    return torch.fx.GraphModule(gm, graph)


def _sharing(output: Any, arguments: list[Any]) -> int:
    """The index of the first argument whose memory an output shares; -1 for none."""
    memory = _memory(output)
    shared = (at for at, value in enumerate(arguments) if memory is not None and _memory(value) == memory)
    return next(shared, -1)


def _memory(value: Any) -> int | None:
    if not isinstance(value, Tensor) or value.layout is not torch.strided or not value.numel():
        return None
    with contextlib.suppress(RuntimeError, NotImplementedError):  # a subclass without storage
        return value.untyped_storage().data_ptr()
    return None


def _uneven(end: Tensor) -> Tensor:
    """A gradient whose elements all differ, so that permuted elements make a difference."""
    weights = torch.linspace(0.5, 1.5, end.numel(), device=end.device)
    return weights.to(end.dtype).reshape(end.shape)
