"""The pair: AOTAutograd's eager forward and backward of a graph, which serve calls while it compiles."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from typing import Any

import psutil
import torch
from functorch.compile import default_partition  # type: ignore[import-untyped]

from . import internals
from .compiling.service import service

Boxed = Callable[[list[Any]], Any]


def trace_pair(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """Trace `gm` into an eager forward and backward, with no Inductor decompositions.

    The default partition saves what eager would save; the min-cut one recomputes activations in the
    backward, which pays only where Inductor fuses the recomputation away, and takes longer to find.

    Returns a callable that takes the graph's inputs and returns the tuple of its outputs.
    """
    trace = internals.aot_autograd(
        fw_compiler=_eager,
        bw_compiler=_eager_backward,
        partition_fn=default_partition,
        keep_inference_input_mutations=True,
    )
    pair: Callable[..., Any] = trace(gm, example_inputs)
    return pair


def _eager(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Boxed:
    """Run the graph op by op, leaving a core to each worker that compiles.

    Threads that wait for each other at the end of each op, spinning as OpenMP's do, lose far more than their
    share when a worker takes one of their cores: on two cores, steps of 36 ms took 220 ms beside a worker and
    90 ms on the one thread left, and compiled code came sooner too.

    Graphs with convolutions keep their threads: whether there is more than one decides which of PyTorch's
    backends a convolution runs on, and so the layout of its output.
    """
    run: Boxed = _uncounted_changes(gm, internals.boxed_nop(gm, example_inputs))
    if any("convolution" in str(node.target) for node in gm.graph.nodes):
        return run

    def run_beside_workers(args: list[Any]) -> Any:
        threads = service.threads_for_program()
        if threads is None or threads >= (usual := torch.get_num_threads()):
            return run(args)
        torch.set_num_threads(threads)
        _end_idle_threads()
        try:
            return run(args)
        finally:
            torch.set_num_threads(usual)

    run_beside_workers._boxed_call = True  # type: ignore[attr-defined]
    return run_beside_workers


def _eager_backward(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Boxed:
    """Run op by op, the backward overwrites nothing that is saved: it may be called again."""
    context = internals.TracingContext.try_get()
    if context is not None and context.fw_metadata is not None:
        context.fw_metadata.bw_donated_idxs = []
    return _eager(gm, example_inputs)


def _uncounted_changes(gm: torch.fx.GraphModule, run: Boxed) -> Boxed:
    """Leave it to AOTAutograd's wrapper to count that inputs are changed in place (`Tensor._version`).

    It does so because Inductor's code does not count; the eager operators would count a second time.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    copy = torch.ops.aten.copy_.default
    changed = [at for at, x in enumerate(inputs) if any(u.target is copy and u.args[0] is x for u in x.users)]
    if not changed:
        return run

    def run_uncounted(args: list[Any]) -> Any:
        counted = tuple(args[at] for at in changed if not args[at].is_inference())
        with torch.autograd._unsafe_preserve_version_counter(counted):  # type: ignore[attr-defined]
            return run(args)

    run_uncounted._boxed_call = True  # type: ignore[attr-defined]
    return run_uncounted


def _end_idle_threads() -> None:
    """End the OpenMP threads that this thread's earlier ops left spinning on a core (up to 15 ms each time)."""
    if (openmp := _openmp()) is not None:
        openmp.omp_pause_resource_all(1)  # omp_pause_soft; concerns the calling thread's team only


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    libraries = (m.path for m in psutil.Process().memory_maps() if "omp" in os.path.basename(m.path))
    for path in libraries:
        library = ctypes.CDLL(path)
        if hasattr(library, "omp_pause_resource_all"):
            return library
    return None
