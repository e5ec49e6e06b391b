"""New code objects from old ones, and the small functions that rewritten frames call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any, cast

from bytecode import Bytecode, Instr

from .. import internals


def call_constants(code: CodeType, callees: Mapping[str, object]) -> CodeType:
    """`code` with each `LOAD_GLOBAL name` of a name in `callees` replaced by its callee, as a constant."""

    def load(instruction: Instr) -> list[Instr]:
        pushes_null, name = cast("tuple[bool, str]", instruction.arg)
        constant = Instr("LOAD_CONST", callees[name], location=instruction.location)
        if not pushes_null:
            return [constant]
        null = Instr("PUSH_NULL", location=instruction.location)
        # Python 3.13 turned the order of callable and NULL around.
        return [constant, null] if sys.version_info >= (3, 13) else [null, constant]

    return _replace(
        code, lambda i: i.name == "LOAD_GLOBAL" and isinstance(i.arg, tuple) and i.arg[1] in callees, load
    )


def call_instead(code: CodeType, old: object, new: object) -> CodeType:
    """`code` with the constant `old` replaced by `new`."""
    return _replace(
        code,
        lambda i: i.name == "LOAD_CONST" and i.arg is old,
        lambda i: [Instr("LOAD_CONST", new, location=i.location)],
    )


def _replace(code: CodeType, matches: Callable[[Instr], bool], load: Callable[[Instr], list[Instr]]) -> CodeType:
    instructions = Bytecode.from_code(code)
    found = [at for at, i in enumerate(instructions) if isinstance(i, Instr) and matches(i)]
    for at in reversed(found):
        instructions[at : at + 1] = load(cast(Instr, instructions[at]))
    return instructions.to_code()


_DIRECT = """\
def compiled_graph(*args):
    return compiled(list(args))
"""
_GUARDED = """\
def compiled_graph(*args):
    if {predicate}:
        return compiled(list(args))
    return pair(*args)
"""


def direct_call(
    compiled: Callable[[list[Any]], Any], predicate: str = "True", pair: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """A function that takes the graph's inputs and calls `compiled`, which takes them as one list.

    Args:
        predicate: Python expression over `args`, the tuple of inputs; where it is false, `pair` serves the call.

    Each has a code object of its own, which Dynamo is told not to trace, nor anything below it.
    """
    scope: dict[str, Any] = {"compiled": compiled}
    source = _DIRECT
    if predicate != "True":
        scope["pair"] = pair
        source = _GUARDED.format(predicate=predicate)
    exec(compile(source, "<frame-swap>", "exec"), scope)
    function: Callable[..., Any] = scope["compiled_graph"]
    internals.skip_frames(function.__code__)
    return function
