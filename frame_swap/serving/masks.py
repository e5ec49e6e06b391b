"""Attention masks that mask nothing: what serves leaves them out, as eager code does.

In eager code transformers passes attention no mask where nothing is padded. Traced by a torch before 2.13 it passes
one that is true everywhere, and PyTorch then has no fused kernel for training: a step of BERT-base on an H200 took
1.27 of eager's.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

_ATTENTION = torch.nn.functional.scaled_dot_product_attention

_PURE = frozenset(
    {
        *(torch.arange, torch.ones, torch.logical_and, torch.logical_or),
        *(operator.add, operator.sub, operator.and_, operator.or_, operator.getitem),
        *(operator.eq, operator.ne, operator.ge, operator.gt, operator.le, operator.lt),
        *("bool", "expand", "new_ones", "unsqueeze"),  # methods of tensors
    }
)
"""The functions and methods that make masks. None changes its arguments, or reads anything else."""

_MOST_ELEMENTS = 1 << 22
"""The largest value that is computed, in elements: a mask for 2048 tokens, which takes a few milliseconds."""


def leave_out_masks(gm: torch.fx.GraphModule) -> None:
    """Change calls of `scaled_dot_product_attention` whose mask is true in every run of the graph to have none."""
    constants = _Constants()
    changed = False
    for node in gm.graph.find_nodes(op="call_function", target=_ATTENTION):
        mask = node.kwargs.get("attn_mask")
        if isinstance(mask, Node) and _only_masks(node, mask) and constants.is_true(mask):
            node.update_kwarg("attn_mask", None)
            changed = True
    if changed:
        constants.erase_unused(gm.graph)
        gm.recompile()


def _only_masks(node: Node, mask: Node) -> bool:
    """Whether a call does the same without a mask that is true; with `is_causal`, or a larger mask, it raises."""
    if node.kwargs.get("is_causal") or len(node.args) != 3:
        return False
    query, key, masked = (_example(which) for which in (*node.args[:2], mask))
    if query is None or key is None or masked is None:
        return False
    weights = (*query.shape[:-1], key.shape[-2])
    pairs = zip(reversed(masked.shape), reversed(weights), strict=False)
    return masked.dim() <= len(weights) and all(size in (1, whole) for size, whole in pairs)


class _Constants:
    """Values of a graph's nodes that are the same in every run."""

    def __init__(self) -> None:
        self._values: dict[Node, Tensor | None] = {}
        self._pure: dict[Node, bool] = {}

    def is_true(self, node: Node) -> bool:
        """Whether all elements of a node are true, whatever the graph's inputs are."""
        value = self._value(node)
        if value is None or value.dtype is not torch.bool or not value.numel():
            return False
        for dimension, stride in enumerate(value.stride()):
            if not stride:  # expanded
                value = value.narrow(dimension, 0, 1)
        return bool(value.all())

    def erase_unused(self, graph: torch.fx.Graph) -> None:
        """Erase nodes that were computed and that nothing uses any more."""
        for node in reversed(graph.nodes):
            if self._values.get(node) is not None and not node.users:
                graph.erase_node(node)

    def _value(self, node: Node) -> Tensor | None:
        """The node's value, on the CPU where it names a device; None where it is not known to be constant."""
        if node not in self._values:
            self._values[node] = self._computed(node) if self._is_pure(node) and _is_small(node) else None
        return self._values[node]

    def _computed(self, node: Node) -> Tensor | None:
        inputs = {each: self._value(each) for each in node.all_input_nodes}
        if any(value is None for value in inputs.values()):
            return None
        on_cpu = {"device": "cpu"} if "device" in node.kwargs else {}
        args, kwargs = torch.fx.node.map_arg((node.args, {**node.kwargs, **on_cpu}), inputs.__getitem__)
        if node.op == "call_method":
            result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            assert callable(node.target)
            result = node.target(*args, **kwargs)
        return result if isinstance(result, Tensor) else None

    def _is_pure(self, node: Node) -> bool:
        """Whether neither the node nor what is made from it changes a tensor in place, or leaves the graph."""
        if node.target is _ATTENTION:
            return True
        if node not in self._pure:
            listed = node.op in ("call_function", "call_method") and node.target in _PURE
            self._pure[node] = listed and "out" not in node.kwargs and all(map(self._is_pure, node.users))
        return self._pure[node]


def _is_small(node: Node) -> bool:
    value = _example(node)
    if value is None or any(isinstance(size, torch.SymInt) for size in value.shape):
        return False
    dimensions = zip(value.shape, value.stride(), strict=True)
    return math.prod(size for size, stride in dimensions if stride) <= _MOST_ELEMENTS


def _example(node: Any) -> Tensor | None:
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None
