"""Fake tensors, symbolic shapes, the pickler for graphs, and the contexts of a compile."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import sympy
import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from .probe import names_looked_up

with names_looked_up():
    from torch._dynamo.source import TensorPropertySource
    from torch._dynamo.symbolic_convert import TensorifyState
    from torch._guards import (
        CompileContext,
        CompileId,
        TracingContext,
        compile_context,
        detect_fake_mode,
        tracing,
    )
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, is_fake, unset_fake_temporarily
    from torch.fx._graph_pickler import GraphPickler
    from torch.fx._graph_pickler import Options as GraphPicklerOptions
    from torch.fx.experimental.sym_node import SymNode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.utils._sympy.symbol import SymT, symbol_is_type
    from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

__all__ = [
    "CompileContext",
    "CompileId",
    "FakeTensor",
    "FakeTensorMode",
    "FrameShapes",
    "GraphPickler",
    "GraphPicklerOptions",
    "ShapeEnv",
    "SymNode",
    "TracingContext",
    "compile_context",
    "constant_floats",
    "described_number",
    "detect_fake_mode",
    "forget_ids",
    "has_symbolic_floats",
    "hide_slices",
    "is_fake",
    "none_made",
    "show_slices",
    "tracing",
    "unset_fake_temporarily",
    "with_constant_floats",
]


@contextlib.contextmanager
def none_made() -> Iterator[None]:
    """Within the block, what makes tensors makes real ones, also while a frame is captured."""
    with unset_fake_temporarily(), tracing(None):
        yield


def has_symbolic_floats() -> bool:
    """Whether the trace under way has symbols for floats; its graph need not use them."""
    return bool(_symbolic_floats())


def constant_floats() -> tuple[str, ...]:
    """The symbols of the trace under way whose floats AOTAutograd has had Dynamo make constant, sorted.

    The graph does not tell: it has these floats no more, while its symbolic shapes still have the symbols.
    """
    return tuple(sorted(name for name in _symbolic_floats() if TensorifyState.should_specialize(name)))


@contextlib.contextmanager
def with_constant_floats(symbols: Iterable[str]) -> Iterator[None]:
    """Within the block, AOTAutograd knows that the floats with these `symbols`, and no others, are constant.

    It asks for a capture to be started over where it finds one that it does not know of.
    """
    known = TensorifyState.force_specializations
    TensorifyState.force_specializations = set(symbols)
    try:
        yield
    finally:
        TensorifyState.force_specializations = known


def _symbolic_floats() -> list[str]:
    """The names of the symbols that the trace under way has for floats."""
    context = TracingContext.try_get()
    env = context.fake_mode.shape_env if context is not None and context.fake_mode is not None else None
    return [] if env is None else [str(s) for s in env.backed_var_to_val if symbol_is_type(s, SymT.FLOAT)]


class FrameShapes:
    """The symbolic shapes of the frame that is being compiled, and what its own guards say of them.

    Args:
        example_inputs: the graph's inputs. Dynamo passes each symbol that the graph needs as an argument.

    Attributes:
        symbols: for each symbol, the index of the argument that holds its value.
    """

    def __init__(self, example_inputs: list[Any]) -> None:
        self.symbols: dict[sympy.Symbol, int] = {}
        self._shape_env: Any = None
        for at, value in enumerate(example_inputs):
            if isinstance(value, torch.SymInt):
                self._shape_env = value.node.shape_env
                if isinstance(value.node.expr, sympy.Symbol):
                    self.symbols.setdefault(value.node.expr, at)

    def guard_on(self, relations: Iterable[sympy.Basic]) -> None:
        """Add `relations` to the frame's own guards, while Dynamo is still tracing the frame.

        Raises:
            ValueError: one does not hold of the call that is traced.
        """
        for relation in relations:
            if not self._shape_env.evaluate_expr(relation):
                raise ValueError(f"{relation} does not hold of this call")

    def sizes(self, args: Sequence[Any]) -> dict[str, int]:
        """The value of each symbol, by name, in a call with the graph's inputs `args`."""
        return {symbol.name: int(args[at]) for symbol, at in self.symbols.items()}

    def implies(self, relation: sympy.Basic) -> bool | None:
        """True if `relation` follows from the frame's own guards, False if they exclude it, None if neither."""
        if self._shape_env is None:
            return None
        try:
            known = self._shape_env._maybe_evaluate_static(relation)
            if known is None:
                values = bound_sympy(relation, self._ranges(relation.free_symbols))
                known = values.lower if values.is_singleton() else None
        except KeyError:  # a function of unknown range
            return None
        return None if known is None else bool(known)

    def _ranges(self, symbols: Iterable[sympy.Symbol]) -> dict[sympy.Symbol, Any]:
        """The range of each symbol. A dimension of a tensor is smaller than `sys.maxsize`.

        Dynamo's own range includes that value, and slices without an end compare sizes with it.
        """
        env = self._shape_env
        ranges = {symbol: env.var_to_range[symbol] for symbol in symbols}
        return {
            symbol: known & ValueRanges(known.lower, sys.maxsize - 1)
            if any(isinstance(source, TensorPropertySource) for source in env.var_to_sources.get(symbol, ()))
            else known
            for symbol, known in ranges.items()
        }


def described_number(number: torch.SymInt | torch.SymFloat | torch.SymBool) -> tuple[sympy.Basic, Any, type]:
    """A symbolic number's expression, its ShapeEnv, and the Python type of its values. Its hint is left out."""
    node = number.node
    return node._expr, node.shape_env, node.pytype


class _Slice(NamedTuple):
    """Stands for a slice, whose ends may be nodes."""

    start: Any
    stop: Any
    step: Any


def hide_slices(node: Node) -> None:
    """Have the arguments of a node hold slices as tuples: GraphPickler looks for nodes there, and not in slices.

    torch 2.13 has it look in slices, too, with a setting of the whole process meanwhile.
    """
    _replace_in_arguments(node, slice, lambda found: _Slice(found.start, found.stop, found.step))


def show_slices(node: Node) -> None:
    """Undo `hide_slices`."""
    _replace_in_arguments(node, _Slice, lambda found: slice(*found))


def _replace_in_arguments(node: Node, kind: type, replacement: Callable[[Any], Any]) -> None:
    called_with = node.args, node.kwargs
    if not _holds(called_with, kind):
        return
    leaves, structure = pytree.tree_flatten(called_with, is_leaf=lambda leaf: isinstance(leaf, kind))
    replaced = (replacement(leaf) if isinstance(leaf, kind) else leaf for leaf in leaves)
    node.args, node.kwargs = pytree.tree_unflatten(replaced, structure)


def _holds(value: Any, kind: type) -> bool:
    """Whether there is a `kind` somewhere in the arguments of a node. Few nodes have a slice."""
    if isinstance(value, dict):
        value = tuple(value.values())
    return isinstance(value, kind) or (
        isinstance(value, (tuple, list)) and any(_holds(inner, kind) for inner in value)
    )


class _Sorted:
    """Pickles as a set, with its items in an order that does not depend on their hashes."""

    def __init__(self, items: set[Any] | frozenset[Any]) -> None:
        self._items = items

    def __reduce__(self) -> tuple[type, tuple[list[Any]]]:
        return type(self._items), (sorted(self._items, key=str),)


def forget_ids(described: Any) -> None:
    """Make GraphPickler's copy of a ShapeEnv the same in each process: without an `id()`, and with sets sorted."""
    described.data["_expr_sym_node_id"] = None
    for name, value in described.data.items():
        if isinstance(value, (set, frozenset)):
            described.data[name] = _Sorted(value)
