"""A graph as bytes, and back.

This is Dynamo's graph, not AOTAutograd's: the worker then does all that Inductor does, with Inductor's own
decompositions and partitioner. Stack traces, sources and real tensors have no meaning elsewhere, and stay here.

Guarantees:
- `bare_copy` leaves the graph as it is.
- The bytes are the same for the same graph in each process: they hold no addresses, hints or order of sets.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node

from ..errors import Unshippable
from ..internals import dispatcher, dynamo, eager, fake_tensors
from .checks import check_subclass
from .held import STATIC

_TARGET = "frame_swap_target"
"""Key in a node's metadata for a target that is an object: the graph's own pickler knows targets by name only."""


def pack(bare: GraphModule, inputs: list[Any]) -> bytes:
    """Pickle a graph that `bare_copy` returned, and its inputs as fake tensors."""
    packed: bytes = _pickler().dumps((bare, inputs), fake_tensors.GraphPicklerOptions(ops_filter=None))
    return packed


def unpack(packed: bytes, sizes: Mapping[str, int]) -> tuple[GraphModule, list[Any], Any]:
    """The graph, its fake inputs and their FakeTensorMode, whose ShapeEnv is a copy of the frame's.

    Args:
        sizes: values of symbols, by name, that replace those which the frame was traced with.
    """
    mode = fake_tensors.FakeTensorMode(shape_env=_shape_env(sizes))
    opened: Any = fake_tensors.GraphPickler.loads(packed, mode)
    gm, inputs = opened
    for module in gm.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                node.target = node.meta.pop(_TARGET, node.target)
                fake_tensors.show_slices(node)
            module.recompile()
    dynamo.mark_as_captured(gm)
    return gm, inputs, mode


def is_repeatable(gm: GraphModule) -> bool:
    """Whether a call of the graph may be made again after it raised.

    False where the graph has effects that happen in order, such as printing: a second call would repeat them.
    """
    modules = (module for module in gm.modules() if isinstance(module, GraphModule))
    return all(dispatcher.is_repeatable(node.target) for module in modules for node in module.graph.nodes)


def devices(gm: GraphModule, inputs: Iterable[Any]) -> set[str]:
    """The types of all devices that the graph's inputs and values are on, such as "cuda"."""
    found = list(inputs)
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            value = node.meta.get("example_value")
            found += value if isinstance(value, (tuple, list)) else [value]
    return {value.device.type for value in found if isinstance(value, torch.Tensor)}


def fake_input(value: Any) -> Any:
    """The fake tensor that AOTAutograd will make of this input: the fake mode's memo gives both the same.

    Dynamo's own `example_value`s will not do: tracing may have changed their metadata (`x.t_()`).

    Raises:
        Unshippable: no worker can be given this input.
    """
    if isinstance(value, (int, float, bool, torch.SymInt)):
        return value
    if not isinstance(value, torch.Tensor):
        raise Unshippable(f"an input is a {type(value).__name__}")
    if value.layout is not torch.strided:
        raise Unshippable(f"an input has layout {value.layout}")
    if eager.is_traceable_wrapper_subclass(value):
        check_subclass(type(value))
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


def bare_copy(gm: GraphModule, inputs: Iterable[Any] | None = None, *, with_lines: bool) -> GraphModule:
    """A copy of `gm`, and of the graphs inside it, without what means something in this process only.

    Args:
        inputs: as `fake_input` returns them; None for a graph inside another.
        with_lines: keep the program's lines. Generated code has them in comments, and CUDA graphs name the line
            that reads an output which a later call has overwritten. They take more bytes than the rest.
    """
    graph = Graph(tracer_cls=dynamo.tracer_class(gm))
    nodes: dict[Node, Node] = {}
    graph.output(graph.graph_copy(gm.graph, nodes))
    values = iter(inputs or ())
    for old, new in nodes.items():
        new.meta = {"stack_trace": old.stack_trace} if with_lines and old.stack_trace else {}
        if dynamo.wraps_numpy(old.target):
            new.meta[_TARGET], new.target = old.target, torch.add
        fake_tensors.hide_slices(new)
        if old.op == "placeholder" and inputs is not None:
            new.meta["example_value"] = next(values)
            kind = old.meta.get("tensor_dict", {}).get(STATIC)
            if kind is not None:
                new.meta["tensor_dict"] = {STATIC: kind}
    bare = _NeverCalled(gm, graph)
    for name, child in bare.named_children():
        if isinstance(child, GraphModule):
            setattr(bare, name, bare_copy(child, with_lines=with_lines))
    return bare


class _NeverCalled(GraphModule):
    """A copy to be packed. `unpack` generates its code; to do so here, too, would take half as long as the rest."""

    def recompile(self) -> Any:
        """Generate nothing."""


@functools.cache
def _pickler() -> Any:
    class Pickler(fake_tensors.GraphPickler):
        """`GraphPickler`, for every fake tensor and every symbolic number.

        GraphPickler forgets that a view's base and a parameter's `.grad` carry the FakeTensorMode too, which does
        not pickle. Unpickling gives the base its new mode; nothing reads the grad. GraphPickler also sends hints
        along, which would be wrong where the graph is compiled for other sizes, and an `id()` in the ShapeEnv.
        A tensor subclass is pickled as its parts and their context.
        """

        def reducer_override(self, obj: object) -> Any:
            if isinstance(obj, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                return _symbolic_number, (type(obj), *fake_tensors.described_number(obj))
            if isinstance(obj, torch.Tensor) and eager.is_traceable_wrapper_subclass(obj):
                names, context = obj.__tensor_flatten__()
                parts = {name: getattr(obj, name) for name in names}
                return _join, (type(obj), parts, context, obj.shape, obj.stride(), obj.requires_grad)
            reduced: tuple[Callable[..., Any], tuple[Any, ...]] = super().reducer_override(obj)
            if isinstance(obj, fake_tensors.ShapeEnv):
                fake_tensors.forget_ids(reduced[1][0])
            if isinstance(obj, fake_tensors.FakeTensor):
                described = reduced[1][0]
                base, grad = described.metadata.base, described.metadata.grad
                if base is not None or grad is not None:
                    described.metadata = dataclasses.replace(
                        described.metadata,
                        base=base and dataclasses.replace(base, fake_mode=None, grad=None),
                        grad=None,
                    )
                if obj.item_memo is not None:
                    return _with_item, (*reduced, obj.item_memo)
            return reduced

    return Pickler


def _shape_env(sizes: Mapping[str, int]) -> Any:
    class ShapeEnv(fake_tensors.ShapeEnv):
        """Unpickling a graph fills in the attributes of this one, which gives the hints."""

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
    """Unpickle a SymInt, SymFloat or SymBool; its hint is the one that `shape_env` has."""
    return kind(fake_tensors.SymNode(expr, shape_env, pytype, None))


def _join(
    cls: Any, parts: dict[str, torch.Tensor], context: Any, size: Any, stride: Any, requires_grad: bool
) -> torch.Tensor:
    """Unpickle a tensor subclass."""
    joined: torch.Tensor = cls.__tensor_unflatten__(parts, context, size, stride)
    return joined.requires_grad_(requires_grad)
