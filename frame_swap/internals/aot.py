"""AOTAutograd: tracing the pair, runtime wrappers with their metadata, and hooks on saved tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .eval_frame import watched_by_mode
from .probe import names_looked_up

with names_looked_up():
    from torch._C._autograd import _get_current_graph_task_keep_graph as keeps_graph
    from torch._C._functorch import peek_interpreter_stack
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop
    from torch._functorch._aot_autograd import runtime_wrappers
    from torch._functorch._aot_autograd.functional_utils import gen_alias_from_base
    from torch._functorch._aot_autograd.runtime_wrappers import (
        FunctionalizedRngRuntimeWrapper,
        RuntimeWrapper,
        coerce_to_expected_memory_format,
    )
    from torch._functorch._aot_autograd.schemas import OutputType, TensorAlias
    from torch._functorch._aot_autograd.utils import saved_tensors_hooks_are_inlineable, top_saved_tensors_hooks
    from torch._functorch.partitioners import default_partition
    from torch.autograd import _unsafe_preserve_version_counter as version_counters_kept  # type: ignore[attr-defined]

    if hasattr(runtime_wrappers, "mark_dynamo_propagated_dynamic_indices"):
        mark_dynamic = runtime_wrappers.mark_dynamo_propagated_dynamic_indices
    else:  # up to 2.12
        mark_dynamic = getattr(runtime_wrappers, "maybe_mark_dynamic_helper")  # noqa: B009

__all__ = [
    "MATERIALIZES_OTHERS",
    "UNCHECKED_TENSORS",
    "FunctionalizedRngRuntimeWrapper",
    "OutputType",
    "RuntimeWrapper",
    "TensorAlias",
    "aot_autograd",
    "boxed_nop",
    "coerce_to_expected_memory_format",
    "default_partition",
    "derive_function",
    "gen_alias_from_base",
    "has_external_objects",
    "keeps_graph",
    "mark_boxed",
    "mark_dynamic",
    "peek_interpreter_stack",
    "runs_hooks",
    "saving_is_traced",
    "takes_boxed_grads",
    "version_counters_kept",
]


def saving_is_traced() -> bool:
    """Whether hooks on saved tensors are active that AOTAutograd traces into its graphs."""
    return bool(saved_tensors_hooks_are_inlineable(top_saved_tensors_hooks()))


def runs_hooks() -> bool:
    """Whether a call of a graph on this thread also runs hooks on saved tensors or a dispatch mode."""
    return bool(top_saved_tensors_hooks()) or watched_by_mode()


def has_external_objects() -> bool:
    """Whether a graph of this process uses streams or events, which AOTAutograd passes on to backwards (2.15)."""
    return bool(getattr(runtime_wrappers, "index_to_external_object_weakref", None))


UNCHECKED_TENSORS = "_tensors_no_vc_check"
"""The attribute of an `autograd.Function`'s `ctx` for saved tensors whose version is not checked."""

MATERIALIZES_OTHERS = "_materialize_non_diff_grads"
"""The attribute of a `ctx`: whether zeros stand for gradients of outputs that are marked non-differentiable."""


def takes_boxed_grads(function: Any) -> bool:
    """Whether the backward of a `CompiledFunction` takes all gradients in one list (from torch 2.12 on)."""
    return bool(getattr(function, "boxed_grads_call", False))


def derive_function(
    function: Any, forward: Callable[..., Any], backward: Callable[..., Any], boxed_grads: bool
) -> Any:
    """A class derived from `function`, AOTAutograd's `CompiledFunction`, that runs `forward` and `backward`."""
    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    derived: Any = type(function)(function.__name__, (function,), methods)
    node = derived._backward_cls
    # Forwards that save none of these do not set them.
    node.symints = node.opaque_objects = ()
    setattr(node, UNCHECKED_TENSORS, ())
    # The method that autograd's engine calls; its default looks up `backward`.
    setattr(node, "apply_boxed" if boxed_grads else "apply", backward)
    return derived


def mark_boxed(run: Callable[[list[Any]], Any]) -> None:
    """Tell AOTAutograd that `run` takes its arguments in one list, which it may empty."""
    run._boxed_call = True  # type: ignore[attr-defined]
