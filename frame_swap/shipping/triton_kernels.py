"""The program's own Triton kernels, in a worker.

Dynamo's graph names a kernel by its index in a table of the process, and so the constants that are not part of the
graph. The kernel itself does not pickle; a worker imports it from its module, under its name there, and gives it an
index of its own. Inductor copies the kernel's source into the code that it generates, so nothing of this is needed
to load the artifact.

A kernel of `__main__` is not to be found so: a worker does not run the program.
"""

from __future__ import annotations

import dataclasses
import importlib
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
    """The Triton kernels that a graph launches: by index, the module and the name in it; and their constants."""

    kernels: dict[int, tuple[str, str]]
    constants: dict[int, bytes]

    def register(self, gm: GraphModule) -> None:
        """In a worker: import the kernels, and have `gm` refer to this process's table."""
        table = dispatcher.kernel_side_table
        kernels = {index: table.add_kernel(imported(*name)) for index, name in self.kernels.items()}
        constants = {index: table.add_constant_args(pickle.loads(c)) for index, c in self.constants.items()}
        for node, index, arguments in _launches(gm):
            here = {"kernel_idx": kernels[index], "constant_args_idx": constants[arguments]}
            node.kwargs = {**node.kwargs, **here}


def kernels_of(gm: GraphModule) -> Kernels | None:
    """What a worker needs of the kernels that `gm` launches; None where it launches none.

    Raises:
        Unshippable: a kernel cannot be imported, or a constant cannot be pickled.
    """
    table = dispatcher.kernel_side_table
    kernels: dict[int, tuple[str, str]] = {}
    constants: dict[int, bytes] = {}
    for _, index, arguments in _launches(gm):
        kernels[index] = module_and_name(table.get_kernel(index))
        try:
            constants[arguments] = pickle.dumps(table.get_constant_args(arguments))
        except Exception as error:
            raise Unshippable(f"an argument of Triton kernel {kernels[index][1]}: {first_line(error)}") from error
    return Kernels(kernels, constants) if kernels else None


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
