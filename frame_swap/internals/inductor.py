"""Inductor, and the configs of Inductor, AOTAutograd and Dynamo.

Names of Inductor itself are looked up inside the functions that use them, in a worker or on the loader thread:
importing Inductor takes most of a second, which the first call should not pay for. A name that is gone there fails
the region, and its eager pair goes on serving.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast
from unittest import mock

import torch

from ..errors import nearest
from .probe import names_looked_up

with names_looked_up():
    import torch._dynamo
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config

__all__ = [
    "asks_for_cudagraphs",
    "backward_before_forward",
    "changed_configs",
    "functorch_config",
    "inductor_config",
    "options_of",
    "patch_configs",
    "prepare_cudagraphs",
    "stock_inductor",
]


def _configs() -> dict[str, Any]:
    return {"inductor": inductor_config, "functorch": functorch_config, "dynamo": torch._dynamo.config}


def changed_configs() -> dict[str, dict[str, Any]]:
    """The settings of Inductor, AOTAutograd and Dynamo that differ from their defaults."""
    return {name: config._get_dict(skip_default=True) for name, config in _configs().items()}


@contextlib.contextmanager
def patch_configs(changes: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Apply what `changed_configs` returned in another process. Configs are process-wide, not per thread."""
    with contextlib.ExitStack() as stack:
        for name, config in _configs().items():
            stack.enter_context(config.patch(changes.get(name, {})))
        yield


def asks_for_cudagraphs(options: dict[str, Any]) -> bool:
    """Whether a compile with these changes of Inductor's config is to use CUDA graphs."""
    return bool(options.get("triton.cudagraphs", inductor_config.triton.cudagraphs))


def prepare_cudagraphs(options: dict[str, Any]) -> None:
    """Where a compile is to use CUDA graphs: importing their module makes them usable on this thread only."""
    if asks_for_cudagraphs(options) and torch.cuda.is_available():
        importlib.import_module("torch._inductor.cudagraph_trees")


@contextlib.contextmanager
def backward_before_forward() -> Iterator[None]:
    """Within the block a backward without CUDA graphs, of a forward with them, may be made ready before that ran.

    Each call of such a backward tells the manager of the thread's CUDA graphs that no forward waits for its
    backward any more. PyTorch looks for the manager once, when it compiles the backward, which is after the
    forward ran; here each call looks for it.
    """
    from torch._inductor import output_code

    def tell_manager(graph: Any, forward_device: Any) -> None:
        if not graph.fx_kwargs["is_backward"] or not inductor_config.triton.cudagraph_trees:
            return
        from torch._inductor.cudagraph_trees import get_manager

        device, call = forward_device.value, graph.current_callable

        def run(inputs: list[Any]) -> Any:
            if (manager := get_manager(device, create_if_none_exists=False)) is not None:
                manager.set_to_running_backward()
            return call(inputs)

        graph.current_callable = run

    with mock.patch.object(output_code, "maybe_handle_backward_generation", tell_manager):
        yield


def stock_inductor(
    gm: torch.fx.GraphModule, example_inputs: list[Any], options: dict[str, Any]
) -> Callable[..., Any]:
    """Compile here and now, as `torch.compile` does without us."""
    from torch._inductor.compile_fx import compile_fx

    return cast("Callable[..., Any]", compile_fx(gm, example_inputs, config_patches=options or None))


def options_of(mode: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The changes of Inductor's config that `torch.compile`'s `mode` and `options` ask for.

    Raises:
        ValueError: an unknown mode or option, naming the nearest known one, or a value of the wrong type.
    """
    import torch._inductor
    from torch._inductor import config

    changes: dict[str, Any] = {}
    if mode and mode != "default":
        try:
            changes |= torch._inductor.list_mode_options(mode)
        except (KeyError, RuntimeError):
            known = torch._inductor.list_mode_options()
            raise ValueError(f"unknown mode {mode!r}{nearest(mode, known)}") from None
    known_options = config.get_config_copy()
    for key, value in (options or {}).items():
        name = key.replace("-", "_")
        if name not in known_options:
            raise ValueError(f"unknown option {key!r}{nearest(name, known_options)}")
        expected = config.get_type(name)  # type: ignore[attr-defined]
        if isinstance(expected, type) and not isinstance(value, expected):
            raise ValueError(f"option {key!r}: got {type(value).__name__}, expected {expected.__name__}")
        changes[name] = value
    return changes
