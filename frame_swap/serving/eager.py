"""The eager code of a region: Dynamo's graph as it is, or the pair that AOTAutograd traces of it.

The graph runs at eager's speed and costs nothing in the call that captures it. The pair is traced in that call, and
is for graphs that the other cannot serve as well (`why_pair`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from ..errors import first_line
from ..internals import beside, dispatcher, dynamo, eager, fake_tensors
from ..settings import First
from .masks import leave_out_masks
from .pair import trace_pair

log = logging.getLogger(__name__)


class EagerCode(NamedTuple):
    """What serves the calls of a region until compiled code does.

    Attributes:
        call: takes the graph's inputs, and returns the tuple of its outputs.
        kind: "graph" or "pair".
        reason: why it is not the kind that was wished; "" where it is.
    """

    call: Callable[..., Any]
    kind: First
    reason: str = ""


class WhyPair(NamedTuple):
    """Why a graph is better served by the pair.

    Attributes:
        reason: as text.
        needed: whether nothing but AOTAutograd, in this process, can tell Dynamo what the frame has to check.
    """

    reason: str
    needed: bool


def eager_code(
    gm: torch.fx.GraphModule,
    example_inputs: list[Any],
    first: First,
    why: WhyPair | None,
    *,
    compiled: bool = False,
) -> EagerCode:
    """The eager code for a graph that Dynamo has captured, and still holds the frame of.

    A capture in the background takes the graph: AOTAutograd changes `nn.Module` for all threads while it traces.
    Where the pair cannot be traced the graph serves, as long as that is right.

    Args:
        first: the kind that is wished.
        why: what `why_pair` says of the graph.
        compiled: whether compiled code is there already. Then this is for the few calls that it cannot serve, and
            no pair is traced that is not needed.

    Raises:
        Exception: the graph needs the pair, and AOTAutograd cannot trace it.
        GivenUp: the graph is better served by the pair, and is captured in the background.
    """
    if compiled and not (why is not None and why.needed):
        return EagerCode(serve_graph(gm), "graph")
    if beside.is_beside():
        first = "graph"
        if why is not None:
            raise beside.GivenUp(f"AOTAutograd has to trace it: {why.reason}", lasting=True)
    if first == "graph" and why is None:
        return EagerCode(serve_graph(gm), "graph")
    reason = why.reason if why is not None and first == "graph" else ""
    try:
        return EagerCode(trace_pair(gm, example_inputs), "pair", reason)
    except dynamo.TorchDynamoException:  # Dynamo's own control flow: it starts the frame over
        raise
    except Exception as error:
        if why is not None and why.needed:
            raise
        log.info("frame-swap: AOTAutograd could not trace the pair; Dynamo's graph serves", exc_info=True)
        return EagerCode(serve_graph(gm), "graph", f"no pair: {type(error).__name__}: {error}")


def why_pair(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> WhyPair | None:
    """Why this graph is better served by the pair; None where Dynamo's graph serves it as well. Raises nothing.

    What AOTAutograd finds out in a worker, after Dynamo has closed the frame, can only become a late guard. Those
    are conditions on whole numbers.
    """
    # AOTAutograd decides which floats Dynamo is to make constant, also of those that the graph does not use.
    computes = any(isinstance(node.meta.get("example_value"), torch.SymFloat) for node in gm.graph.nodes)
    if computes or fake_tensors.has_symbolic_floats():
        return WhyPair("its frame has floats that change from call to call", needed=True)
    try:
        if _some_share_memory(example_inputs):
            return WhyPair("inputs of changing size share memory", needed=True)
    except Exception as error:  # a strided tensor without storage
        return WhyPair(f"whether its inputs share memory is not known: {first_line(error)}", needed=True)
    if (name := next(_traced_operators(gm), None)) is not None:
        return WhyPair(f"PyTorch would trace {name} at each call", needed=False)
    return None


def _some_share_memory(example_inputs: list[Any]) -> bool:
    """Whether AOTAutograd may add a guard on overlaps: it does for symbolic sizes only."""
    tensors = [value for value in example_inputs if isinstance(value, torch.Tensor)]
    if not any(isinstance(value, torch.SymInt) for value in example_inputs):
        return False
    strided = [t for t in tensors if t.layout is torch.strided and not eager.is_traceable_wrapper_subclass(t)]
    storages = {eager.storage_id(t.untyped_storage()) for t in strided}
    return len(storages) < len(strided)


def _traced_operators(gm: torch.fx.GraphModule) -> Iterator[str]:
    """Names of higher-order operators that are slower in eager code than in the pair, or save more memory there."""
    for module in gm.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            name = dispatcher.higher_order_name(node.target)
            if name is not None and name not in _EAGER_OPERATORS:
                yield name


_EAGER_OPERATORS = frozenset(
    {
        "autograd_function_apply",
        "triton_kernel_wrapper_mutation",
        "wrap_with_autocast",
        "wrap_with_set_grad_enabled",
    }
)
"""Higher-order operators that eager code runs as it runs others. `cond`, `scan`, `flex_attention` and the like
trace their subgraphs in each call that records gradients; activation checkpointing recomputes nothing there."""


def serve_graph(gm: torch.fx.GraphModule) -> Callable[..., Any]:
    """Run Dynamo's graph op by op, under PyTorch's autograd. May change the graph, but not what it computes."""
    leave_out_masks(gm)
    forward: Callable[..., Any] = gm.forward  # made once: for a lazy graph module this is what compiles the code
    return forward
