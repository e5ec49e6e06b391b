"""Inductor's compiled graphs: what it takes to load them.

Functions import Inductor's own names when they are called, as in inductor.py.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import FunctionType, SimpleNamespace
from typing import Any, cast

from . import inductor

__all__ = [
    "GENERATED",
    "cpp_code_cache",
    "cpp_library_file",
    "forget_metrics",
    "gpus_of",
    "import_loading",
    "is_compiled_graph",
    "is_imported",
    "kernel_compilers",
    "load_cpp_library",
    "loaded_modules_forgotten",
    "loading_options",
    "maker_of_modules",
    "set_torch_hash",
    "torch_hash",
    "triton_hashes",
    "without_compiler",
]

_LOADING = (
    "torch._inductor.output_code",
    "torch._inductor.async_compile",
    "torch._inductor.runtime.triton_heuristics",
)
_COMPILING = (*_LOADING, "torch._inductor.select_algorithm")


def is_imported(*, compiler: bool) -> bool:
    """Whether the modules that loading needs are imported, or are being imported by another thread."""
    return sys.modules.keys() >= set(_COMPILING if compiler else _LOADING)


def import_loading(*, compiler: bool) -> None:
    """Import the modules that loading needs; with Inductor's compiler this takes most of a second."""
    for name in _COMPILING if compiler else _LOADING:
        importlib.import_module(name)


def loading_options() -> dict[str, Any]:
    """The argument `fx_config` of `wrap_post_compile`, for an artifact whose forward has not run."""
    from torch._inductor.cudagraph_utils import BoxedDeviceIndex
    from torch._inductor.utils import BoxedBool

    return {
        "cudagraphs": BoxedBool(inductor.inductor_config.triton.cudagraphs),
        "boxed_forward_device_index": BoxedDeviceIndex(None),
    }


def is_compiled_graph(value: Any) -> bool:
    """Whether `value` is Inductor's object for one compiled direction."""
    from torch._inductor.output_code import CompiledFxGraph

    return isinstance(value, CompiledFxGraph)


def gpus_of(direction: Any) -> Iterator[int]:
    """The indices of the GPUs that one direction of an artifact runs on."""
    graph: Any = getattr(direction, "result", None)
    if graph is not None and is_compiled_graph(graph) and set(graph.device_types) - {"cpu"}:
        yield from (index for index in graph.device_idxs if index >= 0)


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Within the block, to load a compiled graph does not import Inductor's compiler.

    Inductor imports it there to look up whether somebody collects generated code, as its tests do. Nobody does
    while it is not imported.
    """
    cache: Any = _codecache().FxGraphCache
    usual = vars(cache)["cache_hit_post_compile"]

    def find(name: str, variables: Any = None, local: Any = None, wanted: Any = (), level: int = 0) -> Any:
        if level == 1 and name == "graph" and f"{variables['__package__']}.graph" not in sys.modules:
            return SimpleNamespace(GraphLowering=SimpleNamespace(save_output_code=None))
        return builtins.__import__(name, variables, local, wanted, level)

    def load(*args: Any) -> Any:
        function = usual.__func__
        variables = {**function.__globals__, "__builtins__": {**vars(builtins), "__import__": find}}
        return FunctionType(function.__code__, variables)(*args)

    cache.cache_hit_post_compile = staticmethod(load)
    try:
        yield
    finally:
        cache.cache_hit_post_compile = usual


def forget_metrics(direction: Any) -> None:
    """Clear the metrics of one direction, which would count its load as a compile."""
    from torch._inductor.metrics import CachedMetricsDeltas, get_metric_fields

    if hasattr(direction, "result") and hasattr(direction.result, "metrics_deltas"):
        direction.result.metrics_deltas = CachedMetricsDeltas(**dict.fromkeys(get_metric_fields(), 0))
        direction.result.counter_deltas.clear()


GENERATED = "torch._inductor.runtime.compile_tasks"
"""What modules of generated Python are named after."""


def _codecache() -> Any:
    return importlib.import_module("torch._inductor.codecache")


def maker_of_modules() -> tuple[Any, str]:
    """The function that makes a module of generated Python, `(key, path, set_sys_modules)`: its owner and name."""
    return _codecache(), "_reload_python_module"


def kernel_compilers() -> Any:
    """The class whose `use_process_pool` says whether processes compile kernels, and starts these processes."""
    return importlib.import_module("torch._inductor.async_compile").AsyncCompile


def torch_hash() -> bytes:
    """The hash of torch's sources. The first time, it takes a tenth of a second."""
    return cast("bytes", _codecache().torch_key())


def set_torch_hash(value: bytes) -> None:
    """Spare this process the search for what `torch_hash` has returned elsewhere."""
    with contextlib.suppress(AssertionError, RuntimeError):  # it has found it already
        _codecache().torch_key.set(value)


def triton_hashes() -> Iterator[tuple[Any, str]]:
    """Functions that hash Triton's sources and backend, each as its owner and its name. They take half a second."""
    compat: Any = importlib.import_module("torch._inductor.runtime.triton_compat")
    if compat.HAS_TRITON:
        yield importlib.import_module(compat.triton_key.__module__), "triton_key"
        yield importlib.import_module("torch.utils._triton"), "triton_hash_with_backend"


@contextlib.contextmanager
def loaded_modules_forgotten() -> Iterator[None]:
    """After the block, remove the generated modules that it loaded from Inductor's list."""
    from torch._inductor.codecache import PyCodeCache

    known = len(PyCodeCache.modules)
    yield
    del PyCodeCache.modules[known:]


def cpp_code_cache() -> Any:
    """The class whose `load_async` compiles C++ kernels, or finds them in a cache, and loads their library."""
    from torch._inductor.codecache import CppCodeCache

    return CppCodeCache


def load_cpp_library(cache: Any, file: str, key: str) -> Any:
    """Load a shared library as `cache` does: the class from `cpp_code_cache`, or a class derived from it."""
    return cache._load_library(file, key)


def cpp_library_file(library: Any) -> str:
    """The path of a shared library that Inductor has loaded, as an extension module or with ctypes."""
    file: str = getattr(library, "__file__", None) or library._name
    return file
