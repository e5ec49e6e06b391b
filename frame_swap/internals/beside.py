"""Dynamo on a thread beside the program: what it needs of the caller's thread, and what it must leave alone.

Guarantees:
- A capture on such a thread leaves alone what the program reads: random generators, the default dtype,
  `torch.compiler.is_compiling()`, `nn.Module`. A trace that would have to change such a thing ends with `GivenUp`.
  Dynamo's counters and its callbacks at the start and end of a compile are as in a call.
- If the process-wide state changes meanwhile, the capture ends with `GivenUp`.
- Other threads, and captures in calls, run Dynamo as it is.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import callback, read_log
from .probe import names_looked_up
from .read_log import GivenUp, ReadLog

with names_looked_up():
    import torch._dynamo
    from torch._C import _PreserveDispatchKeyGuard, _set_grad_enabled
    from torch._dynamo import convert_frame
    from torch._dynamo.convert_frame import compile_lock
    from torch._dynamo.variables import ctx_manager, misc, nn_module, user_defined
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx import _symbolic_trace as symbolic_trace
    from torch.utils._python_dispatch import _disable_current_modes

    _without_inference_mode = (
        getattr(convert_frame, "maybe_disable_inference_mode"),  # noqa: B009
        getattr(convert_frame, "maybe_disable_inference_mode_for_fake_prop"),  # noqa: B009
    )

try:
    from torch._C._dynamo.eval_frame import (
        get_eval_frame_isolate_recompiles_id,
        set_eval_frame_isolate_recompiles_id,
    )
    from torch._dynamo.convert_frame import DynamoOutput
    from torch._dynamo.graph_bytecode_inputs import has_user_objects
    from torch._dynamo.utils import _get_error_on_graph_break

    _HAS_NAMES = True
except ImportError:  # before torch 2.13
    _HAS_NAMES = False

__all__ = [
    "CallersState",
    "GivenUp",
    "checkpoint",
    "is_beside",
    "is_possible",
    "process_checkpoint",
    "trace",
]


def is_possible() -> bool:
    """Whether this torch has what a capture beside the program needs."""
    return _HAS_NAMES and callback.has_names() and read_log.is_possible()


def is_beside() -> bool:
    """Whether the calling thread captures beside the program."""
    return read_log.log() is not None


def checkpoint() -> None:
    """End the capture beside the program, if this is one, and it is to end."""
    if (notes := read_log.log()) is not None:
        notes.checkpoint()


class CallersState:
    """What a trace reads of the state of the calling thread, to be put in place on another."""

    def __init__(self) -> None:
        self.context = contextvars.copy_context()  # torch's configs are context variables
        self._grad = torch.is_grad_enabled()
        self._inference = torch.is_inference_mode_enabled()
        self._autocast = [
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in ("cpu", "cuda")
        ]
        self._cache = torch.is_autocast_cache_enabled()
        self._region = get_eval_frame_isolate_recompiles_id()

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block, the calling thread has this state; it has the default one outside."""
        with contextlib.ExitStack() as stack:
            stack.callback(set_eval_frame_isolate_recompiles_id, set_eval_frame_isolate_recompiles_id(self._region))
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._grad))
            for device, enabled, dtype in self._autocast:
                stack.callback(torch.set_autocast_enabled, device, torch.is_autocast_enabled(device))
                stack.callback(torch.set_autocast_dtype, device, torch.get_autocast_dtype(device))
                torch.set_autocast_enabled(device, enabled)
                torch.set_autocast_dtype(device, dtype)
            stack.callback(torch.set_autocast_cache_enabled, torch.is_autocast_cache_enabled())
            torch.set_autocast_cache_enabled(self._cache)
            yield


def process_checkpoint() -> Callable[[], None]:
    """A function that raises `GivenUp` if the process-wide state that a trace reads is not as it is now."""
    now = _process_state()

    def check() -> None:
        if _process_state() != now:
            raise GivenUp("the default dtype, or another state of the process, has changed")

    return check


def _process_state() -> tuple[Any, ...]:
    return (
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        _get_error_on_graph_break(),
    )


# --- On the thread that captures ---


def trace(
    asked: callback.CatchErrorsWrapper, frame: Any, frame_state: Any, state: CallersState, notes: ReadLog
) -> Any:
    """Let Dynamo capture the copy of a frame, about which it has `asked`; what it reads is noted in `notes`.

    Returns Dynamo's answer.

    Raises:
        GivenUp: the capture is unsound, or is to end.
        Exception: what a capture in the call would have raised, or a race with the program.
    """

    def capture() -> Any:
        with state.in_place(), compile_lock, read_log.noting(notes), _disable_current_modes():
            _install()
            notes.checkpoint()
            result = asked._torchdynamo_orig_backend(frame, None, asked.hooks, frame_state, skip=1)
            notes.checkpoint()
            notes.confirm()
            return result

    return state.context.run(capture)


# --- What is kept off on that thread ---


@functools.cache
def _install() -> None:
    """Have Dynamo look whether it runs beside the program, where it would do something to the whole process.

    The caller holds Dynamo's compile lock: no other thread traces, and no child is forked meanwhile.
    """
    read_log.install()
    convert_frame.trace_frame = _trace_frame(convert_frame.trace_frame)
    if hasattr(torch.compiler, "_compile_session_context"):  # not before torch 2.13
        torch.compiler._compile_session_context = _nothing_beside(torch.compiler._compile_session_context)
    setattr(FakeTensorMode, "dispatch", _with_checkpoint(FakeTensorMode.dispatch))  # noqa: B010
    setattr(DynamoOutput, "build_guards", _with_checkpoint(DynamoOutput.build_guards))  # noqa: B010
    owner: Any
    for owner, name in (
        (symbolic_trace.Tracer, "trace"),  # patches nn.Module, and makes calls of compiled code raise
        (user_defined, "call_random_fn"),
        (misc, "call_random_fn"),
        (ctx_manager.SDPAKernelVariable, "enter"),
        (ctx_manager.CatchWarningsCtxManagerVariable, "enter"),
        (ctx_manager.ErrorOnGraphBreakVariable, "enter"),
    ):
        setattr(owner, name, _refused_beside(getattr(owner, name)))
    nn_module.initialize_lazy_module = _initialize_lazy_module(nn_module.initialize_lazy_module)
    for name in ("torch._guards", "torch._dynamo.guards", "torch._subclasses.fake_tensor"):
        logging.getLogger(name).addFilter(_is_loud_enough)


def _trace_frame(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Without `preserve_global_state`, which sets what other threads may have changed, random generators too."""
    bare = stock.__wrapped__  # type: ignore[attr-defined]

    @functools.wraps(stock)
    def trace_frame(*args: Any, **kwargs: Any) -> Any:
        notes = read_log.log()
        if notes is None:
            return stock(*args, **kwargs)
        grad = torch.is_grad_enabled()
        with contextlib.ExitStack() as stack:
            stack.enter_context(_PreserveDispatchKeyGuard())
            for without in _without_inference_mode:
                stack.enter_context(without())
            if symbolic_trace.CURRENT_PATCHER is not None:  # Dynamo would take its patches back
                raise GivenUp("an FX trace is under way")
            notes.start()
            try:
                _refuse_user_objects()
                result = bare(*args, **kwargs)
                _refuse_user_objects()
                return result
            finally:
                _set_grad_enabled(grad)

    return trace_frame


def _refuse_user_objects() -> None:
    """Dynamo keeps streams and events of graphs in a table of the process, which calls of other graphs use."""
    if has_user_objects():
        raise GivenUp("there are graphs with streams or events", lasting=True)


def _nothing_beside(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def context(*args: Any, **kwargs: Any) -> Any:
        return stock(*args, **kwargs) if read_log.log() is None else contextlib.nullcontext()

    return context


def _refused_beside(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def refused(*args: Any, **kwargs: Any) -> Any:
        if read_log.log() is not None:
            raise GivenUp(f"{stock.__qualname__} changes the program", lasting=True)
        return stock(*args, **kwargs)

    return refused


def _initialize_lazy_module(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def initialize(tx: Any, mod: torch.nn.Module, *args: Any) -> None:
        if read_log.log() is not None and hasattr(mod, "_initialize_hook"):
            raise GivenUp("a lazy module has yet to be initialized by a call")
        stock(tx, mod, *args)

    return initialize


def _with_checkpoint(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def checked(*args: Any, **kwargs: Any) -> Any:
        checkpoint()
        return stock(*args, **kwargs)

    return checked


def _is_loud_enough(record: logging.LogRecord) -> bool:
    """Drop errors of a capture beside the program: it is done again, and in the call if need be."""
    return record.levelno < logging.ERROR or read_log.log() is None
