"""Which graphs and settings a worker cannot be given: each refusal is an `Unshippable` with its reason."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule

from ..errors import Unshippable, first_line
from ..internals import aot, dispatcher
from . import operators
from .held import attribute

_COLLECTIVE = ("_c10d_functional", "_c10d_functional_autograd", "c10d", "symm_mem")
"""dispatcher.Namespaces of operators that communicate with other processes of the program."""


def check_graph(gm: GraphModule) -> list[dispatcher.OpOverload]:
    """Refuse a graph that no worker can compile; return the custom operators that it calls.

    Raises:
        Unshippable: with the reason.
    """
    if aot.saving_is_traced():
        raise Unshippable("hooks on saved tensors that are graphs themselves become a part of it")
    custom: dict[dispatcher.OpOverload, None] = {}
    for module in gm.modules():
        if not isinstance(module, GraphModule):
            continue  # a container of graphs; a module that is called is refused below
        for node in module.graph.nodes:
            if node.op == "get_attr" and isinstance(attribute(module, node.target), torch.Tensor):
                raise Unshippable(f"a graph within the graph holds a tensor: {node.target}")
            if node.op == "call_module" and not isinstance(module.get_submodule(node.target), GraphModule):
                raise Unshippable(f"the graph calls a module: {node.target}")
            if isinstance(node.target, (dispatcher.OpOverload, dispatcher.OpOverloadPacket)):
                if str(node.target).partition(".")[0] in _COLLECTIVE:
                    raise Unshippable(f"the graph calls {node.target}, and a worker is in no process group")
                if operators.is_custom(node.target):
                    custom.update(dict.fromkeys(operators.overloads(node.target)))
    return list(custom)


def check_settings(settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse settings that no worker can apply.

    Args:
        settings: by the name of the config, or "options" for those of this compile.

    Raises:
        Unshippable: with the reason.
    """
    for config, values in settings.items():
        for name, value in values.items():
            try:
                pickle.dumps(value)
            except Exception as error:
                raise Unshippable(f"{config} config {name} cannot be pickled: {first_line(error)}") from error


def check_subclass(cls: type) -> None:
    """Refuse a class of tensors that a worker cannot import.

    Raises:
        Unshippable: with the reason.
    """
    name = f"{cls.__module__}.{cls.__qualname__}"
    if cls.__module__.startswith("torch.distributed."):
        raise Unshippable(f"an input is a {name}, whose process group a worker is not part of")
    found: Any = sys.modules.get(cls.__module__) if cls.__module__ != "__main__" else None
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    if found is not cls:
        raise Unshippable(f"an input is a tensor subclass that a worker cannot import: {name}")
