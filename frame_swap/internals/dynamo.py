"""Dynamo: captured frames, generated code, cache entries, its compile lock and its metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, NamedTuple

import torch

from .probe import names_looked_up

with names_looked_up():
    import torch._dynamo
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list as cache_entries
    from torch._C._dynamo.eval_frame import reset_code, set_code_exec_strategy
    from torch._dynamo import convert_frame
    from torch._dynamo.convert_frame import compile_lock, output_codes, register_bytecode_hook
    from torch._dynamo.exc import TorchDynamoException
    from torch._dynamo.guards import DeletedGuardManagerWrapper
    from torch._dynamo.source import ConstantSource
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._dynamo.types import FrameAction, FrameExecStrategy  # type: ignore[attr-defined]
    from torch._dynamo.utils import (
        CleanupManager,
        compilation_time_metrics,
        counters,
        get_metrics_context,
        orig_code_map,
    )
    from torch._guards import TracingContext

__all__ = [
    "GLOBAL_FOR_TORCH",
    "RECORDS",
    "TEST_FOR_PROFILER",
    "CapturedFrame",
    "TorchDynamoException",
    "adopt_code",
    "as_no_bucket",
    "began_to_trace",
    "cache_entries",
    "captured_frame",
    "captured_whole",
    "compilation_time_metrics",
    "compile_lock",
    "counters",
    "forget_entries",
    "mark_as_captured",
    "next_compile_id",
    "recompile_limit",
    "register_bytecode_hook",
    "renew_compile_lock",
    "skip_frames",
    "traced_code",
    "tracer_class",
    "uncompiled",
    "without_disable",
    "wraps_numpy",
]


class CapturedFrame(NamedTuple):
    """The user's frame that Dynamo is tracing."""

    code: CodeType  # of the user's function, not of a shell of Dynamo or nn.Module around it
    globals: dict[str, Any]


_SHELLS = ("torch/_dynamo/external_utils.py", "torch/nn/modules/module.py")


def captured_frame() -> CapturedFrame | None:
    """The frame that Dynamo is tracing on this thread; None outside of Dynamo."""
    if (root := _root()) is None:
        return None
    code = root.f_code
    if code.co_filename.endswith(_SHELLS):  # Dynamo inlined the user's function, as its last
        inlined = reversed(root.output.traced_code)
        code = next((c for c in inlined if not c.co_filename.endswith(_SHELLS)), code)
    return CapturedFrame(code, root.f_globals)


def traced_code() -> CodeType | None:
    """The code object whose cache will have what Dynamo is tracing on this thread; None outside of Dynamo."""
    root = _root()
    return root.f_code if root is not None else None


def _root() -> Any:
    """Dynamo's translator of the outermost frame that it traces on this thread; None outside of Dynamo."""
    try:
        return InstructionTranslator.current_tx().output.root_tx
    except AttributeError:
        return None


def forget_entries(code: CodeType, is_ours: Callable[[Any], bool]) -> None:
    """Drop the cache entries of `code` whose backend `is_ours` accepts; others stay as they are.

    One that cannot be dropped, since others are there, fits no call any more and comes after these.
    """
    entries = list(cache_entries(code))
    ours = [entry for entry in entries if is_ours(entry.backend)]
    if len(ours) == len(entries):
        reset_code(code)
        return
    for entry in ours:
        state = entry.guard_manager.extra_state
        if state is not None:
            state.invalidate(entry, DeletedGuardManagerWrapper("its backend is not used any more"))


def began_to_trace() -> float | None:
    """When Dynamo began to trace this thread's frame, in seconds since the epoch; None where it traces none."""
    metrics = get_metrics_context()
    return metrics._start_time_ns / 1e9 if metrics.in_progress() else None


def next_compile_id(frame_state: dict[Any, Any]) -> Any:
    """The compile id for the next capture of a frame."""
    return convert_frame.get_compile_id(frame_state)


def recompile_limit() -> int:
    """How many times Dynamo compiles one frame at most."""
    return int(torch._dynamo.config.recompile_limit)


def renew_compile_lock() -> None:
    """In a forked child: free Dynamo's lock if a thread holds it that does not exist here."""
    if compile_lock.acquire(blocking=False):
        compile_lock.release()
    else:
        compile_lock._at_fork_reinit()  # type: ignore[attr-defined]


def skip_frames(code: CodeType) -> None:
    """Tell Dynamo to trace neither frames of `code` nor frames that they call."""
    set_code_exec_strategy(code, FrameExecStrategy(FrameAction.SKIP, FrameAction.SKIP))


def adopt_code(old: CodeType, new: CodeType) -> None:
    """Transfer to `new` all that Dynamo keeps for its generated code object `old`.

    Dynamo deletes the globals that generated code uses (`__compiled_fn_*`, resume functions) when the code object
    dies. From now on they live as long as `new`. An interrupted call may be repeated.
    """
    orig_code_map[new] = orig_code_map[old]
    output_codes.add(new)
    if hooks := CleanupManager.instance.get(old):
        CleanupManager.instance[new] = hooks
        CleanupManager.instance[old] = []
    # A resume function compiles while its caller's frame is on the stack. Dynamo's metrics keep a traceback of
    # that, and with it the caller's generated code, for an error message in the same compile.
    metrics = get_metrics_context()
    if not metrics.in_progress():
        metrics._edits.clear()


def without_disable(function: Any) -> Any:
    """The function inside the wrapper of `torch._dynamo.disable`; `function` itself if it has no such wrapper."""
    return getattr(function, "_torchdynamo_orig_callable", function)


def uncompiled(model: Any) -> Any:
    """The module or function that `torch.compile` was given, where `model` is what it has made; else `model`."""
    return getattr(model, "_orig_mod", None) or without_disable(model)


def captured_whole(gm: torch.fx.GraphModule) -> bool:
    """Whether this graph is all of its frame: Dynamo reached the frame's end without a graph break."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    return reason is not None and not reason.graph_break


RECORDS = ("record_pregraph_bytecode_enter", "record_pregraph_bytecode_exit")
"""The functions that Dynamo's code calls, for the profiler, before it calls a graph."""

TEST_FOR_PROFILER = "_is_profiler_enabled"
"""The attribute that Dynamo's code reads to decide whether to call these (torch 2.15)."""

GLOBAL_FOR_TORCH = "__import_torch"
"""The prefix of the globals in which Dynamo's code finds modules of torch."""


def tracer_class(gm: torch.fx.GraphModule) -> type[torch.fx.Tracer] | None:
    """The class of the tracer that made the graph of `gm`, to be passed on to a copy; None if it is not known."""
    tracer: type[torch.fx.Tracer] | None = getattr(gm.graph, "_tracer_cls", None)
    return tracer


def names_of_inputs(gm: torch.fx.GraphModule) -> tuple[str, ...]:
    """Where the frame has each input of a graph that Dynamo has captured: "L['x']", say."""
    names = []
    for node in gm.graph.find_nodes(op="placeholder"):
        source = getattr(node.meta.get("grapharg"), "source", None)
        name = getattr(source, "name", node.name)  # up to some version a method
        names.append(str(name() if callable(name) else name))
    return tuple(names)


def wraps_numpy(target: object) -> bool:
    """Whether `target`, of a graph's node, is Dynamo's wrapper for a function or method of NumPy."""
    return type(target).__module__ == "torch._dynamo.utils"


def mark_as_captured(gm: torch.fx.GraphModule) -> None:
    """Mark `gm` as captured by Dynamo. AOTAutograd treats no input of another graph as static."""
    gm.meta["dynamo_compile_id"] = None
    held = (*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False))
    gm._param_name_to_source = {name: ConstantSource(name) for name, _ in held}  # type: ignore[assignment]
    for node in gm.graph.find_nodes(op="placeholder"):
        node._dynamo_source = None


@contextlib.contextmanager
def as_no_bucket() -> Iterator[None]:
    """Let DDPOptimizer not take what the block does for a call of AOTAutograd's: eager code serves at first.

    It splits graphs at gradient buckets. Where AOTAutograd's count has risen while a part was compiled, it expects
    that the part's first call is made with fake tensors, and the tracing context has its metadata.
    """
    context = TracingContext.try_get()
    if context is None or getattr(context, "ddp_optimizer_ctx", None) is None:
        yield
        return
    counter, total = counters["aot_autograd"], counters["aot_autograd"]["total"]
    fakify, context.fakify_first_call = context.fakify_first_call, False
    known, context.fw_metadata = context.fw_metadata, None
    try:
        yield
    finally:
        if (traced := context.fw_metadata) is not None:  # a backward of the pair's looks it up here
            context.ddp_optimizer_ctx.curr_bucket += 1
            context.ddp_optimizer_ctx.metadata_per_bucket.append(traced)
        else:
            context.fw_metadata = known
        counter["total"], context.fakify_first_call = total, fakify
