"""The decorator: opt a module class, a module or a function in, each by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, overload

import torch

from . import settings
from .backend import frame_swap_backend

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
) -> Callable[[T], T]: ...


def opt_in(
    target: Any = None,
    /,
    *,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Compile `target` with frame-swap, with or without arguments: `@opt_in` or `@opt_in(dynamic=True)`.

    Args:
        target: an `nn.Module` class (each instance's calls are compiled, subclasses' too), a module (changed in
            place and returned, so that its class, state dict and pickle stay what they are) or a function.
        dynamic, fullgraph, mode, options: as for `torch.compile`.

    Raises:
        ValueError: an unknown mode or option.
        TypeError: `target` is none of these.
    """
    settings.inductor_options(mode, options)  # an unknown name is an error here, not at the first call

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
        if isinstance(target, type) and issubclass(target, torch.nn.Module):
            # `Module.__call__` prefers `_compiled_call_impl`; on the class it becomes a method of all instances.
            target._compiled_call_impl = compiled(target._call_impl)
        elif isinstance(target, torch.nn.Module):
            target._compiled_call_impl = compiled(target._call_impl)
        elif callable(target) and not isinstance(target, type):
            return compiled(target)
        else:
            raise TypeError(f"opt_in takes an nn.Module class, a module or a function, not {target!r}")
        return target

    return apply if target is None else apply(target)
