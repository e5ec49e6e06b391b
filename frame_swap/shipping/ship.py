"""Graph to bytes, and back in a worker.

Dynamo's graph travels, not AOTAutograd's: the worker then does all that Inductor does, with Inductor's own
decompositions and partitioner. What only this process could mean (stack traces, sources, real tensors) stays.
"""

from __future__ import annotations

import dataclasses
import functools
import pickle
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import sympy
import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Graph, GraphModule

from ..errors import Unshippable, first_line
from ..internals import aot, dispatcher, eager, fake_tensors, inductor
from . import operators, triton_kernels
from .operators import Definitions
from .process_state import ProcessState
from .triton_kernels import Kernels

__all__ = ["Opened", "Parcel", "Unshippable", "has_effects", "open_parcel", "pack", "unpack_graph"]


_TARGET = "frame_swap_target"
"""Where a node keeps its target when that is an object: the graph's own pickler knows targets by name only."""


class Parcel(NamedTuple):
    """A graph packed for a worker, and the process state that travels with it."""

    data: bytes
    state: ProcessState


class Opened(NamedTuple):
    """The outer layer of a parcel: state and definitions must be in force before the graph is unpickled."""

    graph: bytes
    state: ProcessState
    options: dict[str, Any]
    compile_id: str | None
    definitions: Definitions | None
    kernels: Kernels | None


def pack(
    gm: GraphModule, example_inputs: list[Any], options: dict[str, Any], compile_id: str | None = None
) -> Parcel:
    """Serialise what a worker needs to compile `gm`. Leaves `gm` as it is.

    Raises:
        Unshippable: with the reason.
    """
    if aot.saving_is_traced():
        raise Unshippable("hooks on saved tensors that are graphs themselves become a part of it")
    try:
        custom = _check_graph(gm)
        inputs = [_fake_input(x) for x in example_inputs]
        state = ProcessState.capture({x.device.type for x in inputs if isinstance(x, torch.Tensor)})
        _check_options(state.configs | {"options": options})
        definitions = operators.definitions(custom) if custom else None
        kernels = triton_kernels.kernels_of(gm)
        with_lines = state.audience.reads_code or inductor.asks_for_cudagraphs(options)
        bare = _bare(gm, inputs, with_lines=with_lines)
        graph = _pickler().dumps((bare, inputs), fake_tensors.GraphPicklerOptions(ops_filter=None))
        return Parcel(pickle.dumps(Opened(graph, state, options, compile_id, definitions, kernels)), state)
    except Unshippable:
        raise
    except Exception as error:
        raise Unshippable(f"the graph cannot be pickled: {first_line(error)}") from error


def open_parcel(parcel: bytes) -> Opened:
    """What is in a parcel."""
    opened: Opened = pickle.loads(parcel)
    return opened


def unpack_graph(graph: bytes, sizes: Mapping[str, int]) -> tuple[GraphModule, list[Any], Any]:
    """The graph, its fake inputs and their FakeTensorMode, whose ShapeEnv is a copy of the frame's.

    Args:
        sizes: by the names of their symbols, where they are to differ from what the frame was traced with.
    """
    mode = fake_tensors.FakeTensorMode(shape_env=_shape_env(sizes))
    opened: Any = fake_tensors.GraphPickler.loads(graph, mode)
    gm, inputs = opened
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            node.target = node.meta.pop(_TARGET, node.target)
    gm.recompile()
    # Without these marks AOTAutograd takes the graph for a stranger's and forgets which inputs are static.
    gm.meta["dynamo_compile_id"] = None
    gm._param_name_to_source = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        node._dynamo_source = None
    return gm, inputs, mode


def _shape_env(sizes: Mapping[str, int]) -> Any:
    class ShapeEnv(fake_tensors.ShapeEnv):
        """Unpickling a graph fills its attributes in: this one is where hints come from."""

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "backed_var_to_val":
                others = {symbol: sympy.Integer(sizes[symbol.name]) for symbol in value if symbol.name in sizes}
                value = {**value, **others}
            super().__setattr__(name, value)

    return ShapeEnv()


def _with_item(unpickle: Callable[..., Any], arguments: tuple[Any, ...], item: Any) -> Any:
    """Unpickle a fake scalar, such as a float that Dynamo made an input of, and the number that it stands for."""
    scalar = unpickle(*arguments)
    scalar.item_memo = item
    return scalar


def _symbolic_number(kind: type, expr: sympy.Expr, shape_env: Any, pytype: type) -> Any:
    """Unpickle a SymInt, or its like; its hint is the one that `shape_env` has."""
    return kind(fake_tensors.SymNode(expr, shape_env, pytype, None))


def _check_graph(gm: GraphModule) -> list[OpOverload]:
    """Refuse what no worker can be given; return the custom operators, which it has to be given."""
    custom: dict[OpOverload, None] = {}
    for module in gm.modules():
        if not isinstance(module, GraphModule):
            continue  # a container of graphs; one that is called is refused below
        if _has_tensors(module):
            raise Unshippable("the graph holds parameters or buffers instead of taking them as inputs")
        for node in module.graph.nodes:
            if node.op == "get_attr" and isinstance(_attribute(module, node.target), torch.Tensor):
                raise Unshippable(f"the graph holds a tensor of its own: {node.target}")
            if node.op == "call_module" and not isinstance(module.get_submodule(node.target), GraphModule):
                raise Unshippable(f"the graph calls a module: {node.target}")
            if isinstance(node.target, (OpOverload, OpOverloadPacket)):
                if str(node.target).partition(".")[0] in _COLLECTIVE:
                    raise Unshippable(f"the graph calls {node.target}, and a worker is in no process group")
                if operators.is_custom(node.target):
                    custom.update(dict.fromkeys(operators.overloads(node.target)))
    return list(custom)


_COLLECTIVE = ("_c10d_functional", "_c10d_functional_autograd", "c10d", "symm_mem")
"""Namespaces of operators that communicate with other processes of the program."""


def has_effects(gm: GraphModule) -> bool:
    """Whether a call of the graph does more than compute outputs and change inputs, in an order that is kept."""
    modules = (module for module in gm.modules() if isinstance(module, GraphModule))
    return any(dispatcher.has_effects(node.target) for module in modules for node in module.graph.nodes)


def _has_tensors(module: torch.nn.Module) -> bool:
    return any(t is not None for t in (*module._parameters.values(), *module._buffers.values()))


def _attribute(module: torch.nn.Module, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _check_options(changes: dict[str, dict[str, Any]]) -> None:
    for config, settings in changes.items():
        if config in ("inductor", "options") and settings.get("freezing"):
            raise Unshippable("freezing bakes the parameters' values into the code")
        for name, value in settings.items():
            try:
                pickle.dumps(value)
            except Exception as error:
                raise Unshippable(f"{config} config {name} cannot be pickled: {first_line(error)}") from error


def _fake_input(value: Any) -> Any:
    """The fake tensor that AOTAutograd will make of this input: its fake mode's memo gives both the same.

    Dynamo's own `example_value`s will not do: tracing may have changed their metadata (`x.t_()`).
    """
    if isinstance(value, (int, float, bool, torch.SymInt)):
        return value
    if not isinstance(value, torch.Tensor):
        raise Unshippable(f"an input is a {type(value).__name__}")
    if value.layout is not torch.strided:
        raise Unshippable(f"an input has layout {value.layout}")
    if eager.is_traceable_wrapper_subclass(value):
        _check_subclass(type(value))
    tracing = fake_tensors.TracingContext.try_get()
    mode = (tracing and tracing.fake_mode) or fake_tensors.detect_fake_mode([value])
    if fake_tensors.is_fake(value):
        return value
    if mode is None or tracing is None:
        raise Unshippable("called outside of Dynamo with real inputs")
    context: Any = tracing.tensor_to_context.get(value)  # type: ignore[no-untyped-call]
    return mode.from_tensor(
        value, symbolic_context=context, source=context.tensor_source if context else None, trace=False
    )


def _check_subclass(cls: type) -> None:
    name = f"{cls.__module__}.{cls.__qualname__}"
    if cls.__module__.startswith("torch.distributed."):
        raise Unshippable(f"an input is a {name}, whose process group a worker is not part of")
    found: Any = sys.modules.get(cls.__module__) if cls.__module__ != "__main__" else None
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    if found is not cls:
        raise Unshippable(f"an input is a tensor subclass that a worker cannot import: {name}")


def _bare(gm: GraphModule, inputs: Iterable[Any] | None = None, *, with_lines: bool) -> GraphModule:
    """A copy of `gm` without what only this process could mean; the same for the graphs inside it.

    Args:
        with_lines: keep the program's lines, which generated code has in comments, and which CUDA graphs name
            where an output is read that a later call has overwritten. They take more than the rest.
    """
    graph = Graph(tracer_cls=getattr(gm.graph, "_tracer_cls", None))
    nodes: dict[torch.fx.Node, torch.fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, nodes))
    values = iter(inputs or ())
    for old, new in nodes.items():
        new.meta = {"stack_trace": old.stack_trace} if with_lines and old.stack_trace else {}
        if type(old.target).__module__ == "torch._dynamo.utils":  # an object around a function or method of NumPy's
            new.meta[_TARGET], new.target = old.target, torch.add
        if old.op == "placeholder" and inputs is not None:
            new.meta["example_value"] = next(values)
            kind = old.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
            if kind is not None:
                new.meta["tensor_dict"] = {"_dynamo_static_input_type": kind}
    bare = GraphModule(gm, graph)
    for name, child in bare.named_children():
        if isinstance(child, GraphModule):
            setattr(bare, name, _bare(child, with_lines=with_lines))
    return bare


@functools.cache
def _pickler() -> Any:
    class Pickler(fake_tensors.GraphPickler):
        """`GraphPickler`, for every fake tensor and every symbolic number.

        It forgets that a view's base and a parameter's `.grad` carry the FakeTensorMode too, which does not
        pickle. Unpickling gives the base its new mode; nothing reads the grad. And it sends hints along, which
        would be wrong where the graph is compiled for other sizes. A tensor subclass is its parts and their
        context.
        """

        def reducer_override(self, obj: object) -> Any:
            if isinstance(obj, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                node = obj.node
                return _symbolic_number, (type(obj), node._expr, node.shape_env, node.pytype)
            if isinstance(obj, torch.Tensor) and eager.is_traceable_wrapper_subclass(obj):
                names, context = obj.__tensor_flatten__()
                parts = {name: getattr(obj, name) for name in names}
                return _join, (type(obj), parts, context, obj.shape, obj.stride(), obj.requires_grad)
            reduced: tuple[Callable[..., Any], tuple[Any, ...]] = super().reducer_override(obj)
            if isinstance(obj, fake_tensors.FakeTensor):
                described = reduced[1][0]
                base = described.metadata.base
                described.metadata = dataclasses.replace(
                    described.metadata,
                    base=base and dataclasses.replace(base, fake_mode=None, grad=None),
                    grad=None,
                )
                if obj.item_memo is not None:
                    return _with_item, (*reduced, obj.item_memo)
            return reduced

    return Pickler


def _join(
    cls: Any, parts: dict[str, torch.Tensor], context: Any, size: Any, stride: Any, requires_grad: bool
) -> torch.Tensor:
    joined: torch.Tensor = cls.__tensor_unflatten__(parts, context, size, stride)
    return joined.requires_grad_(requires_grad)
