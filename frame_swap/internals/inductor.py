"""Inductor, and the configs of Inductor, AOTAutograd and Dynamo.

Functions import Inductor's own names when they are called, in a worker or on the loader thread: importing Inductor
takes most of a second, and the first call should not wait for that. If such a name is missing, the region fails and
the eager code goes on serving. Names of the configs are cheap, and looked up at import.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch

from ..errors import nearest
from .probe import names_looked_up

with names_looked_up():
    import torch._dynamo
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config
    from torch.utils._config_module import _UNSET_SENTINEL as _UNSET

__all__ = [
    "asks_for_cudagraphs",
    "autotunes",
    "backward_before_forward",
    "build_cpp",
    "caches_are_off",
    "changed_configs",
    "cpp_compiler",
    "cpp_compilers",
    "default_cache_name",
    "find_vector_instructions",
    "forget_written_files",
    "functorch_config",
    "import_compiling",
    "inductor_config",
    "is_scheduler_node",
    "metrics",
    "options_of",
    "patch_configs",
    "prepare_cudagraphs",
    "prepare_for_gpu",
    "serialisable",
    "stock_inductor",
    "without_autotuning",
    "wrap_compilers",
]


def _configs() -> dict[str, Any]:
    return {"inductor": inductor_config, "functorch": functorch_config, "dynamo": torch._dynamo.config}


def changed_configs() -> dict[str, dict[str, Any]]:
    """The settings of Inductor, AOTAutograd and Dynamo that differ from their defaults, by name, sorted.

    A setting that was changed and then changed back is not among them, though PyTorch counts it as changed.
    """
    changes: dict[str, dict[str, Any]] = {}
    for name, config in _configs().items():
        settings = config._get_dict(skip_default=True)
        changes[name] = {key: settings[key] for key in sorted(settings) if not _is_back(config, key, settings[key])}
    return changes


def _is_back(config: Any, name: str, value: Any) -> bool:
    """Whether a setting has its default again, the same in all processes: no variable or service sets another."""
    entry = config._config[name]
    variables = (entry.env_value_default, entry.env_value_force)
    if entry.justknob is not None or any(variable is not _UNSET for variable in variables):
        return False
    try:
        return type(value) is type(entry.default) and bool(value == entry.default)
    except Exception:  # an object whose comparison fails
        return False


@contextlib.contextmanager
def patch_configs(changes: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Within the block, apply the changes that `changed_configs` returned in another process; for all threads."""
    with contextlib.ExitStack() as stack:
        for name, config in _configs().items():
            stack.enter_context(config.patch(changes.get(name, {})))
        yield


def caches_are_off() -> bool:
    """Whether the program wants nothing of earlier runs: `TORCHINDUCTOR_FORCE_DISABLE_CACHES`, or its setting."""
    return bool(inductor_config.force_disable_caches)


def cpp_compilers() -> list[str]:
    """The C++ compilers that Inductor tries, by name; the first that works is used."""
    named = inductor_config.cpp.cxx
    return [name for name in (named if isinstance(named, (list, tuple)) else [named]) if name]


def cpp_compiler() -> str:
    """The C++ compiler that Inductor uses: the first of `cpp_compilers` that works.

    Raises:
        RuntimeError: none works.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    return get_cpp_compiler()


def build_cpp(source: str, folder: str) -> None:
    """Build a library from C++ in `folder`, with the compiler, headers and libraries that Inductor's kernels take.

    Raises:
        RuntimeError: it does not build; the message has the compiler's output.
    """
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions

    path = os.path.join(folder, "source.cpp")
    with open(path, "w", encoding="utf-8") as file:
        file.write(source)
    CppBuilder("built", [path], CppTorchOptions(warning_all=False), folder).build()


def asks_for_cudagraphs(options: dict[str, Any]) -> bool:
    """Whether a compile with these changes of Inductor's config uses CUDA graphs."""
    return bool(options.get("triton.cudagraphs", inductor_config.triton.cudagraphs))


_AUTOTUNING = (
    "max_autotune",
    "max_autotune_gemm",
    "max_autotune_pointwise",
    "coordinate_descent_tuning",
)
"""Switches of Inductor's config that make it time many kernels for one."""


def autotunes(options: dict[str, Any]) -> bool:
    """Whether a compile with these changes of Inductor's config times many kernels for one."""
    return any(options.get(name, getattr(inductor_config, name)) for name in _AUTOTUNING)


def without_autotuning(options: dict[str, Any]) -> dict[str, Any]:
    """These changes of Inductor's config, with which a compile does not."""
    return {**options, **dict.fromkeys(_AUTOTUNING, False)}


def prepare_cudagraphs(options: dict[str, Any]) -> None:
    """If a compile uses CUDA graphs, import their module now: only the importing thread can use them."""
    if asks_for_cudagraphs(options) and torch.cuda.is_available():
        importlib.import_module("torch._inductor.cudagraph_trees")


@contextlib.contextmanager
def backward_before_forward() -> Iterator[None]:
    """Within the block, a backward without CUDA graphs may be loaded before its forward, with CUDA graphs, has run.

    Each call of such a backward tells the manager of the thread's CUDA graphs that the backward is running. PyTorch
    looks up the manager once, when it compiles the backward: the forward has run by then and made the manager. Here
    each call looks it up.
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

    usual = output_code.maybe_handle_backward_generation
    output_code.maybe_handle_backward_generation = tell_manager  # type: ignore[assignment]
    try:
        yield
    finally:
        output_code.maybe_handle_backward_generation = usual


def stock_inductor(
    gm: torch.fx.GraphModule,
    example_inputs: list[Any],
    options: dict[str, Any],
    inner_compile: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Compile in this process, at once, with stock Inductor.

    Args:
        inner_compile: compiles AOTAutograd's graphs; None stands for Inductor.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    made = compile_fx(gm, example_inputs, inner_compile or compile_fx_inner, config_patches=options or None)
    return cast("Callable[..., Any]", made)


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


def default_cache_name() -> str:
    """The name of Inductor's default cache folder, without its parent folder."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return os.path.basename(default_cache_dir())


@contextlib.contextmanager
def serialisable() -> Iterator[None]:
    """Within the block, `stock_inductor` returns callables that can be serialised, by way of Inductor's caches."""
    with (
        inductor_config.patch(force_disable_caches=False),
        functorch_config.patch(
            enable_autograd_cache=True,
            strict_autograd_cache=True,
            bypass_autograd_cache_key=True,
            bundled_autograd_cache=True,
            force_non_lazy_backward_lowering=True,
            force_autograd_cache=True,
        ),
    ):
        yield


def forget_written_files() -> None:
    """Make Inductor write its files again, since the cache folder has changed."""
    from torch._inductor.utils import clear_caches

    clear_caches()


def metrics() -> Any:
    """The module of Inductor's metrics: numbers, and lists."""
    return importlib.import_module("torch._inductor.metrics")


def is_scheduler_node(value: Any) -> bool:
    """Whether `value` is a node of Inductor's scheduler, which refers to the whole graph."""
    from torch._inductor.scheduler import BaseSchedulerNode

    return isinstance(value, BaseSchedulerNode)


def import_compiling() -> None:
    """Import the modules that compiling needs; this takes seconds."""
    import torch._inductor.compile_fx  # noqa: F401


def prepare_for_gpu() -> None:
    """Do ahead what each compile for a GPU does first: hash torch's and Triton's sources, start the compilers.

    It takes no memory of a GPU.
    """
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codecache import torch_key
    from torch._inductor.runtime import triton_compat

    AsyncCompile.wakeup()
    torch_key()
    if triton_compat.HAS_TRITON:
        triton_compat.triton_key()


def wrap_compilers(call: Callable[..., Any]) -> None:
    """From now on, in this process, Inductor runs each compiler of C++ and Triton by way of `call`.

    Args:
        call: gets a function and its arguments, and returns what it returns; importable, since Triton's compiler
            runs in further processes.
    """
    async_compile: Any = importlib.import_module("torch._inductor.async_compile")
    compilers = async_compile.AsyncCompile
    submit = vars(compilers)["submit"].__func__

    def submit_wrapped(cls: Any, task: Callable[..., Any]) -> Any:
        return submit(cls, functools.partial(call, task))

    compilers.submit = classmethod(submit_wrapped)
    async_compile._worker_compile_triton = functools.partial(call, async_compile._worker_compile_triton)


def find_vector_instructions() -> None:
    """Find the CPU's vector instructions; the first time on a machine, with runs of the C++ compiler.

    From now on Inductor tries them from the best down, and no further than it has to. It would try all of them and
    then take the best: six builds in place of three on a CPU with AVX-512, and 7.2 s of compilers in place of 2.8.
    """
    from torch._inductor import cpu_vec_isa

    if platform.machine() in ("x86_64", "AMD64") and sys.platform in ("linux", "win32"):
        flags = cpu_vec_isa.x86_isa_checker()
        named = [isa for isa in cpu_vec_isa.supported_vec_isa_list if all(f in flags for f in str(isa).split())]
        inductors: Any = cpu_vec_isa
        inductors.valid_vec_isa_list = functools.partial(_Working, named)
    cpu_vec_isa.pick_vec_isa()


class _Working:
    """Of vector instructions, those that the compiler and the CPU know; each is tried when it is reached."""

    def __init__(self, candidates: Sequence[Any]) -> None:
        self._candidates = candidates

    def __iter__(self) -> Iterator[Any]:
        return (isa for isa in self._candidates if isa)

    def __bool__(self) -> bool:
        return next(iter(self), None) is not None

    def __getitem__(self, at: int) -> Any:
        return next(itertools.islice(self, at, None))
