"""Generate the forward and the backward of a graph as an `autograd.Function`, derived from AOTAutograd's own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...codegen.source import Source, compile_function
from ...internals import aot, dynamo, eager
from .graph import Graph, function_of_inductor, mark_dynamic, only_layout_changes, tuple_of


def autograd_function(graph: Graph) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """The `apply` of an `autograd.Function` for the graph, and the wrappers of AOTAutograd that it still calls."""
    function = graph.compiled.__self__
    _keep_donated(graph, function)
    wrappers = _not_generated(graph)
    if not wrappers:
        boxed = aot.takes_boxed_grads(function)
        forward, backward = _forward(graph, function), _backward(graph, function, boxed)
        function = aot.derive_function(function, forward, backward, boxed)
    # Not `Function.apply`, which looks for transforms of torch.func: the frame's guards rule them out.
    apply: Any = super(torch.autograd.Function, function).apply
    return apply, wrappers


def _keep_donated(graph: Graph, function: Any) -> None:
    """Let a backward be called that keeps its graph, although it was compiled to overwrite saved tensors.

    AOTAutograd compiles a backward when it is first called, and asks then whether it may overwrite them; a later
    call for which it may not is an error. Here the backward is compiled before that is known: such a call gets
    copies.
    """
    if donated := graph.metadata.bw_donated_idxs:
        graph.metadata.bw_donated_idxs = []  # no error then
        backward = dynamo.without_disable(function.compiled_bw)
        backward.current_callable = compile_function(
            "def boxed(args):\n    return call(copied(args, donated) if keeps_graph() else args)\n",
            call=backward.current_callable,
            copied=_copied,
            donated=tuple(donated),
            keeps_graph=aot.keeps_graph,
        )


def _copied(args: list[Any], which: Sequence[int]) -> list[Any]:
    """The same list, with copies of some of its tensors."""
    for at in which:
        args[at] = eager.clone_preserve_strides(args[at])  # type: ignore[no-untyped-call]
    return args


def _not_generated(graph: Graph) -> tuple[str, ...]:
    """Names of the work for this graph that stays with AOTAutograd's wrappers."""
    metadata, backward = graph.metadata, graph.entry.compiled_bw
    found = {
        "effects in the backward": metadata.num_backward_tokens,
        "RNG states": metadata.num_graphsafe_rng_states,
        "compiled autograd's state": backward.backward_state_indices,
        "streams": aot.has_external_objects(),
        "tangents of unknown layout": any(
            getattr(meta, "memory_format", None) is None for meta in metadata.subclass_tangent_meta
        ),
    }
    return (*graph.wrappers_beneath(), *(name for name, there in found.items() if there))


def _forward(graph: Graph, function: Any) -> Callable[..., Any]:
    metadata, changed = graph.metadata, graph.changed
    outs = [f"out{at}" for at in range(metadata.num_forward_returns)]
    checked, unchecked, opaque, symints = _saved(graph)
    text = Source("forward(ctx, *args)", call=function_of_inductor(function.compiled_fw))
    with graph.autocast_off(text):
        text(f"{tuple_of([*outs, *checked, *unchecked, *opaque, *symints])} = call(list(args))")
    if tensors := checked + unchecked:
        text(f"saved = {tuple_of(tensors)}")
        with text.block("if any(map(is_view, saved)):", is_view=eager.is_view):
            inputs = tuple(getattr(metadata, "saved_tensor_is_graph_input", ()))
            text("saved = views_detached(saved, inputs)", views_detached=_views_detached, inputs=inputs)
    for at, dims in metadata.dynamic_saved_tensors_idxs.items():
        mark_dynamic(text, f"saved[{at}]", dims)
    if checked:
        text(f"ctx.save_for_backward(*saved{f'[:{len(checked)}]' if unchecked else ''})")
    if unchecked:
        text(f"ctx.{aot.UNCHECKED_TENSORS} = saved[{len(checked)}:]")
    if opaque:
        text(f"ctx.opaque_objects = {tuple_of(opaque)}")
    if symints:
        text(f"ctx.symints = {tuple_of(symints)}")
    for at in metadata.unsafe_view_out_indices:
        out = outs[len(changed) + at]
        text(f"{out} = unsafe_view({out}, {out}.shape)", unsafe_view=eager.unsafe_view)
    # These are no outputs for autograd: they give an input's layout, or a view that is to be made anew.
    hidden = [at for at, which in enumerate(changed) if only_layout_changes(metadata.input_info[which])]
    hidden += [len(changed) + at for at in metadata.aliased_out_indices]
    infos = [*(metadata.input_info[which] for which in changed), *metadata.output_info]
    tensor = [issubclass(getattr(info, "raw_type", torch.Tensor), torch.Tensor) for info in infos]
    constant = [
        outs[at] for at, info in enumerate(infos) if tensor[at] and not info.requires_grad and at not in hidden
    ]
    if constant:
        text(f"ctx.mark_non_differentiable({', '.join(constant)})")
        text(f"ctx.{aot.MATERIALIZES_OTHERS} = False")
    for at in hidden:
        outs[at] = f"TensorAlias({outs[at]})"
    text(f"return {tuple_of(outs)}", TensorAlias=aot.TensorAlias)
    return text.function()


def _saved(graph: Graph) -> tuple[list[str], ...]:
    """Names for the values that the forward returns for the backward.

    In this order: tensors whose version is checked, tensors whose version is not, other objects, symbolic numbers.
    """
    metadata = graph.metadata
    counts = [
        metadata.num_tensors_saved_with_no_vc_check or 0,
        getattr(metadata, "num_opaque_objects_saved_for_bw", 0) or 0,
        metadata.num_symints_saved_for_bw or 0,
    ]
    counts.insert(0, graph.entry.num_fw_outs_saved_for_bw - sum(counts))
    kinds = ("checked", "unchecked", "opaque", "symint")
    return tuple([f"{kind}{at}" for at in range(n)] for kind, n in zip(kinds, counts, strict=True))


def _views_detached(saved: Sequence[torch.Tensor], graph_inputs: Sequence[bool]) -> list[torch.Tensor]:
    """A view would keep its base, and so a graph, alive. From torch 2.15 on, inputs are left alone."""
    is_input = itertools.chain(graph_inputs, itertools.repeat(False))
    return [x if kept or not eager.is_view(x) else x.detach() for x, kept in zip(saved, is_input, strict=False)]


def _backward(graph: Graph, function: Any, boxed: bool) -> Callable[..., Any]:
    metadata, compiled = graph.metadata, function.compiled_bw
    tangents = _tangents(graph)
    star = "" if boxed else "*"
    text = Source(f"backward(ctx, {star}grads)", call=function_of_inductor(compiled), rare=function.backward)
    seldom = {
        "is_grad_enabled()": torch.is_grad_enabled,
        "interpreters() is not None": aot.peek_interpreter_stack,
    }
    if metadata.deterministic is False:
        seldom["deterministic()"] = eager.deterministic_algorithms
    scope = {condition.partition("(")[0]: check for condition, check in seldom.items()}
    subclasses = [f"type(grads[{at}]) is not Tensor" for at in tangents]
    with text.block(f"if {' or '.join([*seldom, *subclasses])}:", **scope):
        text(f"return rare(ctx, {star}grads)")
    grads = "".join(f"grads[{at}], " for at in tangents)
    _, unchecked, opaque, symints = _saved(graph)
    # `saved_tensors` also where there are none: it raises if the graph has been freed.
    kinds = {
        "symints": symints,
        "saved_tensors": True,
        aot.UNCHECKED_TENSORS: unchecked,
        "opaque_objects": opaque,
    }
    saved = "".join(f"*ctx.{name}, " for name, there in kinds.items() if there)
    text(f"args = [{saved}{grads}]")
    text("grads.clear()" if boxed else "del grads")
    for at, meta in enumerate(metadata.subclass_tangent_meta, -len(tangents)):
        _lay_out(text, f"args[{at}]", f"layout{-at}", meta.memory_format)
    text("ctx.maybe_clear_saved_tensors()")
    with graph.autocast_off(text):
        if set(getattr(dynamo.without_disable(compiled), "device_types", ())) <= {"cpu"}:
            text("return tuple(call(args))")
        else:  # on a thread of the autograd engine: with the context variables of the thread that called it
            lookup: dict[str, Any] = {"there": eager.is_thread_local, "get": eager.thread_local}
            text('context = get("context") if there("context") else None', **lookup)
            text("return tuple(call(args) if context is None else context.copy().run(call, args))")
    return text.function()


def _tangents(graph: Graph) -> list[int]:
    """Indices of the gradients that the backward takes, among those that autograd passes."""
    metadata, Kind = graph.metadata, aot.OutputType
    own = (Kind.non_alias, Kind.unsafe_view_alias, Kind.custom_function_view)
    changed = [metadata.input_info[which] for which in graph.changed]
    taken = [at for at, info in enumerate(changed) if info.mutates_data and info.requires_grad]
    for at, info in enumerate(metadata.output_info, len(changed)):
        wanted = getattr(info, "requires_grad_for_backward", info.requires_grad)
        if info.output_type in own and issubclass(info.raw_type, torch.Tensor) and wanted:
            taken.append(at)
    bases = len(changed) + metadata.num_outputs
    return [*taken, *range(bases, bases + metadata.num_intermediate_bases)]


def _lay_out(text: Source, tangent: str, name: str, layout: Any) -> None:
    """Give a tangent the layout that the backward was compiled for."""
    if layout.memory_format is torch.contiguous_format:
        text(f"if not {tangent}.is_contiguous(): {tangent} = {tangent}.contiguous()")
    elif layout.memory_format is not None:
        text(f"{tangent} = {tangent}.contiguous(memory_format={name})", **{name: layout.memory_format})
    elif layout.size:  # a number has one layout
        same = f"{tangent}.stride() == {tuple(layout.stride)} and {tangent}.shape == {tuple(layout.size)}"
        text(
            f"if not ({same}): {tangent} = laid_out({tangent}, {name})",
            **{"laid_out": aot.coerce_to_expected_memory_format, name: layout},
        )
