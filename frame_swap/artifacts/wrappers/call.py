"""Generate the function that a frame calls: compiled code, with what the graph needs before and after it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from ...codegen.source import Source, compile_function
from ...internals import aot, eager, inductor
from ..compiled import Boxed, Compiled, mark_unrepeatable
from .autograd_function import autograd_function
from .graph import Graph, function_of_inductor, mark_dynamic, only_layout_changes, tuple_of


def compiled(graph: Graph, grad: bool | None) -> Compiled:
    """The graph's compiled code in its generated wrapper.

    Args:
        grad: grad mode at each call; None if it may be either.
    """
    if graph.trains:
        apply, wrappers = autograd_function(graph)
        return _made(graph, _surround(graph, "call(*args)", apply, grad), None, wrappers)
    boxed = function_of_inductor(graph.compiled)
    if grad is False and not _needs_more(graph) and not graph.without_autocast:
        return _made(graph, unboxed(boxed), boxed, graph.wrappers_beneath())
    return _made(graph, _surround(graph, "call(list(args))", boxed, grad), None, graph.wrappers_beneath())


def unboxed(call: Boxed) -> Callable[..., Any]:
    """The same function, taking the graph's inputs one by one."""
    return compile_function("def compiled_graph(*args):\n    return call(list(args))\n", call=call)


def _made(graph: Graph, call: Callable[..., Any], boxed: Boxed | None, wrappers: tuple[str, ...]) -> Compiled:
    return Compiled(call, boxed, wrappers, repeatable=not graph.metadata.mutated_graph_handled_indices)


def _needs_more(graph: Graph) -> bool:
    """Whether the graph's inputs or outputs need any work besides the call."""
    metadata = graph.metadata
    return bool(
        graph.detached
        or graph.counted
        or graph.changed
        or metadata.num_outputs_aliased
        or metadata.dynamic_outputs
        or metadata.grad_enabled_mutation is not None
    )


def _surround(graph: Graph, expression: str, call: Callable[..., Any], grad: bool | None) -> Callable[..., Any]:
    """A function of the graph's inputs: the work before the call `expression`, that call, and the work after it."""
    text = Source("compiled_graph(*args)", call=call)
    _before(graph, text)
    with contextlib.ExitStack() as stack:
        if grad is not graph.trains:
            switch = torch.is_grad_enabled, eager.set_grad_enabled
            stack.enter_context(text.switched("grad", *switch, graph.trains))
        if graph.trains and _returns_views(graph):
            switch = eager.is_view_replay_enabled, eager.set_view_replay_enabled
            stack.enter_context(text.switched("view_replay", *switch, True))
        if not graph.trains:
            stack.enter_context(graph.autocast_off(text))
        text(f"outs = {expression}")
    text("del args")
    _write_inputs(graph, text)
    _finish_outputs(graph, text)
    text("return outs")
    return text.function()


def _returns_views(graph: Graph) -> bool:
    """Whether compiled code may return views: autograd is to know how they were made."""
    plain = aot.OutputType.non_alias
    return bool(graph.changed) or any(info.output_type is not plain for info in graph.metadata.output_info)


def _before(graph: Graph, text: Source) -> None:
    for at in _needed_afterwards(graph):
        text(f"input{at} = args[{at}]")
    if graph.counted:
        inputs = tuple_of([f"args[{at}]" for at in graph.counted])
        text(f"increment_version({inputs})", increment_version=torch.autograd.graph.increment_version)
    if graph.detached:
        text("args = list(args)")
    for at in graph.detached:
        text(f"if isinstance(args[{at}], Tensor): args[{at}] = args[{at}].detach()")


def _needed_afterwards(graph: Graph) -> list[int]:
    of_inputs = (aot.OutputType.alias_of_input, aot.OutputType.is_input)
    bases = {o.base_idx for o in graph.metadata.output_info if o.output_type in of_inputs}
    return sorted(bases.union(graph.changed))


def _write_inputs(graph: Graph, text: Source) -> None:
    """Change the inputs that compiled code does not change itself: it returns their new values first."""
    if not graph.changed:
        return
    with text.block("try:"):
        _write_each(graph, text)
    with text.block("except Exception as error:", mark_unrepeatable=mark_unrepeatable):
        text("mark_unrepeatable(error)")
        text("raise")
    text(f"outs = outs[{len(graph.changed)}:]")


def _write_each(graph: Graph, text: Source) -> None:
    for at, which in enumerate(graph.changed):
        info, old = graph.metadata.input_info[which], f"input{which}"
        hidden = graph.trains and only_layout_changes(info)
        text(f"new = outs[{at}]{'.alias' if hidden else ''}")
        if info.mutates_storage_metadata:
            with text.block("with no_grad():", no_grad=torch.no_grad):
                text(f"{old}.set_(new)")
            continue
        if info.mutates_metadata:
            text(f"{old}.as_strided_(new.size(), new.stride(), new.storage_offset())")
        if info.mutates_data and info.is_leaf:  # changed under no_grad, or autograd would have refused
            text(f"({old}.detach() if {old}.requires_grad else {old}).copy_(new)")
        elif info.mutates_data:
            text(f"{old}.copy_(new)")


def _finish_outputs(graph: Graph, text: Source) -> None:
    metadata = graph.metadata
    if metadata.num_outputs_aliased:
        text(f"outs = {tuple_of([_output(graph, text, at) for at in range(metadata.num_outputs)])}")
    for at, info in enumerate(metadata.output_info):
        if metadata.dynamic_outputs and info.dynamic_dims is not None:
            mark_dynamic(text, f"outs[{at}]", info.dynamic_dims)
    if metadata.grad_enabled_mutation is not None:
        text(f"set_grad_enabled({metadata.grad_enabled_mutation})", set_grad_enabled=eager.set_grad_enabled)


def _output(graph: Graph, text: Source, at: int) -> str:
    """The expression for output `at`: as compiled code returned it, or a view made anew of its base."""
    metadata, Kind = graph.metadata, aot.OutputType
    info = metadata.output_info[at]
    match info.output_type:
        case Kind.is_input:
            return f"input{info.base_idx}"
        case Kind.alias_of_input:
            base = f"input{info.base_idx}"
        case Kind.alias_of_intermediate | Kind.alias_of_intermediate_save_as_output:
            base = f"outs[{metadata.num_outputs + info.base_idx}]"
        case Kind.alias_of_intermediate_base_is_user_output:
            base = f"outs[{info.base_idx}]"
            if graph.trains and info.base_idx in metadata.aliased_out_indices:
                base += ".alias"
        case _:
            return f"outs[{at}]"
    view = f"outs[{at}]{'.alias' if graph.trains else ''}"
    replay = inductor.functorch_config.view_replay_for_aliased_outputs
    text.names(**{"view_of": aot.gen_alias_from_base, f"views{at}": info.view_meta_sequence})
    return f"view_of({base}, {view}, {info.requires_grad}, views{at}, replay_views={replay})"
