"""Leave out instructions of Dynamo's code that a rewritten frame can do without.

What Dynamo's code records for the profiler before it calls a graph is left out, with the question whether there is
one (torch 2.15). So are the values that it makes between the last call and its return, and does not return.
"""

from __future__ import annotations

from typing import NamedTuple, cast

from bytecode import Bytecode, Instr, Label

from .bytecodes import find, name_in, named


def clean(instructions: Bytecode) -> None:
    """Leave out what Dynamo's code records, and what it makes and does not return."""
    for at in find(instructions, lambda i: i.name in ("LOAD_ATTR", "LOAD_METHOD") and name_in(i) in _RECORDS):
        _replace_by_none(instructions, at)
    _drop_unread(instructions)
    while any(_join(instructions, at) for at in find(instructions, lambda i: i.name.startswith("POP_JUMP_"))):
        _drop_unread(instructions)
    _return_at_once(instructions)


_RECORDS = ("record_pregraph_bytecode_enter", "record_pregraph_bytecode_exit")


def _replace_by_none(instructions: Bytecode, at: int) -> None:
    """Leave out a call of the function that the instruction at `at` gets from what the one before it pushed."""
    end = next(i for i in range(at, len(instructions)) if named(instructions[i], "CALL")) + 1
    call = [i for i in instructions[at - 1 : end] if isinstance(i, Instr)]
    if sum(i.stack_effect() for i in call) == 1:  # or it is not written as we know it, and stays
        none = Instr("LOAD_CONST", None)
        stored = (i for i in call if i.name == "STORE_FAST")
        instructions[at - 1 : end] = [*(i for store in stored for i in (none, store)), none]


def _drop_unread(instructions: Bytecode) -> None:
    """Leave out what is popped at once, or stored in variables of Dynamo's that nothing reads: constants, and what
    Dynamo looks up for its records."""
    others = [
        i
        for i in instructions
        if isinstance(i, Instr) and i.name not in ("LOAD_CONST", "STORE_FAST", "DELETE_FAST")
    ]
    named = [name for i in others for name in (i.arg if isinstance(i.arg, tuple) else (i.arg,))]
    named += instructions.argnames
    dropped = []
    for at in find(instructions, lambda i: i.name == "POP_TOP" or (i.name == "STORE_FAST" and i.arg not in named)):
        start = _start_of_value(instructions, at)
        if start is not None:
            dropped.append(cast(Instr, instructions[at]).arg)
            del instructions[start : at + 1]
    stored = [i.arg for i in instructions if isinstance(i, Instr) and i.name == "STORE_FAST"]
    for at in find(instructions, lambda i: i.name == "DELETE_FAST" and i.arg in dropped and i.arg not in stored):
        del instructions[at]


def _start_of_value(instructions: Bytecode, end: int) -> int | None:
    """Where begins what pushes the value that the instruction at `end` takes, if it does nothing else."""
    at = end - 1
    while named(instructions[at], "NOP"):
        at -= 1
    value = instructions[at]
    if not isinstance(value, Instr):
        return None
    if value.name == "LOAD_ATTR" and name_in(value) == "_is_profiler_enabled":
        return _start_of_value(instructions, at)
    import_of_dynamos = value.name == "LOAD_GLOBAL" and str(name_in(value)).startswith("__import_torch")
    return at if import_of_dynamos or value.name == "LOAD_CONST" else None


def _join(instructions: Bytecode, at: int) -> bool:
    """Leave out the condition of the jump at `at` if nothing depends on it: both ways push the same constant."""
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
    """What an instruction pushes, made of other values."""

    instruction: Instr
    parts: tuple[_Value, ...]

    def code(self) -> list[Instr]:
        """What pushes it."""
        return [*(i for part in self.parts for i in part.code()), self.instruction]


_MAKES = {"LOAD_CONST": 0, "LOAD_FAST": 0, "BINARY_SUBSCR": 2, "BUILD_LIST": None, "BUILD_TUPLE": None}
"""Instructions that push one value, and of how many it is made; None: as many as the argument says."""
_MOVES = ("COPY", "SWAP", "POP_TOP", "LIST_EXTEND", "DELETE_FAST", "RETURN_VALUE")


def _return_at_once(instructions: Bytecode) -> None:
    """Make what is returned and nothing else, in the instructions at the end that only make values.

    Where those need what was on the stack before, or use a value twice, they stay as they are.
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
    looked_up = [id(i) for i in ending if i.name == "BINARY_SUBSCR"]  # may be any object's __getitem__
    made = [id(i) for i in code if not i.name.startswith("LOAD_")]
    if (
        len({*made}) == len(made)
        and looked_up == [i for i in made if i in looked_up]
        and not any(i is c for i in code for c in changed)
    ):
        instructions[start:-1] = code
