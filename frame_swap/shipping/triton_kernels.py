"""The program's own Triton kernels, in a worker.

Dynamo's graph refers to a kernel, and to constants that are not part of the graph, by indices in tables of the
process. The graph that travels has numbers of its own instead, in the order of the launches. A kernel that is in a
module, under its name, is imported there by the worker, which gives it an index in its own table. One that is not,
since it is of `__main__`, or since Dynamo has wrapped it anew, travels by value; see triton_by_value.py. Inductor
copies the kernel's source into the code that it generates, so loading the artifact needs none of this.
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
from . import triton_by_value


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The Triton kernels that a graph launches, and their constants; a graph's numbers are indices of these.

    Attributes:
        kernels: of each, the module and the name in it; or its value, pickled.
        sources: of each, a text that changes with its source. It sets the contents of two programs apart whose
            kernels have the same names; a worker does not read it.
        constants: pickled.
    """

    kernels: tuple[tuple[str, str] | bytes, ...]
    sources: tuple[str, ...]
    constants: tuple[bytes, ...]

    def register(self, gm: GraphModule) -> None:
        """In a worker: import the kernels, and have `gm` refer to this process's table."""
        table = dispatcher.kernel_side_table
        known = [triton_by_value.unpack(k) if isinstance(k, bytes) else imported(*k) for k in self.kernels]
        kernels = [table.add_kernel(kernel) for kernel in known]
        constants = [table.add_constant_args(pickle.loads(pickled)) for pickled in self.constants]
        for node, number, arguments in _launches(gm):
            _refer(node, kernels[number], constants[arguments])


def detach(gm: GraphModule) -> Kernels | None:
    """Describe the kernels that `gm` launches, and have it refer to the description; None where it launches none.

    Raises:
        Unshippable: a kernel can neither be imported nor be pickled, or a constant cannot be pickled.
    """
    table = dispatcher.kernel_side_table
    numbers: dict[int, int] = {}
    constants: list[bytes] = []
    kernels: list[tuple[str, str] | bytes] = []
    sources: list[str] = []
    for node, index, arguments in _launches(gm):
        if index not in numbers:
            numbers[index] = len(kernels)
            kernel = table.get_kernel(index)
            kernels.append(_described(kernel))
            sources.append(_source(kernel))
        try:
            constants.append(pickle.dumps(table.get_constant_args(arguments)))
        except Exception as error:
            name = triton_by_value.function_of(table.get_kernel(index)).__qualname__
            raise Unshippable(f"an argument of Triton kernel {name}: {first_line(error)}") from error
        _refer(node, numbers[index], len(constants) - 1)
    return Kernels(tuple(kernels), tuple(sources), tuple(constants)) if kernels else None


def _described(kernel: Any) -> tuple[str, str] | bytes:
    try:
        return module_and_name(kernel)
    except Unshippable as error:
        try:
            return triton_by_value.pack(kernel)
        except Exception as another:
            raise Unshippable(f"{error}; nor can it be pickled: {first_line(another)}") from another


def module_and_name(kernel: Any) -> tuple[str, str]:
    """Where a kernel can be imported from, with what `triton.autotune` and the like have put around it.

    Raises:
        Unshippable: it is not there, or its module cannot be imported.
    """
    function = triton_by_value.function_of(kernel)
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
