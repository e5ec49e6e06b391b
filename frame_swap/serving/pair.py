"""The pair: AOTAutograd's eager forward and backward of a graph, which serve calls while it compiles.

Guarantees:
- A call on the pair changes how many threads the calling thread's ops may use, and puts that back. Not so for
  threads that start meanwhile, which would keep what `torch.set_num_threads` has set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..farm.service import service
from ..internals import aot, fake_tensors
from ..runtime import openmp

Boxed = Callable[[list[Any]], Any]


def trace_pair(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """Trace `gm` into an eager forward and backward, with no Inductor decompositions.

    The default partition saves what eager would save; the min-cut one recomputes activations in the
    backward, which pays only where Inductor fuses the recomputation away, and takes longer to find.

    Returns a callable that takes the graph's inputs and returns the tuple of its outputs.
    """
    trace = aot.aot_autograd(
        fw_compiler=_eager,
        bw_compiler=_eager_backward,
        partition_fn=aot.default_partition,
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
    run: Boxed = _uncounted_changes(gm, aot.boxed_nop(gm, example_inputs))
    if any("convolution" in str(node.target) for node in gm.graph.nodes):
        return run

    def run_beside_workers(args: list[Any]) -> Any:
        return openmp.call_on_threads(service.threads_for_program(), run, args)

    aot.mark_boxed(run_beside_workers)
    return run_beside_workers


def _eager_backward(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Boxed:
    """Run the backward op by op: it overwrites no saved tensor, so it may be called again."""
    context = fake_tensors.TracingContext.try_get()
    if context is not None and context.fw_metadata is not None:
        context.fw_metadata.bw_donated_idxs = []
    return _eager(gm, example_inputs)


def _uncounted_changes(gm: torch.fx.GraphModule, run: Boxed) -> Boxed:
    """Let AOTAutograd's wrapper alone count in-place changes of inputs (`Tensor._version`).

    It does so because Inductor's code does not count; the eager operators would count a second time.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    copy = torch.ops.aten.copy_.default
    changed = [at for at, x in enumerate(inputs) if any(u.target is copy and u.args[0] is x for u in x.users)]
    if not changed:
        return run

    def run_uncounted(args: list[Any]) -> Any:
        counted = tuple(args[at] for at in changed if not args[at].is_inference())
        with aot.version_counters_kept(counted):
            return run(args)

    aot.mark_boxed(run_uncounted)
    return run_uncounted
