"""AOTInductor's packages: a graph lowered to C++ that PyTorch's runner calls, without any Python code.

Dynamo's graph is not exported once more. AOTAutograd traces it as ever, and its graph goes into AOTInductor's
lowering in place of Inductor's, as PyTorch does with `enable_autograd_for_aot`. So what surrounds compiled code is
the same for both kinds: inputs that change in place, aliased outputs, late guards.

Functions import Inductor's own names when they are called, as in inductor.py.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from . import inductor

MODEL = "model"
"""The name of the one model in a package."""


OPTIONS = {"aot_inductor.package": True}
"""Changes of Inductor's config for such a compile: PyTorch's caches must not take other results for it."""


class Unpackaged(Exception):
    """Why a graph is no package; the text says so, in words that fit behind "no package: "."""


def inner_compile(freezes: bool, options: dict[str, Any], devices: Iterable[str]) -> Callable[..., Any]:
    """What `compile_fx` calls for a graph of AOTAutograd's, to get a package of it.

    Args:
        freezes: whether values of parameters become constants of the code.
        options: changes of Inductor's config.
        devices: types of those that the graph runs on.

    Raises:
        Unpackaged: what stands in the way of this graph; also in a call.
    """
    if others := set(devices) - {"cpu"}:  # for want of Triton's kernels the lowering fails there
        raise Unpackaged(f"it runs on {' and '.join(sorted(others))}, and packages are for CPUs")
    if freezes:
        raise Unpackaged("freezing makes constants that travel beside the code")
    if inductor.asks_for_cudagraphs(options):
        raise Unpackaged("it uses CUDA graphs")

    def compile_package(gm: GraphModule, inputs: Sequence[Any], **keywords: Any) -> Any:
        if not keywords.get("is_inference"):
            raise Unpackaged("it has a backward")
        gm = GraphModule(gm, copy.deepcopy(gm.graph))  # another attempt may follow, and lowering changes it
        positions = _without_symbols(gm)
        static = [positions.index(at) for at in keywords.get("static_input_idxs") or () if at in positions]
        keywords |= {"static_input_idxs": static, "cpp_wrapper": True, "cudagraphs": False}
        files = _lower(gm, [inputs[at] for at in positions], keywords)
        return _package()(_zipped(files), tuple(positions) if len(positions) < len(inputs) else None)

    return compile_package


def _lower(gm: GraphModule, inputs: list[Any], keywords: dict[str, Any]) -> list[Any]:
    """AOTInductor's files for a graph."""
    from torch._inductor import compile_fx, config
    from torch._inductor.virtualized import V

    (output,) = gm.graph.find_nodes(op="output")
    specs = {
        "aot_inductor.serialized_in_spec": _spec(((None,) * len(inputs), {})),
        "aot_inductor.serialized_out_spec": _spec((None,) * len(output.args[0])),
    }
    with V.set_aot_compilation(True), config.patch(cpp_wrapper=True, **specs):
        files: Any = compile_fx.compile_fx_inner(gm, inputs, **keywords)
    return list(files.filename)


def _spec(tree: Any) -> str:
    """How Python's `aoti_load_package` finds tensors in the arguments of a call, and makes the result of them."""
    return pytree.treespec_dumps(pytree.tree_structure(tree, is_leaf=lambda leaf: leaf is None))


def _zipped(files: list[Any]) -> bytes:
    """The package of these files."""
    from torch._inductor.package.package import package_aoti

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"{MODEL}.pt2")
        package_aoti(path, {MODEL: files})
        with open(path, "rb") as file:
            return file.read()


def _without_symbols(gm: GraphModule) -> list[int]:
    """Remove the inputs that are sizes: a package reads sizes off its tensors. Returns the positions of the others.

    Raises:
        Unpackaged: a symbol is no size of a tensor.
    """
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    sizes: dict[Any, tuple[Node, int]] = {}
    for node in inputs:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            for dimension, size in enumerate(value.shape):
                if isinstance(size, torch.SymInt):
                    sizes.setdefault(size.node.expr, (node, dimension))
    kept = []
    for at, node in enumerate(inputs):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            kept.append(at)
            continue
        if not isinstance(value, torch.SymInt) or value.node.expr not in sizes:
            raise Unpackaged(f"its input {node.name} is neither a tensor nor a size of one")
        if node.users:
            tensor, dimension = sizes[value.node.expr]
            with gm.graph.inserting_after(inputs[-1]):
                size_of = gm.graph.call_function(torch.ops.aten.sym_size.int, (tensor, dimension))
            size_of.meta["val"] = value
            node.replace_all_uses_with(size_of)
        gm.graph.erase_node(node)
    gm.recompile()
    return kept


def load(package: bytes) -> Any:
    """PyTorch's runner of a package. It has no Python code, and takes milliseconds to load.

    Raises:
        RuntimeError: it cannot be loaded here.
    """
    with tempfile.NamedTemporaryFile(suffix=".pt2") as file:
        file.write(package)
        file.flush()
        return torch._C._aoti.AOTIModelPackageLoader(file.name, MODEL, False, 1, -1)


def is_package(value: Any) -> bool:
    """Whether `value` is a compiled graph of this kind."""
    kind = globals().get("Package")
    return kind is not None and isinstance(value, kind)


def __getattr__(name: str) -> Any:
    """`Package` is made when it is asked for, as by an artifact: it derives from a class of Inductor's."""
    if name != "Package":
        raise AttributeError(name)
    return _package()


def _package() -> type:
    if "Package" in globals():
        return globals()["Package"]  # type: ignore[no-any-return]
    from torch._inductor.output_code import OutputCode

    class Package(OutputCode):
        """A compiled graph.

        Attributes:
            package: its bytes.
            positions: of the inputs that it takes, where it does not take all.
            current_callable: takes the list of inputs; None until it is loaded.
        """

        _boxed_call = True

        def __init__(self, package: bytes, positions: tuple[int, ...] | None) -> None:
            super().__init__()
            self.package = package
            self.positions = positions
            self.current_callable: Callable[[list[Any]], Any] | None = None

        def __call__(self, inputs: Sequence[Any]) -> Any:
            assert self.current_callable is not None
            return self.current_callable(list(inputs))

        def __getstate__(self) -> dict[str, Any]:
            return {**vars(self), "current_callable": None}

        def prepare_for_serialization(self) -> None:
            """It is bytes already."""

        def post_compile(self, *_: Any) -> None:
            if self.current_callable is None:
                self.current_callable = taking(load(self.package).boxed_run, self.positions)

        def set_triton_bundle(self, triton_bundle: Any) -> None:
            """Kernels are in the package."""

    Package.__qualname__ = "Package"
    globals()["Package"] = Package
    return Package


def taking(run: Callable[[list[Any]], Any], positions: Sequence[int] | None) -> Callable[[list[Any]], Any]:
    """`run`, called with the inputs at these positions; None stands for all."""
    if positions is None:
        return run

    def run_with_tensors(inputs: list[Any]) -> Any:
        taken = [inputs[at] for at in positions]
        inputs.clear()
        return run(taken)

    return run_with_tensors
