"""Triton kernels that generated code launches directly.

Generated code calls a kernel's `run`, which asks at each call whether something is still to be compiled, tuned,
saved or written down; then it calls a generated function, this a method, and this the function in C that launches.
Of a kernel that was loaded the answers are known: its `run` is replaced by a function that works out the grid and
calls the function in C. On an H200's host a launch takes 2.7 µs less by that, and a step of GPT-2 0.84 of the time.

Guarantees:
- The grid is the one of Inductor's own expressions; arguments and stream are the same.
- While a profiler or PyTorch's debug mode is on, Inductor's `run` runs, and they see what they would see.
- What may still have to do something in `run`, such as to tune, keeps Inductor's. So do kernels that PyTorch's own
  static launcher does not launch, and those of PyTorch 2.13 and newer, which take a short way by themselves.

The static launcher takes a kernel where it finds Triton's file of it. Triton cuts the names of its files after 150
characters, and PyTorch does not look for these: three of GPT-2's 13 kernels had to be loaded by Triton itself,
which takes longer. So a worker gives kernels names that are not cut.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch

from . import gpu

__all__ = ["launch_directly", "named_shortly", "noted"]


class Note(NamedTuple):
    """What a launcher was generated from.

    Attributes:
        parameters: the names of what it is called with, without the stream.
        arguments: expressions of what the kernel gets.
        grid: Inductor's expressions of the grid, and the statements before them.
    """

    parameters: list[str]
    arguments: list[str]
    grid: Any


_NOTE = "_frame_swap_note"


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """Within the block, launchers that are made carry what `launch_directly` needs.

    Process-wide.
    """
    heuristics = _heuristics()
    if heuristics is None:
        yield
        return
    owner = heuristics.CompileResult
    usual = owner._gen_launcher_code

    def generate(self: Any, scope: dict[str, Any], parameters: list[str], arguments: list[str]) -> Any:
        launcher = usual(self, scope, parameters, arguments)
        grid = heuristics.GridExpr.from_meta(self.inductor_meta, self.config)
        setattr(launcher, _NOTE, Note(parameters, arguments[4:], grid))  # the others are the grid and the stream
        return launcher

    owner._gen_launcher_code = generate
    try:
        yield
    finally:
        owner._gen_launcher_code = usual


def launch_directly(module: ModuleType) -> None:
    """Give kernels of a generated module a `run` of their own: those that were `noted` and need no more."""
    heuristics = _heuristics()
    if heuristics is None:
        return
    for value in vars(module).values():
        if type(value) is heuristics.CachingAutotuner and _is_settled(value):
            value.run = _direct(value, heuristics)


_LONGEST = 120
"""Characters of a name, without what says its kind and number, and without the ending of its file."""


@contextlib.contextmanager
def named_shortly() -> Iterator[None]:
    """In a worker: within the block, kernels are compiled under names that Triton need not cut.

    Process-wide; needs Triton.
    """
    codegen: Any = importlib.import_module("torch._inductor.codegen.triton")
    usual = codegen.get_fused_kernel_name

    def name(*args: Any) -> str:
        return str(usual(*args))[:_LONGEST].rstrip("_")

    codegen.get_fused_kernel_name = name
    try:
        yield
    finally:
        codegen.get_fused_kernel_name = usual


def _heuristics() -> Any:
    """Inductor's module of kernels, where there is Triton for CUDA and no shorter way in it."""
    if not gpu.has_triton() or torch.version.hip:
        return None
    heuristics: Any = importlib.import_module("torch._inductor.runtime.triton_heuristics")
    return None if hasattr(heuristics.CachingAutotuner, "_build_fast_launcher") else heuristics


def _is_settled(kernel: Any) -> bool:
    """Whether all that `run` has to do is to launch the only launcher there is, by PyTorch's own function."""
    if len(kernel.launchers) != 1:
        return False
    [launcher] = kernel.launchers
    is_tuned = getattr(launcher.config, "found_by_coordesc", False)
    still_to_do = (
        kernel.triton_interpret,
        kernel.dump_launch_params,
        kernel.dump_launch_tensors,
        launcher.store_cubin,
        kernel.inductor_meta.get("coordinate_descent_tuning", False) and not is_tuned,
    )
    return hasattr(launcher, _NOTE) and getattr(launcher, "_is_static", False) and not any(still_to_do)


_RUN = """\
def run({parameters}, *, stream, **_fs_options):
    if _fs_profiler._is_profiler_enabled or _fs_options or _fs_debug_mode():
        return _fs_usual({parameters}, stream=stream, **_fs_options)
    {statements}
    _fs_launch({function}, {grid.x_grid}, {grid.y_grid}, {grid.z_grid},
        {warps}, {shared}, {types!r}, ({arguments},), stream)
"""


def _direct(kernel: Any, heuristics: Any) -> Any:
    """What launches `kernel` as its static launcher's method `run` does."""
    [launcher] = kernel.launchers
    note: Note = getattr(launcher, _NOTE)
    static = launcher.__globals__["runner"].__self__
    scratches = bool(static.has_global_scratch) + bool(static.has_profile_scratch)  # which no kernel here uses
    source = _RUN.format(
        parameters=", ".join(note.parameters),
        grid=note.grid,
        statements="\n    ".join(note.grid.prefix) or "pass",
        function=static.function,
        warps=static.num_warps,
        shared=static.shared,
        types=static.arg_tys + "O" * scratches,
        arguments=", ".join([*note.arguments, *["None"] * scratches]),
    )
    names = {
        **launcher.__globals__,
        "_fs_profiler": heuristics.autograd_profiler,
        "_fs_debug_mode": heuristics.get_active_debug_mode,
        "_fs_usual": kernel.run,
        "_fs_launch": static.C_impl._launch_kernel,
    }
    exec(compile(source, f"<the launch of {static.name}>", "exec", dont_inherit=True), names)
    return names["run"]
