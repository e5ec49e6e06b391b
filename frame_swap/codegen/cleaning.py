"""Remove instructions from Dynamo's code that have no effect on the result of a frame.

These are the records for the profiler before each call of a graph, with the test for a profiler (torch 2.15); and
values that are made between the last call and the return, but not returned.
"""

from __future__ import annotations

from typing import NamedTuple, cast

from bytecode import Bytecode, Instr, Label

from ..internals import dynamo
from .bytecodes import find, name_in, named


def clean(instructions: Bytecode) -> None:
    """Remove the records for the profiler, and values that are made but not returned."""
    for at in find(instructions, lambda i: i.name in ("LOAD_ATTR", "LOAD_METHOD") and name_in(i) in dynamo.RECORDS):
        _replace_by_none(instructions, at)
    _drop_unread(instructions)
    while any(_join(instructions, at) for at in find(instructions, lambda i: i.name.startswith("POP_JUMP_"))):
        _drop_unread(instructions)
    _return_at_once(instructions)


def _replace_by_none(instructions: Bytecode, at: int) -> None:
    """Replace a call by its result, None. The instruction at `at` loads the callee, an attribute."""
    end = next(i for i in range(at, len(instructions)) if named(instructions[i], "CALL")) + 1
    call = [i for i in instructions[at - 1 : end] if isinstance(i, Instr)]
    if sum(i.stack_effect() for i in call) == 1:  # else it is written in another way, and stays
        none = Instr("LOAD_CONST", None)
        stored = (i for i in call if i.name == "STORE_FAST")
        instructions[at - 1 : end] = [*(i for store in stored for i in (none, store)), none]


def _drop_unread(instructions: Bytecode) -> None:
    """Remove values that are popped at once, or stored in a variable of Dynamo's that nothing reads.

    Only constants and the modules that Dynamo looks up for its records: to load them has no effect.
    """
    others = [
        i
        for i in instructions
        if isinstance(i, Instr) and i.name not in ("LOAD_CONST", "STORE_FAST", "DELETE_FAST")
    ]
    read = [name for i in others for name in (i.arg if isinstance(i.arg, tuple) else (i.arg,))]
    read += instructions.argnames
    dropped = []
    for at in find(instructions, lambda i: i.name == "POP_TOP" or (i.name == "STORE_FAST" and i.arg not in read)):
        start = _start_of_value(instructions, at)
        if start is not None:
            dropped.append(cast(Instr, instructions[at]).arg)
            del instructions[start : at + 1]
    stored = [i.arg for i in instructions if isinstance(i, Instr) and i.name == "STORE_FAST"]
    for at in find(instructions, lambda i: i.name == "DELETE_FAST" and i.arg in dropped and i.arg not in stored):
        del instructions[at]


def _start_of_value(instructions: Bytecode, end: int) -> int | None:
    """Start of the expression consumed at `end`; None if that could have an effect."""
    at = end - 1
    while named(instructions[at], "NOP"):
        at -= 1
    value = instructions[at]
    if not isinstance(value, Instr):
        return None
    if value.name == "LOAD_ATTR" and name_in(value) == dynamo.TEST_FOR_PROFILER:
        return _start_of_value(instructions, at)
    module_of_torch = value.name == "LOAD_GLOBAL" and str(name_in(value)).startswith(dynamo.GLOBAL_FOR_TORCH)
    return at if module_of_torch or value.name == "LOAD_CONST" else None


def _join(instructions: Bytecode, at: int) -> bool:
    """Remove the condition of the jump at `at` if both branches push the same constant."""
    match instructions[at : at + 6]:
        case [
            Instr(arg=Label() as other),
            Instr(name="LOAD_CONST", arg=value),
            Instr(name="JUMP_FORWARD", arg=Label() as end),
            Label() as there,
            Instr(name="LOAD_CONST", arg=same),
            Label() as joined,
        ] if there is other and joined is end and same is value:
            pass
        case _:
            return False
    jumps = [i.arg for i in instructions if isinstance(i, Instr) and (i.arg is other or i.arg is end)]
    first = at - named(instructions[at - 1], "TO_BOOL")  # from Python 3.13 on
    first -= 3 if named(instructions[first - 1], "IS_OP") else 1
    condition = [getattr(i, "name", "") for i in instructions[first:at]]
    if len(jumps) != 2 or not {*condition} <= {"LOAD_FAST", "LOAD_CONST", "IS_OP", "TO_BOOL"}:
        return False
    instructions[first : at + 6] = [Instr("LOAD_CONST", value)]
    return True


class _Value(NamedTuple):
    """A value on the stack: the instruction that pushed it, and the values that this took."""

    instruction: Instr
    parts: tuple[_Value, ...]

    def code(self) -> list[Instr]:
        """The instructions that push this value."""
        return [*(i for part in self.parts for i in part.code()), self.instruction]


_MAKES = {"LOAD_CONST": 0, "LOAD_FAST": 0, "BINARY_SUBSCR": 2, "BUILD_LIST": None, "BUILD_TUPLE": None}
"""Instructions that push one value, with the number of values that they take; None: their argument."""

_MOVES = ("COPY", "SWAP", "POP_TOP", "LIST_EXTEND", "DELETE_FAST", "RETURN_VALUE")


def _return_at_once(instructions: Bytecode) -> None:
    """Make the returned value and no other, in the instructions at the end that only make values.

    They stay as they are if they take a value that was on the stack before, or use one twice.
    """
    start = len(instructions)
    while start and getattr(instructions[start - 1], "name", "") in {*_MAKES, *_MOVES}:
        start -= 1
    ending = cast("list[Instr]", instructions[start:])
    stack: list[_Value] = []
    changed: list[Instr] = []
    try:
        for instruction in ending:
            depth = instruction.arg if isinstance(instruction.arg, int) else 0
            match instruction.name:
                case "COPY":
                    stack.append(stack[-depth])
                case "SWAP":
                    stack[-1], stack[-depth] = stack[-depth], stack[-1]
                case "POP_TOP":
                    stack.pop()
                case "LIST_EXTEND":
                    stack.pop()
                    changed.append(stack[-depth].instruction)
                case name if name in _MAKES:
                    first = len(stack) - (depth if (made_of := _MAKES[name]) is None else made_of)
                    if first < 0:
                        return
                    stack[first:] = [_Value(instruction, tuple(stack[first:]))]
        (result,) = stack
    except (IndexError, ValueError):
        return
    code = result.code()
    looked_up = [id(i) for i in ending if i.name == "BINARY_SUBSCR"]  # may call an object's own __getitem__
    made = [id(i) for i in code if not i.name.startswith("LOAD_")]
    if (
        len({*made}) == len(made)
        and looked_up == [i for i in made if i in looked_up]
        and not any(i is c for i in code for c in changed)
    ):
        instructions[start:-1] = code
