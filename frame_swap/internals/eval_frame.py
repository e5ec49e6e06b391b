"""The path from a call of a compiled function to its code: wrappers, guards, hooks and modes."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

import torch

from .dynamo import skip_frames
from .probe import names_looked_up

with names_looked_up():
    import torch._dynamo
    import torch.nn.modules.module as nn_module
    from torch._C import _is_tracing, _len_torch_dispatch_stack
    from torch._C._functorch import maybe_current_level
    from torch._dynamo import eval_frame as dynamos_eval_frame
    from torch._dynamo import external_utils, trace_rules
    from torch._dynamo.mutation_guard import GenerationTracker
    from torch.autograd import profiler
    from torch.fx._symbolic_trace import is_fx_symbolic_tracing

    # These are looked up at each use, since torch assigns them anew. Here they are only checked to exist.
    _ASSIGNED = (dynamos_eval_frame._stance.stance, profiler._is_profiler_enabled)
    _GLOBAL_HOOKS = (
        nn_module._global_backward_pre_hooks,
        nn_module._global_backward_hooks,
        nn_module._global_forward_hooks,
        nn_module._global_forward_pre_hooks,
    )

__all__ = [
    "GenerationTracker",
    "backend_of",
    "compiled_callable",
    "guards_elsewhere",
    "module_call",
    "only_calls_forward",
    "replace_module_call",
    "stand_in",
    "traceable",
    "undisturbed",
    "watched_by_mode",
]


def compiled_callable(compiled: Callable[..., Any]) -> Any:
    """The callable that Dynamo captures for `compiled`: a function, a bound method, or Dynamo's shell around it."""
    return getattr(compiled, "_torchdynamo_orig_callable", None)


def backend_of(compiled: Callable[..., Any]) -> Any:
    """The backend that the cache entries of `compiled` name; `compiled` is a result of `torch.compile`.

    None if it cannot be found, or if a call of `compiled` does more than find an entry and run its code.
    """
    if not isinstance(compiled, FunctionType) or torch._dynamo.config.compiled_autograd:
        return None
    cells = dict(zip(compiled.__code__.co_freevars, compiled.__closure__ or (), strict=True))
    backend: Any = cells["callback"].cell_contents if "callback" in cells else None
    while hasattr(backend, "_torchdynamo_orig_backend"):
        backend = backend._torchdynamo_orig_backend
    return backend


def stand_in(function: Callable[..., Any], compiled: Callable[..., Any]) -> None:
    """Make Dynamo treat `function` as `compiled`, by the same attributes, and trace none of its frames."""
    attributes = cast("Any", function)
    attributes.__wrapped__ = cast("Any", compiled).__wrapped__
    attributes._torchdynamo_wrapper_id = id(function)
    skip_frames(attributes.__code__)


def traceable(call: Callable[..., Any], forward: Callable[..., Any]) -> Callable[..., Any]:
    """A form of `call` that Dynamo captures; `call` only calls `forward`.

    Dynamo skips frames of torch.nn's own modules unless another frame inlines them, so these get such a frame.
    """
    return external_utils.wrap_inline(call) if trace_rules.check(forward) else call


def undisturbed() -> bool:
    """Whether this thread has no profiler, tracer, dispatch mode, functorch transform and stance.

    Each of these watches, traces or replaces the calls of compiled code. Torch function modes do so, too, but
    guards check them.
    """
    stance = dynamos_eval_frame._stance
    return (
        stance.stance == "default"
        and stance.backend is None
        and not stance.skip_guard_eval_unsafe
        and not profiler._is_profiler_enabled
        and not _len_torch_dispatch_stack()
        and maybe_current_level() is None
        and not _is_tracing()
        and not is_fx_symbolic_tracing()
    )


def watched_by_mode() -> bool:
    """Whether a dispatch mode is active on this thread and sees the operators of a call."""
    return bool(_len_torch_dispatch_stack())


def module_call(target: torch.nn.Module | type[torch.nn.Module]) -> Any:
    """The call of a module, or of a class's instances, that runs hooks and `forward` uncompiled."""
    return target._call_impl


def replace_module_call(target: torch.nn.Module | type[torch.nn.Module], call: Callable[..., Any]) -> None:
    """Make `Module.__call__` call `call` instead; set on a class, `call` becomes a method of all instances."""
    target._compiled_call_impl = call


def only_calls_forward(module: torch.nn.Module) -> bool:
    """Whether `module._call_impl` only calls the `forward` of its class: there are no hooks."""
    return not (
        module._backward_hooks
        or module._backward_pre_hooks
        or module._forward_hooks
        or module._forward_pre_hooks
        or any(_GLOBAL_HOOKS)
        or "forward" in module.__dict__
    )


_RELATIONAL = {"OBJECT_ALIASING", "STORAGE_OVERLAPPING", "SYMBOLIC_SHAPE_GUARD"}
"""Guards that relate several values. They cannot be evaluated if the guards of some of these are left out."""


def guards_elsewhere(root: Any, name: str) -> Any | None:
    """The guards under `root`, without those about the local variable `name` and without those about code.

    Guards about code check the identity of functions, classes and modules that are reached through globals. Returns
    None if a guard relates the variable to other values.
    """
    about = f"L[{name!r}]"
    pending = [node for node in root.get_child_managers() if node.get_source() == about]
    while pending:
        node = pending.pop()
        if any(type(guard).__name__ in _RELATIONAL for guard in node.get_leaf_guards()):
            return None
        pending += _below(node)
    left_out = {about}
    pending = [node for node in root.get_child_managers() if node.get_source() == "G"]
    while pending:
        node = pending.pop()
        if _is_about_code(node):
            left_out.add(node.get_source())
        else:
            pending += _below(node)
    return root.clone_manager(lambda node: node.get_source() not in left_out)


def _below(node: Any) -> list[Any]:
    if not hasattr(node, "get_key_value_managers"):
        return list(node.get_child_managers())
    return [m for pair in node.get_key_value_managers().values() for m in pair if m is not None]


def _is_about_code(node: Any) -> bool:
    kinds = {type(guard).__name__ for guard in node.get_leaf_guards()}
    return kinds <= {"ID_MATCH", "TYPE_MATCH"} and all(map(_is_about_code, _below(node)))
