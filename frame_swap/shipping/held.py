"""Tensors that a graph holds: parameters, buffers and constants that Dynamo has not made inputs of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ..internals import dynamo

STATIC = "_dynamo_static_input_type"
"""What Dynamo knows of a tensor that stays where it is in memory; CUDA graphs need not copy it."""


def lift(gm: GraphModule) -> tuple[GraphModule, tuple[Tensor, ...]]:
    """A copy of `gm` that takes the tensors which it holds as its first inputs, and these tensors, each once.

    Where it holds none, it is returned as it is. Tensors that graphs inside it hold stay there.
    """
    held: dict[int, tuple[Tensor, list[Node]]] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        value = attribute(gm, node.target)
        if isinstance(value, Tensor):
            held.setdefault(id(value), (value, []))[1].append(node)
    if not held:
        return gm, ()
    copies: dict[Node, Node] = {}
    graph = Graph(tracer_cls=dynamo.tracer_class(gm))
    graph.output(graph.graph_copy(gm.graph, copies))
    first = next(iter(graph.nodes))
    for _, nodes in held.values():
        with graph.inserting_before(first):
            lifted = graph.placeholder(f"held_{nodes[0].name}")
        lifted.meta = {"tensor_dict": {STATIC: "unguarded"}}
        for node in nodes:
            copies[node].replace_all_uses_with(lifted)
            graph.erase_node(copies[node])
    return GraphModule(gm, graph), tuple(tensor for tensor, _ in held.values())


def put_back(gm: GraphModule, tensors: Sequence[Tensor]) -> None:
    """Undo `lift`: have `gm` hold `tensors`, which were its first inputs."""
    for node, tensor in zip(gm.graph.find_nodes(op="placeholder"), tensors):  # noqa: B905 - the others stay
        gm.register_buffer(node.name, tensor)
        with gm.graph.inserting_before(node):
            node.replace_all_uses_with(gm.graph.get_attr(node.name))
        gm.graph.erase_node(node)
    gm.recompile()
    dynamo.mark_as_captured(gm)


def attribute(module: Any, path: str) -> Any:
    """What a node of kind `get_attr` stands for."""
    for part in path.split("."):
        module = getattr(module, part)
    return module
