"""The pair: AOTAutograd's eager forward and backward of a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..internals import aot, fake_tensors

Boxed = Callable[[list[Any]], Any]


def trace_pair(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """Trace `gm` into an eager forward and backward, with no Inductor decompositions.

    The default partition saves what eager would save; the min-cut one recomputes activations in the
    backward, which pays only where Inductor fuses the recomputation away, and takes longer to find.

    Returns a callable that takes the graph's inputs and returns the tuple of its outputs.
    """

    def forward(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Boxed:
        return _uncounted_changes(gm, aot.boxed_nop(gm, example_inputs))

    def backward(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Boxed:
        """The backward overwrites no saved tensor, so it may be called again."""
        context = fake_tensors.TracingContext.try_get()
        if context is not None and context.fw_metadata is not None:
            context.fw_metadata.bw_donated_idxs = []
        return forward(gm, example_inputs)

    trace = aot.aot_autograd(
        fw_compiler=forward,
        bw_compiler=backward,
        partition_fn=aot.default_partition,
        keep_inference_input_mutations=True,
    )
    pair: Callable[..., Any] = trace(gm, example_inputs)
    return pair


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
