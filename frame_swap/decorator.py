"""The decorator: opt a module class, a module or a function in, each by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, overload

import torch

from .backend import frame_swap_backend
from .frames import dispatch
from .internals import eval_frame, inductor

T = TypeVar("T", bound="type[torch.nn.Module] | torch.nn.Module | Callable[..., Any]")


@overload
def opt_in(target: T, /) -> T: ...


@overload
def opt_in(
    *,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    static_module: bool = False,
) -> Callable[[T], T]: ...


def opt_in(
    target: Any = None,
    /,
    *,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    static_module: bool = False,
) -> Any:
    """Compile `target` with frame-swap, with or without arguments: `@opt_in` or `@opt_in(dynamic=True)`.

    Args:
        target: an `nn.Module` class (each instance's calls are compiled, subclasses' too), a module (changed in
            place and returned, so that its class, state dict and pickle stay what they are) or a function.
        dynamic, fullgraph, mode, options: as for `torch.compile`.
        static_module: a promise about the module, or about each instance of the class; its guards are then
            evaluated once, and not on each call (below).

    Raises:
        ValueError: an unknown mode or option.
        TypeError: `target` is none of these, or a function that `static_module` says something of.

    Once compiled code is in, a frame that Dynamo captured whole is called without `torch.compile`'s wrapper and
    without frame evaluation: its guards are evaluated, then its code runs. A call that misses them, runs under a
    profiler, a tracer, a dispatch mode, a functorch transform or a stance, or meets module hooks, goes the way of
    `torch.compile`.

    What `static_module=True` promises, from the first call that compiled code serves:

    - The module's structure stays: submodules, and of these and itself plain attributes, methods and hooks (hooks
      on the module itself may come and go).
    - Each parameter and buffer keeps its name, shape, strides, dtype, device and `requires_grad`, and none is
      passed as an argument. Values may change, in place (optimizers, `load_state_dict`) or by another tensor of
      that kind: each call reads the tensors anew.
    - Submodules are in training or evaluation mode as the module is: `module.train()` and `.eval()` may be called.
    - The code that it runs stays: no function, class or module that it reaches through globals is replaced.

    Inputs, other globals and the global state are guarded as ever. A broken promise goes unnoticed: calls go on
    with the code compiled for the module as it was, and may return wrong values or crash. `torch._dynamo.reset()`
    ends it.
    """
    inductor.options_of(mode, options)  # an unknown name is an error here, not at the first call

    def compiled(function: Callable[..., Any]) -> Any:
        return torch.compile(
            function,
            backend=frame_swap_backend,
            dynamic=dynamic,
            fullgraph=fullgraph,
            mode=mode,
            options=dict(options) if options else None,
        )

    def apply(target: Any) -> Any:
        module = target if isinstance(target, torch.nn.Module) else None
        if module is not None or (isinstance(target, type) and issubclass(target, torch.nn.Module)):
            # `Module.__call__` prefers `_compiled_call_impl`; on the class it becomes a method of all instances.
            plain = target._call_impl
            call = eval_frame.traceable(plain, target.forward)
            # Where Dynamo has to be led into the call, it does not guard on there being no hooks.
            hooked = torch.nn.Module._call_impl if call is not plain else None
            target._compiled_call_impl = dispatch.module_dispatcher(
                compiled(call), module, static_module=static_module, hooked=hooked
            )
            return target
        if not callable(target) or isinstance(target, type):
            raise TypeError(f"opt_in takes an nn.Module class, a module or a function, not {target!r}")
        if static_module:
            raise TypeError(f"static_module is a promise about a module, and {target!r} is none")
        return dispatch.dispatcher(compiled(target))

    return apply if target is None else apply(target)
