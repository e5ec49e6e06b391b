"""The program's own Triton kernels, in a worker.

Dynamo's graph refers to a kernel, and to constants that are not part of the graph, by indices in tables of the
process. The graph that travels has numbers of its own instead, in the order of the launches. The kernel itself does
not pickle; a worker imports it from its module, under its name there, and gives it an index in its own table.
Inductor copies the kernel's source into the code that it generates, so loading the artifact needs none of this.

A kernel of `__main__` cannot be imported: a worker does not run the program.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import operator
import pickle
import sys
from collections.abc import Iterator
from typing import Any

from torch.fx import GraphModule, Node

from ..errors import Unshippable, first_line
from ..internals import dispatcher


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The Triton kernels that a graph launches, and their constants; a graph's numbers are indices of these.

    Attributes:
        kernels: of each, the module and the name in it.
        sources: of each, a text that changes with its source. It sets the contents of two programs apart whose
            kernels have the same names; a worker does not read it.
        constants: pickled.
    """

    kernels: tuple[tuple[str, str], ...]
    sources: tuple[str, ...]
    constants: tuple[bytes, ...]

    def register(self, gm: GraphModule) -> None:
        """In a worker: import the kernels, and have `gm` refer to this process's table."""
        table = dispatcher.kernel_side_table
        kernels = [table.add_kernel(imported(*name)) for name in self.kernels]
        constants = [table.add_constant_args(pickle.loads(pickled)) for pickled in self.constants]
        for node, number, arguments in _launches(gm):
            _refer(node, kernels[number], constants[arguments])


def detach(gm: GraphModule) -> Kernels | None:
    """Describe the kernels that `gm` launches, and have it refer to the description; None where it launches none.

    Raises:
        Unshippable: a kernel cannot be imported, or a constant cannot be pickled.
    """
    table = dispatcher.kernel_side_table
    numbers: dict[int, int] = {}
    constants: list[bytes] = []
    names: list[tuple[str, str]] = []
    sources: list[str] = []
    for node, index, arguments in _launches(gm):
        if index not in numbers:
            numbers[index] = len(names)
            kernel = table.get_kernel(index)
            names.append(module_and_name(kernel))
            sources.append(_source(kernel))
        name = names[numbers[index]][1]
        try:
            constants.append(pickle.dumps(table.get_constant_args(arguments)))
        except Exception as error:
            raise Unshippable(f"an argument of Triton kernel {name}: {first_line(error)}") from error
        _refer(node, numbers[index], len(constants) - 1)
    return Kernels(tuple(names), tuple(sources), tuple(constants)) if names else None


def module_and_name(kernel: Any) -> tuple[str, str]:
    """Where a kernel can be imported from, with what `triton.autotune` and the like have put around it.

    Raises:
        Unshippable: it is not there, or its module cannot be imported.
    """
    function = kernel
    while hasattr(function, "fn"):
        function = function.fn
    module, name = function.__module__, function.__qualname__
    if getattr(sys.modules.get(module), "__spec__", None) is None or module == "__main__":
        raise Unshippable(f"Triton kernel {name} is in {module}, which a worker cannot import: move it to a module")
    try:
        found = imported(module, name)
    except AttributeError:
        found = None
    if found is not kernel:
        raise Unshippable(f"Triton kernel {name} is not what its module {module} has under that name")
    return module, name


def imported(module: str, name: str) -> Any:
    """The kernel that `module_and_name` found."""
    return operator.attrgetter(name)(importlib.import_module(module))


def _launches(gm: GraphModule) -> Iterator[tuple[Node, Any, Any]]:
    """Each node that launches a kernel, with the indices of the kernel and of its constants."""
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, GraphModule) else ():
            if dispatcher.is_triton_kernel(node.target):
                yield node, node.kwargs["kernel_idx"], node.kwargs["constant_args_idx"]


def _refer(node: Node, kernel: int, constants: int) -> None:
    node.kwargs = {**node.kwargs, "kernel_idx": kernel, "constant_args_idx": constants}


def _source(kernel: Any) -> str:
    """The kernel's source with that of the functions that it calls, and what `triton.autotune` tries."""
    parts: list[str] = []
    while hasattr(kernel, "fn"):
        parts += [type(kernel).__name__, *map(str, getattr(kernel, "configs", ()))]
        digest = getattr(kernel, "cache_key", None)  # of Triton's own cache: it follows calls
        if isinstance(digest, str):
            return "\n".join((*parts, digest))
        kernel = kernel.fn
    return "\n".join((*parts, inspect.getsource(kernel)))
