"""Dynamo's callback: what it is asked about a frame, and what it may answer.

Dynamo calls it for each frame that no cache entry fits, and does what the answer says.
"""

from __future__ import annotations

import copy
import functools
import opcode
import sys
from collections.abc import Callable
from types import CodeType, SimpleNamespace
from typing import Any

import torch

from .probe import names_looked_up

with names_looked_up():
    import torch._dynamo
    from torch._C import (
        _is_torch_function_all_disabled,
        _is_torch_function_enabled,
        _is_tracing,
        _len_torch_dispatch_stack,
    )
    from torch._C._functorch import maybe_current_level
    from torch._dynamo import convert_frame, trace_rules
    from torch._dynamo import eval_frame as dynamos_eval_frame
    from torch._dynamo.convert_frame import CatchErrorsWrapper, ConvertFrame
    from torch._dynamo.types import (  # type: ignore[attr-defined]
        ConvertFrameReturn,
        FrameAction,
        FrameExecStrategy,
    )
    from torch._functorch._aot_autograd.utils import top_saved_tensors_hooks
    from torch._guards import TracingContext
    from torch.autograd import forward_ad
    from torch.fx import _symbolic_trace as symbolic_trace
    from torch.nn.parallel.distributed import DistributedDataParallel

    _active_ddp: Callable[[], Any] = DistributedDataParallel._get_active_ddp_module
    _function_modes: Callable[[], list[Any]] = torch.overrides._get_current_function_mode_stack

try:
    from torch._C._dynamo.eval_frame import get_eval_frame_isolate_recompiles_id
    from torch._dynamo.decorators import _nonrecursive_disable_wrapper_code
    from torch._dynamo.eval_frame import _get_cache_entries_for_region
    from torch._dynamo.utils import _get_error_on_graph_break

    _HAS_NAMES = True
except ImportError:  # before torch 2.13
    _HAS_NAMES = False

__all__ = [
    "CatchErrorsWrapper",
    "arguments_of_backend",
    "copied",
    "decides_at_once",
    "disabled",
    "expect_resets",
    "fits_an_entry",
    "has_accelerator",
    "has_names",
    "is_called_disabled",
    "is_for",
    "kin",
    "plainly",
    "reason_for_the_call",
    "replace_callback",
    "skip",
    "users_code",
]


def has_names() -> bool:
    """Whether this torch has the names that not all have."""
    return _HAS_NAMES


def plainly() -> ConvertFrameReturn:
    """Tell Dynamo to run this frame, and what it calls, as plain Python, and to ask again at the next call."""
    return ConvertFrameReturn(FrameExecStrategy(FrameAction.DEFAULT, FrameAction.SKIP), apply_to_code=False)


def is_for(callback: Any, backend: Callable[..., Any]) -> bool:
    """Whether a callback, or what a cache entry has of one, captures for `backend`: in whatever that is wrapped."""
    inner: Any = dynamos_eval_frame.innermost_backend(callback)
    for _ in range(8):
        if inner is backend:
            return True
        wrapped = (getattr(inner, name, None) for name in ("compiler_fn", "func", "__wrapped__"))
        inner = next(filter(None, wrapped), None)
    return False


def arguments_of_backend(callback: Any) -> dict[str, Any]:
    """What `torch.compile` was told for the backend: `dynamic`, `mode` and `options`."""
    wrapper: Any = dynamos_eval_frame.innermost_backend(callback)
    return {"dynamic": getattr(wrapper, "dynamic", None), **getattr(wrapper, "kwargs", {})}


def decides_at_once(frame: Any) -> bool:
    """Whether Dynamo skips `frame` without a look inside."""
    code: CodeType = frame.f_code
    started = frame.f_lasti >= code.co_code[::2].find(_RESUME) + (sys.version_info >= (3, 13))
    return bool(
        started
        or torch._dynamo.config.disable
        or trace_rules.check(code, frame=frame)
        or (code.co_filename == "<string>" and code.co_name == "__new__")
        or (code.co_filename.endswith("collections/__init__.py") and code.co_name == "_make")
    )


_RESUME = opcode.opmap["RESUME"].to_bytes()  # where a frame begins


def skip(frame: Any) -> ConvertFrameReturn | None:
    """What Dynamo answers for a frame that it does not capture, whatever is inside; None for others."""
    if frame.f_code in convert_frame.output_codes:
        return ConvertFrameReturn(skip_reason="frame is already Dynamo-generated code")
    if not convert_frame.has_tensor_in_frame(frame):
        return ConvertFrameReturn(skip_reason="no tensor-related objects found in frame")
    return None


def reason_for_the_call(callback: CatchErrorsWrapper) -> str | None:
    """Why a frame has to be captured in its call; None if it can be captured beside the program."""
    convert = callback._torchdynamo_orig_backend
    config, stance = torch._dynamo.config, dynamos_eval_frame._stance
    if not isinstance(convert, ConvertFrame) or convert._inner_convert._package is not None:
        return "fullgraph, or export"
    if stance.stance != "default" or stance.backend is not None or stance.skip_guard_eval_unsafe:
        return "a stance"
    if config.compiled_autograd or config.replay_record_enabled or config.error_on_recompile:
        return "a setting of Dynamo's"
    if config.enable_compiler_collectives or _active_ddp() is not None:
        return "a distributed program"
    if _get_error_on_graph_break():
        return "error_on_graph_break"
    if _len_torch_dispatch_stack() or maybe_current_level() is not None or forward_ad._current_level >= 0:
        return "a dispatch mode or transform"
    if _function_modes() or not _is_torch_function_enabled() or _is_torch_function_all_disabled():
        return "a torch function mode, or torch functions are disabled"
    if top_saved_tensors_hooks():
        return "hooks on saved tensors"
    if _is_tracing() or symbolic_trace.is_fx_symbolic_tracing() or TracingContext.try_get() is not None:
        return "a trace"
    return "an accelerator" if has_accelerator() else None


def has_accelerator() -> bool:
    """Whether the program uses one."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def is_called_disabled(depth: int) -> bool:
    """Whether a function of `torch._dynamo.disable(recursive=False)` called the frame that Dynamo asks about.

    Dynamo looks for that function right behind its own callback.

    Args:
        depth: how many frames the caller of this is away from Dynamo's callback, itself included.
    """
    return sys._getframe(depth + 1).f_code is _nonrecursive_disable_wrapper_code


def disabled() -> ConvertFrameReturn:
    """What Dynamo answers then."""
    return ConvertFrameReturn(apply_to_code=False, skip_reason="tracing is non-recursively disabled for this frame")


def expect_resets(code: CodeType) -> None:
    """Have `torch._dynamo.reset()` find `code`, which may have no cache entry."""
    convert_frame.input_codes.add(code)


def kin(callback: CatchErrorsWrapper) -> tuple[Any, int]:
    """A key, to compare by `==`: callbacks with the same key share the cache entries of a frame."""
    return dynamos_eval_frame.innermost_backend(callback), get_eval_frame_isolate_recompiles_id()


def fits_an_entry(callback: CatchErrorsWrapper, frame: Any) -> bool:
    """Whether a cache entry, which another thread has made meanwhile, fits the call.

    The caller holds Dynamo's compile lock.
    """
    backend, region = kin(callback)
    entries = _get_cache_entries_for_region(frame.f_code, region)
    return any(entry.backend == backend and entry.guard_manager.check(frame.f_locals) for entry in entries)


def users_code(frame: Any) -> CodeType:
    """The code of the user's function: the frame's, unless that is a shell of Dynamo's around it."""
    code: CodeType = frame.f_code
    if "fn" not in code.co_freevars or not code.co_filename.endswith("torch/_dynamo/external_utils.py"):
        return code
    function = frame.closure[code.co_freevars.index("fn")].cell_contents
    if isinstance(module := getattr(function, "__self__", None), torch.nn.Module):
        function = type(module).forward
    return getattr(function, "__code__", code)


def copied(frame: Any) -> SimpleNamespace:
    """What Dynamo asks a frame for. The frame itself lives only as long as the callback.

    Containers among its arguments are copied: the call may change them before they are traced.
    """
    code: CodeType = frame.f_code
    f_locals: dict[str, Any] = dict(frame.f_locals)
    copies: dict[int, Any] = {}
    for name, value in f_locals.items():
        if type(value) in (list, dict, set):
            f_locals[name] = copies.setdefault(id(value), copy.copy(value))
    return SimpleNamespace(
        f_code=code,
        f_globals=frame.f_globals,
        f_locals=f_locals,
        f_builtins=frame.f_builtins,
        closure=frame.closure,
        f_lasti=frame.f_lasti,
        f_lineno=code.co_firstlineno,
    )


def replace_callback(ours: type[CatchErrorsWrapper], backend: Callable[..., Any]) -> None:
    """Have Dynamo use `ours` as the callback for `backend`, from the next `torch.compile` on."""
    stock = convert_frame.catch_errors_wrapper

    @functools.wraps(stock)
    def catch_errors_wrapper(callback: Any, hooks: Any) -> CatchErrorsWrapper:
        wrapper = ours(callback, hooks)
        return wrapper if is_for(wrapper, backend) else stock(callback, hooks)

    convert_frame.catch_errors_wrapper = catch_errors_wrapper
