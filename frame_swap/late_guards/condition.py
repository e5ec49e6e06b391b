"""From the relations that a compile added to what rewritten code checks."""

from __future__ import annotations

from collections.abc import Iterable

import sympy

from .. import guards
from ..codegen.conditions import Condition
from ..internals import fake_tensors


def condition_of(
    relations: Iterable[sympy.Basic], shapes: fake_tensors.FrameShapes
) -> tuple[Condition | None, tuple[str, ...]]:
    """The condition that a call's sizes must meet, and what it says, as text for the report.

    None, and no text, where the frame's own guards imply all of `relations`.

    Raises:
        guards.Inexpressible: a relation cannot be decided from the graph's arguments.
    """
    open_relations = guards.undecided(relations, shapes.implies)
    if not open_relations:
        return None, ()
    source = guards.source(open_relations, {symbol: symbol.name for symbol in shapes.symbols})
    used = set().union(*(relation.free_symbols for relation in open_relations))
    inputs = {symbol.name: at for symbol, at in shapes.symbols.items() if symbol in used}
    return Condition(source, inputs), (" and ".join(map(str, open_relations)),)
