"""Direct pairs: what AOTAutograd's runtime wrappers do for a graph, generated for that graph alone.

AOTAutograd calls compiled code through wrappers that serve every graph. What one graph needs of them is settled
when it is compiled, and written down in its metadata (`ViewAndMutationMeta`): mostly nothing. Here a function is
generated that does that and no more, and for a graph with a backward an `autograd.Function` derived from
AOTAutograd's own `CompiledFunction`. What happens seldom at run time stays with the base class, and so do its
errors: second derivatives, tangents that are no plain tensors, a transform of `torch.func` around the backward.

What a graph needs and is not generated here stays AOTAutograd's; `Compiled.wrappers` says what that is.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch

from ..codegen.source import Source, compile_function
from ..internals import aot, dynamo, eager, inductor

Boxed = Callable[[list[Any]], Any]
"""Takes one list of the graph's inputs, which it empties."""


class Compiled(NamedTuple):
    """Compiled code, ready to be called.

    Attributes:
        call: takes the graph's inputs, returns the sequence of its outputs.
        boxed: Inductor's own function, where nothing at all need be done around it; else None.
        wrappers: what of AOTAutograd's is still called with it.
        repeatable: whether a call that raises has changed no input, unless `had_effects` says otherwise of what it
            raised.
    """

    call: Callable[..., Any]
    boxed: Boxed | None
    wrappers: tuple[str, ...]
    repeatable: bool


def had_effects(error: BaseException) -> bool:
    """Whether `error` came up in a call after inputs were changed in place."""
    return hasattr(error, _HAD_EFFECTS)


_HAD_EFFECTS = "frame_swap_had_effects"


def _mark_effects(error: BaseException) -> None:
    setattr(error, _HAD_EFFECTS, True)


class Replacement:
    """What is generated while AOTAutograd puts its wrappers around a loaded artifact.

    Args:
        entry: AOTAutograd's cache entry, the artifact.
        grad: grad mode at each call, as the frame's guards make sure; None where nothing does.
    """

    def __init__(self, entry: Any, grad: bool | None) -> None:
        self._entry = entry
        self._grad = grad
        self._made: tuple[Boxed, Compiled] | None = None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Within the block AOTAutograd, on this thread, takes what is generated here for its runtime wrapper."""

        def replace(wrapper: Any, compiled: Boxed, aot_config: Any, *, runtime_metadata: Any) -> Boxed:
            made = _Graph(self._entry, wrapper, compiled, aot_config, runtime_metadata).compiled(self._grad)
            boxed = made.boxed or compile_function("def boxed(args):\n    return call(*args)\n", call=made.call)
            self._made = boxed, made
            return boxed

        def leave_out(wrapper: Any, compiled: Boxed, aot_config: Any, *, runtime_metadata: Any) -> Boxed:
            if not runtime_metadata.is_rng_op_functionalized:  # up to 2.12 it decides that at each call
                return compiled
            return wrap_rng(wrapper, compiled, aot_config, runtime_metadata=runtime_metadata)

        wrap_rng = aot.FunctionalizedRngRuntimeWrapper.post_compile
        with (
            _on_this_thread(aot.RuntimeWrapper, replace),
            _on_this_thread(aot.FunctionalizedRngRuntimeWrapper, leave_out),
        ):
            yield

    def result(self, outermost: Boxed) -> Compiled:
        """The compiled code, given what AOTAutograd returned: the same, or wrapped where inputs may coincide."""
        assert self._made is not None
        boxed, made = self._made
        if outermost is boxed:
            return made
        active = [type(w).__name__ for w in self._entry.dispatch_wrappers if getattr(w, "needs_post_compile", True)]
        names = {"AOTDedupeWrapper": "inputs passed twice", "AOTSyntheticBaseWrapper": "overlapping inputs"}
        around = (names.get(name, name) for name in active)
        repeatable = made.repeatable and "AOTSyntheticBaseWrapper" not in active  # it lays inputs out anew
        return Compiled(_unboxed(outermost), None, (*around, *made.wrappers), repeatable)


@contextlib.contextmanager
def _on_this_thread(wrapper: Any, post_compile: Callable[..., Boxed]) -> Iterator[None]:
    """Within the block, `post_compile` is what a class of AOTAutograd's wrappers does; for this thread alone."""
    thread, usual = threading.get_ident(), wrapper.post_compile

    def choose(*args: Any, **keywords: Any) -> Boxed:
        chosen: Callable[..., Boxed] = post_compile if threading.get_ident() == thread else usual
        return chosen(*args, **keywords)

    with mock.patch.object(wrapper, "post_compile", choose):
        yield


class _Graph:
    """One loaded graph, with what AOTAutograd knows of it.

    Args:
        entry: AOTAutograd's cache entry.
        wrapper: the `RuntimeWrapper` to do without.
        compiled: what it was to call: the forward for inference, or the `apply` of an `autograd.Function`.
        aot_config, metadata: what AOTAutograd has settled for the graph.
    """

    def __init__(self, entry: Any, wrapper: Any, compiled: Any, aot_config: Any, metadata: Any) -> None:
        self._entry = entry
        self._compiled = compiled
        self._metadata = metadata
        self._trains: bool = wrapper.trace_joint
        self._detached: Sequence[int] = wrapper.indices_of_inps_to_detach
        self._no_autocast: bool = wrapper.disable_amp
        self._counted: Sequence[int] = ()  # inputs changed in place by compiled code, which counts no versions
        if aot_config.keep_inference_input_mutations:
            self._counted = metadata.mutated_graph_handled_indices_seen_by_autograd

    def compiled(self, grad: bool | None) -> Compiled:
        if self._trains:
            apply, wrappers = self._autograd_function()
            return self._made(self._surrounded("call(*args)", apply, grad), None, wrappers)
        boxed = inductors(self._compiled)
        if grad is False and not self._needs_more() and not self._no_autocast:
            return self._made(_unboxed(boxed), boxed, self._beneath())
        return self._made(self._surrounded("call(list(args))", boxed, grad), None, self._beneath())

    def _made(self, call: Callable[..., Any], boxed: Boxed | None, wrappers: tuple[str, ...]) -> Compiled:
        return Compiled(call, boxed, wrappers, repeatable=not self._metadata.mutated_graph_handled_indices)

    def _needs_more(self) -> bool:
        """Whether the graph's inputs or outputs need any work besides the call."""
        metadata = self._metadata
        return bool(
            self._detached
            or self._counted
            or metadata.mutated_inp_runtime_indices
            or metadata.num_outputs_aliased
            or metadata.dynamic_outputs
            or metadata.grad_enabled_mutation is not None
        )

    def _beneath(self) -> tuple[str, ...]:
        """What AOTAutograd has put right around compiled code."""
        metadata = self._metadata
        subclasses = self._entry.maybe_subclass_meta is not None or getattr(metadata, "act_input_indices", None)
        found = {"subclasses": subclasses, "functionalised RNG": metadata.is_rng_op_functionalized}
        return tuple(name for name, there in found.items() if there)

    # Around the call

    def _surrounded(self, expression: str, call: Callable[..., Any], grad: bool | None) -> Callable[..., Any]:
        """The function of the graph's inputs: what comes before the call `expression`, it, and what comes after."""
        text = Source("compiled_graph(*args)", call=call)
        self._before(text)
        with contextlib.ExitStack() as stack:
            if grad is not self._trains:
                switch = torch.is_grad_enabled, eager.set_grad_enabled
                stack.enter_context(text.switched("grad", *switch, self._trains))
            if self._trains and self._returns_views():
                switch = eager.is_view_replay_enabled, eager.set_view_replay_enabled
                stack.enter_context(text.switched("view_replay", *switch, True))
            if not self._trains:
                stack.enter_context(self._autocast_off(text))
            text(f"outs = {expression}")
        text("del args")
        self._write_inputs(text)
        self._finish_outputs(text)
        text("return outs")
        return text.function()

    def _autocast_off(self, text: Source) -> contextlib.AbstractContextManager[None]:
        """What is written meanwhile runs without autocast, if the graph has its casts in it."""
        return text.without_autocast() if self._no_autocast else contextlib.nullcontext()

    def _returns_views(self) -> bool:
        """Whether views made by compiled code may come out of it: autograd is to know how they were made."""
        changed, plain = self._metadata.mutated_inp_runtime_indices, aot.OutputType.non_alias
        return bool(changed) or any(info.output_type is not plain for info in self._metadata.output_info)

    def _before(self, text: Source) -> None:
        for at in self._needed_afterwards():
            text(f"input{at} = args[{at}]")
        if self._counted:
            inputs = _tuple([f"args[{at}]" for at in self._counted])
            text(f"increment_version({inputs})", increment_version=torch.autograd.graph.increment_version)
        if self._detached:
            text("args = list(args)")
        for at in self._detached:  # autograd never asks for their gradients
            text(f"if isinstance(args[{at}], Tensor): args[{at}] = args[{at}].detach()")

    def _needed_afterwards(self) -> list[int]:
        of_inputs = (aot.OutputType.alias_of_input, aot.OutputType.is_input)
        bases = {o.base_idx for o in self._metadata.output_info if o.output_type in of_inputs}
        return sorted(bases.union(self._metadata.mutated_inp_runtime_indices))

    def _write_inputs(self, text: Source) -> None:
        """Inputs that the program changes in place and compiled code does not: it returns the new ones first."""
        changed = self._metadata.mutated_inp_runtime_indices
        if not changed:
            return
        with text.block("try:"):
            self._write_each(text, changed)
        with text.block("except Exception as error:", mark_effects=_mark_effects):
            text("mark_effects(error)")
            text("raise")
        text(f"outs = outs[{len(changed)}:]")

    def _write_each(self, text: Source, changed: Sequence[int]) -> None:
        for at, which in enumerate(changed):
            info, old = self._metadata.input_info[which], f"input{which}"
            hidden = self._trains and _only_layout_changes(info)
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

    def _finish_outputs(self, text: Source) -> None:
        metadata = self._metadata
        if metadata.num_outputs_aliased:
            text(f"outs = {_tuple([self._output(text, at) for at in range(metadata.num_outputs)])}")
        for at, info in enumerate(metadata.output_info):
            if metadata.dynamic_outputs and info.dynamic_dims is not None:
                self._mark_dynamic(text, f"outs[{at}]", info.dynamic_dims)
        if metadata.grad_enabled_mutation is not None:
            text(f"set_grad_enabled({metadata.grad_enabled_mutation})", set_grad_enabled=eager.set_grad_enabled)

    def _output(self, text: Source, at: int) -> str:
        """The expression for output `at`: as compiled code returned it, or a view made anew of its base."""
        metadata, Kind = self._metadata, aot.OutputType
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
                if self._trains and info.base_idx in metadata.aliased_out_indices:
                    base += ".alias"
            case _:
                return f"outs[{at}]"
        view = f"outs[{at}]{'.alias' if self._trains else ''}"
        replay = inductor.functorch_config.view_replay_for_aliased_outputs
        text.names(**{"view_of": aot.gen_alias_from_base, f"views{at}": info.view_meta_sequence})
        return f"view_of({base}, {view}, {info.requires_grad}, views{at}, replay_views={replay})"

    # Forward and backward

    def _autograd_function(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        """The `apply` of an `autograd.Function` for the graph, and what of AOTAutograd's it still runs through."""
        function = self._compiled.__self__
        self._keep_donated(function)
        wrappers = self._not_generated()
        if not wrappers:
            function = self._derived(function)
        # Past `Function.apply`, which looks for transforms of torch.func: the frame's guards rule them out.
        apply: Any = super(torch.autograd.Function, function).apply  # type: ignore[misc]
        return apply, wrappers

    def _keep_donated(self, function: Any) -> None:
        """Let a backward be called that keeps its graph, although it was compiled to overwrite what is saved.

        AOTAutograd compiles a backward when it is first called, and asks then whether it may; later, a call for
        which it may not is an error. Here it was compiled before anyone could know: such a call gets copies.
        """
        if donated := self._metadata.bw_donated_idxs:
            self._metadata.bw_donated_idxs = []  # no error then
            graph = dynamo.without_disable(function.compiled_bw)
            graph.current_callable = compile_function(
                "def boxed(args):\n    return call(copied(args, donated) if keeps_graph() else args)\n",
                call=graph.current_callable,
                copied=_copied,
                donated=tuple(donated),
                keeps_graph=aot.keeps_graph,
            )

    def _not_generated(self) -> tuple[str, ...]:
        metadata, backward = self._metadata, self._entry.compiled_bw
        found = {
            "effects in the backward": metadata.num_backward_tokens,
            "RNG states": metadata.num_graphsafe_rng_states,
            "compiled autograd's state": backward.backward_state_indices,
            "streams": aot.has_external_objects(),
            "tangents of unknown layout": any(
                getattr(meta, "memory_format", None) is None for meta in metadata.subclass_tangent_meta
            ),
        }
        return (*self._beneath(), *(name for name, there in found.items() if there))

    def _derived(self, function: Any) -> Any:
        boxed = getattr(function, "boxed_grads_call", False)
        forward, backward = self._forward(function), self._backward(function, boxed)
        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        derived: Any = type(function)(function.__name__, (function,), methods)
        node = derived._backward_cls
        # What forwards that save none of these leave unset.
        node.symints = node.opaque_objects = node._tensors_no_vc_check = ()
        # What autograd's engine calls; its own default looks up `backward`.
        setattr(node, "apply_boxed" if boxed else "apply", backward)
        return derived

    def _forward(self, function: Any) -> Callable[..., Any]:
        metadata, changed = self._metadata, self._metadata.mutated_inp_runtime_indices
        outs = [f"out{at}" for at in range(metadata.num_forward_returns)]
        checked, unchecked, opaque, symints = self._saved()
        text = Source("forward(ctx, *args)", call=inductors(function.compiled_fw))
        with self._autocast_off(text):
            text(f"{_tuple([*outs, *checked, *unchecked, *opaque, *symints])} = call(list(args))")
        if tensors := checked + unchecked:
            text(f"saved = {_tuple(tensors)}")
            with text.block("if any(map(is_view, saved)):", is_view=torch.Tensor._is_view):
                inputs = tuple(getattr(metadata, "saved_tensor_is_graph_input", ()))
                text("saved = views_detached(saved, inputs)", views_detached=_views_detached, inputs=inputs)
        for at, dims in metadata.dynamic_saved_tensors_idxs.items():
            self._mark_dynamic(text, f"saved[{at}]", dims)
        if checked:
            text(f"ctx.save_for_backward(*saved{f'[:{len(checked)}]' if unchecked else ''})")
        if unchecked:
            text(f"ctx._tensors_no_vc_check = saved[{len(checked)}:]")
        if opaque:
            text(f"ctx.opaque_objects = {_tuple(opaque)}")
        if symints:
            text(f"ctx.symints = {_tuple(symints)}")
        for at in metadata.unsafe_view_out_indices:
            out = outs[len(changed) + at]
            text(f"{out} = unsafe_view({out}, {out}.shape)", unsafe_view=torch.ops.aten._unsafe_view.default)
        told = [at for at, which in enumerate(changed) if _only_layout_changes(metadata.input_info[which])]
        told += [len(changed) + at for at in metadata.aliased_out_indices]
        infos = [*(metadata.input_info[which] for which in changed), *metadata.output_info]
        tensor = [issubclass(getattr(info, "raw_type", torch.Tensor), torch.Tensor) for info in infos]
        constant = [
            outs[at] for at, info in enumerate(infos) if tensor[at] and not info.requires_grad and at not in told
        ]
        if constant:
            text(f"ctx.mark_non_differentiable({', '.join(constant)})")
            text("ctx._materialize_non_diff_grads = False")
        for at in told:  # no outputs for autograd: they tell of an input's layout, or of a view to be made anew
            outs[at] = f"TensorAlias({outs[at]})"
        text(f"return {_tuple(outs)}", TensorAlias=aot.TensorAlias)
        return text.function()

    def _saved(self) -> tuple[list[str], ...]:
        """Names for what the forward returns for the backward: tensors, with their version to be checked or not,
        other objects, and symbolic numbers; in that order."""
        metadata = self._metadata
        counts = [
            metadata.num_tensors_saved_with_no_vc_check or 0,
            getattr(metadata, "num_opaque_objects_saved_for_bw", 0) or 0,
            metadata.num_symints_saved_for_bw or 0,
        ]
        counts.insert(0, self._entry.num_fw_outs_saved_for_bw - sum(counts))
        kinds = ("checked", "unchecked", "opaque", "symint")
        return tuple([f"{kind}{at}" for at in range(n)] for kind, n in zip(kinds, counts, strict=True))

    def _backward(self, function: Any, boxed: bool) -> Callable[..., Any]:
        metadata = self._metadata
        tangents = self._tangents()
        star = "" if boxed else "*"
        text = Source(f"backward(ctx, {star}grads)", call=inductors(function.compiled_bw), rare=function.backward)
        seldom = {
            "is_grad_enabled()": torch.is_grad_enabled,
            "interpreters() is not None": aot.peek_interpreter_stack,
        }
        if metadata.deterministic is False:
            seldom["deterministic()"] = eager.deterministic_algorithms
        scope = {condition.partition("(")[0]: check for condition, check in seldom.items()}
        plain = [f"type(grads[{at}]) is not Tensor" for at in tangents]
        with text.block(f"if {' or '.join([*seldom, *plain])}:", **scope):
            text(f"return rare(ctx, {star}grads)")
        grads = "".join(f"grads[{at}], " for at in tangents)
        _, unchecked, opaque, symints = self._saved()
        # `saved_tensors` also where there are none: it tells whether the graph has been freed.
        kinds = {
            "symints": symints,
            "saved_tensors": True,
            "_tensors_no_vc_check": unchecked,
            "opaque_objects": opaque,
        }
        saved = "".join(f"*ctx.{name}, " for name, there in kinds.items() if there)
        text(f"args = [{saved}{grads}]")
        text("grads.clear()" if boxed else "del grads")
        for at, meta in enumerate(metadata.subclass_tangent_meta, -len(tangents)):
            self._lay_out(text, f"args[{at}]", f"layout{-at}", meta.memory_format)
        text("ctx.maybe_clear_saved_tensors()")
        with self._autocast_off(text):
            if set(getattr(dynamo.without_disable(function.compiled_bw), "device_types", ())) <= {"cpu"}:
                text("return tuple(call(args))")
            else:  # on a thread of the engine's: with the context variables of the one that called it
                lookup: dict[str, Any] = {"there": eager.is_thread_local, "get": eager.thread_local}
                text('context = get("context") if there("context") else None', **lookup)
                text("return tuple(call(args) if context is None else context.copy().run(call, args))")
        return text.function()

    def _tangents(self) -> list[int]:
        """Which of the gradients that autograd passes the backward takes."""
        metadata, Kind = self._metadata, aot.OutputType
        own = (Kind.non_alias, Kind.unsafe_view_alias, Kind.custom_function_view)
        changed = [metadata.input_info[which] for which in metadata.mutated_inp_runtime_indices]
        taken = [at for at, info in enumerate(changed) if info.mutates_data and info.requires_grad]
        for at, info in enumerate(metadata.output_info, len(changed)):
            wanted = getattr(info, "requires_grad_for_backward", info.requires_grad)
            if info.output_type in own and issubclass(info.raw_type, torch.Tensor) and wanted:
                taken.append(at)
        bases = len(changed) + metadata.num_outputs
        return [*taken, *range(bases, bases + metadata.num_intermediate_bases)]

    def _lay_out(self, text: Source, tangent: str, name: str, layout: Any) -> None:
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

    def _mark_dynamic(self, text: Source, tensor: str, dims: set[int]) -> None:
        """Tell Dynamo, for when the tensor enters another graph, which of its sizes vary."""
        text(f"mark_dynamic({tensor}, {set(dims)})", mark_dynamic=aot.mark_dynamic)


def inductors(compiled: Any) -> Boxed:
    """Inductor's generated function, out of what it came in."""
    from torch._inductor.output_code import CompiledFxGraph

    graph = dynamo.without_disable(compiled)
    call: Any = graph.current_callable if isinstance(graph, CompiledFxGraph) else graph
    if call is graph or not hasattr(call, "__code__") or getattr(graph.compiled_fn_runner, "partitions", None):
        # The object deletes its runner's partitions when it goes: it has to live as long as what calls them.
        return compile_function("def boxed(args):\n    return call(args)\n", call=call, owner=graph)
    graph.compiled_fn_runner = None
    dynamo.skip_frames(call.__code__)
    return call  # type: ignore[no-any-return]


def _unboxed(call: Boxed) -> Callable[..., Any]:
    return compile_function("def compiled_graph(*args):\n    return call(list(args))\n", call=call)


def _tuple(names: Sequence[str]) -> str:
    return f"({''.join(f'{name}, ' for name in names)})"


def _views_detached(saved: Sequence[torch.Tensor], graph_inputs: Sequence[bool]) -> list[torch.Tensor]:
    """A view would keep its base, and so a graph, alive. From torch 2.15 on, inputs stay what they are."""
    is_input = itertools.chain(graph_inputs, itertools.repeat(False))
    return [x if kept or not x._is_view() else x.detach() for x, kept in zip(saved, is_input, strict=False)]


def _copied(args: list[Any], which: Sequence[int]) -> list[Any]:
    """The same list, with copies of some of its tensors."""
    for at in which:
        args[at] = eager.clone_preserve_strides(args[at])  # type: ignore[no-untyped-call]
    return args


def _only_layout_changes(info: Any) -> bool:
    return bool(info.mutates_metadata and not info.mutates_data)
