"""One loaded graph, and what the modules that generate its wrappers share."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from ...codegen.source import Source, compile_function
from ...internals import aot, dynamo, loading, packages
from ..compiled import Boxed


class Graph:
    """One loaded graph, with AOTAutograd's metadata.

    Args:
        entry: AOTAutograd's cache entry.
        wrapper: the `RuntimeWrapper` that is replaced.
        compiled: what that was to call: the forward for inference, or the `apply` of an `autograd.Function`.
        aot_config: AOTAutograd's settings for the graph.
        metadata: AOTAutograd's `ViewAndMutationMeta` of the graph.

    Attributes:
        trains: whether there is a backward.
        detached: indices of the inputs whose gradients autograd never asks for.
        counted: indices of the inputs that compiled code changes in place, without counting their versions.
    """

    def __init__(self, entry: Any, wrapper: Any, compiled: Any, aot_config: Any, metadata: Any) -> None:
        self.entry = entry
        self.compiled = compiled
        self.metadata = metadata
        self.trains: bool = wrapper.trace_joint
        self.detached: Sequence[int] = wrapper.indices_of_inps_to_detach
        self.counted: Sequence[int] = ()
        if aot_config.keep_inference_input_mutations:
            self.counted = metadata.mutated_graph_handled_indices_seen_by_autograd
        self.without_autocast: bool = wrapper.disable_amp  # the casts are in the graph

    @property
    def changed(self) -> Sequence[int]:
        """Indices of the inputs that the program changes in place and compiled code does not."""
        changed: Sequence[int] = self.metadata.mutated_inp_runtime_indices
        return changed

    def wrappers_beneath(self) -> tuple[str, ...]:
        """Names of the wrappers of AOTAutograd's that are between a generated wrapper and compiled code."""
        metadata = self.metadata
        subclasses = self.entry.maybe_subclass_meta is not None or getattr(metadata, "act_input_indices", None)
        found = {"subclasses": subclasses, "functionalised RNG": metadata.is_rng_op_functionalized}
        return tuple(name for name, there in found.items() if there)

    def autocast_off(self, text: Source) -> contextlib.AbstractContextManager[None]:
        """Lines written in this block run without autocast, if the graph was compiled to."""
        return text.without_autocast() if self.without_autocast else contextlib.nullcontext()


def function_of_inductor(compiled: Any) -> Boxed:
    """The function that Inductor has generated, taken out of the objects around it."""
    graph = dynamo.without_disable(compiled)
    if packages.is_package(graph):
        return graph.current_callable  # type: ignore[no-any-return]
    call: Any = graph.current_callable if loading.is_compiled_graph(graph) else graph
    if call is graph or not hasattr(call, "__code__") or getattr(graph.compiled_fn_runner, "partitions", None):
        # The object deletes its runner's partitions when it goes: it has to live as long as the function does.
        return compile_function("def boxed(args):\n    return call(args)\n", call=call, owner=graph)
    graph.compiled_fn_runner = None
    dynamo.skip_frames(call.__code__)
    return call  # type: ignore[no-any-return]


def tuple_of(names: Sequence[str]) -> str:
    """The expression for a tuple of these names."""
    return f"({''.join(f'{name}, ' for name in names)})"


def only_layout_changes(info: Any) -> bool:
    """Whether the program changes the layout of an input, and not its values."""
    return bool(info.mutates_metadata and not info.mutates_data)


def mark_dynamic(text: Source, tensor: str, dims: set[int]) -> None:
    """Tell Dynamo which sizes of the tensor vary, for when it enters another graph."""
    text(f"mark_dynamic({tensor}, {set(dims)})", mark_dynamic=aot.mark_dynamic)
