"""The decorator `opt_in`: compile a module class, a module or a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, overload

import torch

from . import settings
from .backend import frame_swap_backend
from .frames import dispatch
from .internals import eval_frame, inductor
from .settings import First

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
    first: First | None = None,
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
    first: First | None = None,
    static_module: bool = False,
) -> Any:
    """Compile `target` with frame-swap, with or without arguments: `@opt_in` or `@opt_in(dynamic=True)`.

    Args:
        target: an `nn.Module` class (the calls of all instances are compiled, also those of subclasses), a module
            (changed in place and returned, so that its class, state dict and pickle stay the same) or a function.
        dynamic, fullgraph, mode, options: as for `torch.compile`.
        first: the setting of `frame_swap.configure` for `target`; None for the one in force at capture.
        static_module: a promise about the module, or about each instance of the class. Guards on the module are
            then evaluated once instead of on each call; see below.

    Returns:
        For a class or a module `target` itself, for a function a new callable. Without `target`, the decorator.

    Raises:
        ValueError: an unknown mode or option.
        TypeError: `target` is none of these, or it is a function and `static_module` is True.

    This is for frames that Dynamo captured whole. Once compiled code is installed, a call evaluates the guards and
    runs the code, without `torch.compile`'s wrapper and without frame evaluation. A call takes the path of
    `torch.compile` if the guards do not hold, if the module has hooks, or if a profiler, a tracer, a dispatch mode,
    a functorch transform or a stance is active.

    `static_module=True` promises, from the first call that compiled code serves:

    - The structure of the module does not change: its submodules, and the plain attributes, methods and hooks of
      all of them. Hooks on the module itself may be added and removed.
    - Each parameter and buffer keeps its name, shape, strides, dtype, device and `requires_grad`, and none is
      passed as an argument. Values may change, in place (optimizers, `load_state_dict`) or by assigning a tensor
      with the same properties: each call reads the tensors again.
    - All submodules are in the same mode, training or evaluation, as the module: `module.train()` and `.eval()` may
      be called.
    - The code does not change: no function, class or module that the module's code reaches through globals is
      replaced.

    Guards on inputs, other globals and the global state are evaluated on each call. A broken promise goes
    unnoticed: calls go on running code compiled for the former module, and may return wrong values or crash.
    `torch._dynamo.reset()` ends the promise.
    """
    if first is not None:
        if mode is not None and options is None:  # `torch.compile` takes one of them
            mode, options = None, inductor.options_of(mode, None)
        options = {**(options or {}), "first": first}
    inductor.options_of(mode, settings.with_options(options)[1])  # what is wrong raises here, not at the first call

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
            plain = eval_frame.module_call(target)
            call = eval_frame.traceable(plain, target.forward)
            # If Dynamo has to be led into the call, it adds no guard against hooks on the module.
            hooked = eval_frame.module_call(torch.nn.Module) if call is not plain else None
            replacement = dispatch.module_dispatcher(
                compiled(call), module, static_module=static_module, hooked=hooked
            )
            eval_frame.replace_module_call(target, replacement)
            return target
        if not callable(target) or isinstance(target, type):
            raise TypeError(f"opt_in takes an nn.Module class, a module or a function, not {target!r}")
        if static_module:
            raise TypeError(f"static_module is a promise about a module, and {target!r} is no module")
        return dispatch.dispatcher(compiled(target))

    return apply if target is None else apply(target)
