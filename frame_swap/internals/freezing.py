"""Freezing: Inductor's code in which the values of parameters are constants, made so that it can be sent.

With stock Inductor, freezing gives a function around a compiled graph, which passes on the inputs that are left.
Some of its constants, which oneDNN and MKL have packed, cannot be copied as bytes. Here the graph itself says which
inputs are left, and packed constants are packed anew where they arrive, by the operators that had packed them.

Functions import Inductor's own names when they are called, as in inductor.py.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import dispatcher
from .dynamo import skip_frames

_POSITIONS = "frame_swap_positions"
"""Of a compiled graph after freezing: which of the inputs are left."""


class Packed(NamedTuple):
    """A constant in a layout that only its operator knows.

    Attributes:
        name: the operator's, "namespace.name", with ".overload" where one was chosen.
        args, kwargs: of the call that made it; may hold such constants themselves.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def made(self) -> Tensor:
        """The constant, made once more."""
        args, kwargs = pytree.tree_map(
            lambda leaf: leaf.made() if isinstance(leaf, Packed) else leaf,
            (self.args, self.kwargs),
            is_leaf=_is_packed,
        )
        made: Tensor = operator.attrgetter(self.name)(torch.ops)(*args, **kwargs)
        return made


def _is_packed(value: Any) -> bool:
    return isinstance(value, Packed)


def taken_constants(entry: Any) -> dict[str, Any]:
    """The constants of AOTAutograd's cache entry that come from freezing; they are no longer in it."""
    graph: Any = getattr(entry.compiled_fw, "result", None)
    if not hasattr(graph, _POSITIONS):
        return {}
    constants, graph.constants = graph.constants, {}
    return dict(constants)


def give_constants(entry: Any, constants: dict[str, Any]) -> None:
    """Before an entry is loaded: put back what `taken_constants` has taken, and have it called with all inputs."""
    graph: Any = getattr(entry.compiled_fw, "result", None)
    if not hasattr(graph, _POSITIONS):
        return
    graph.constants = {
        name: value.made() if isinstance(value, Packed) else value for name, value in constants.items()
    }
    load_code = graph.after_deserialization

    def load_code_for_all_inputs(constants: Any) -> Any:
        path = load_code(constants)
        graph.current_callable = _passing(graph.current_callable, getattr(graph, _POSITIONS))
        del graph.after_deserialization  # it leads back here
        return path

    graph.after_deserialization = load_code_for_all_inputs


def _passing(call: Callable[[list[Any]], Any], positions: Sequence[int]) -> Callable[[list[Any]], Any]:
    def call_with_the_rest(inputs: list[Any]) -> Any:
        rest = [inputs[at] for at in positions]
        inputs.clear()
        return call(rest)

    skip_frames(call_with_the_rest.__code__)
    return call_with_the_rest


class _Calls:
    """The calls that have made packed constants, while a graph's constants are folded."""

    def __init__(self) -> None:
        self._calls: dict[int, tuple[Tensor, Packed]] = {}  # the tensor is kept: no other gets its id

    def described(self, value: Any) -> Any:
        """`value`, or for a packed tensor how it was made.

        Raises:
            RuntimeError: nobody knows.
        """
        if not isinstance(value, Tensor) or value.layout is torch.strided:
            return value
        if id(value) not in self._calls:
            raise RuntimeError(f"freezing made a constant of layout {value.layout}, which cannot be sent")
        return self._calls[id(value)][1]

    def noted_in(self, deduce: Callable[..., Any]) -> Callable[..., Any]:
        """`ConstantFolder._deduce_value`, noted."""

        def deduce_and_note(folder: Any, node: Any) -> Any:
            made = deduce(folder, node)
            packed = isinstance(made, Tensor) and made.layout is not torch.strided
            if packed and isinstance(node.target, (dispatcher.OpOverload, dispatcher.OpOverloadPacket)):
                called_with = folder.fetch_args_kwargs_from_env(node)
                args, kwargs = pytree.tree_map(self.described, called_with)
                self._calls[id(made)] = made, Packed(str(node.target), tuple(args), dict(kwargs))
            return made

        return deduce_and_note


def replacements() -> tuple[tuple[Any, str, Any], ...]:
    """What has to be patched for one compile so that freezing's result can be serialised: owner, name and value."""
    from torch._inductor import compile_fx, constant_folding

    calls = _Calls()
    usual: Callable[..., Any] = compile_fx.fw_compiler_freezing

    def compile_frozen(*args: Any, inner_compile: Callable[..., Any], **keywords: Any) -> Any:
        def compile_inner(gm: Any, *args: Any, **keywords: Any) -> Any:
            graph = inner_compile(gm, *args, **keywords)
            frozen = {name: getattr(gm, attribute) for name, attribute in graph.frozen_param_names.items()}
            graph.constants = {**(graph.constants or {}), **frozen}
            graph.frozen_param_names = {}
            return graph

        return _frozen_graph(usual(*args, inner_compile=compile_inner, **keywords), calls)

    folder = constant_folding.ConstantFolder
    return (
        (compile_fx, "fw_compiler_freezing", compile_frozen),
        (folder, "_deduce_value", calls.noted_in(folder._deduce_value)),
    )


def _frozen_graph(function: Any, calls: _Calls) -> Any:
    """The compiled graph in `function`, which is what stock's freezing gives, made to be serialised."""
    inside = inspect.getclosurevars(function).nonlocals
    graph, offsets, last = inside["optimized_function"], inside["unwrapped_args_offsets"], inside["max_offset_idx"]
    positions = [at - offsets[min(at, last)] for at in inside["preserved_arg_indices"]]
    setattr(graph, _POSITIONS, positions)
    graph.constants = {name: calls.described(value) for name, value in graph.constants.items()}
    graph.inputs_to_check = [positions[at] for at in graph.inputs_to_check]
    graph.mutated_input_idxs = type(graph.mutated_input_idxs)(positions[at] for at in graph.mutated_input_idxs)
    static = {positions[at] for at in graph.fx_kwargs.get("static_input_idxs") or ()}
    unread = set(range(max(positions, default=0))) - set(positions)
    graph.fx_kwargs["static_input_idxs"] = sorted(static | unread)
    return graph
