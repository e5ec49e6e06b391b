"""Reading and writing instructions. The differences between Python versions are known here alone.

What is on the stack at a call: the callee, a NULL and the arguments. From Python 3.13 on, the NULL is above the
callee; before, it was below.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import CodeType
from typing import TypeGuard, cast

from bytecode import Bytecode, ControlFlowGraph, Instr, Label

from ..runtime import rests

NULL_ABOVE = 1 if sys.version_info >= (3, 13) else 0
"""How many NULLs are on the stack between a callee and its arguments."""

FIRST_OF_CALL = "PRECALL" if sys.version_info < (3, 12) else "CALL"
"""The first of the instructions that make a call."""

_POP_JUMP_IF = "POP_JUMP_FORWARD_IF" if sys.version_info < (3, 12) else "POP_JUMP_IF"


def from_code(code: CodeType) -> Bytecode:
    """The instructions of `code`. A hundredth of a second for a frame with some hundred inputs, or more."""
    return rests.in_one_piece(functools.partial(Bytecode.from_code, code))


def to_code(instructions: Bytecode) -> CodeType:
    """`instructions.to_code()`, in pieces between which the program's threads may run."""
    graph = rests.in_one_piece(functools.partial(ControlFlowGraph.from_bytecode, instructions))
    depth = rests.in_one_piece(functools.partial(graph.compute_stacksize, compute_exception_stack_depths=True))
    in_order = rests.in_one_piece(graph.to_bytecode)
    make = functools.partial(in_order.to_concrete_bytecode, compute_exception_stack_depths=False)
    concrete = rests.in_one_piece(make)
    finish = functools.partial(concrete.to_code, stacksize=depth, compute_exception_stack_depths=False)
    return rests.in_one_piece(finish)


def find(instructions: Bytecode, matches: Callable[[Instr], bool]) -> list[int]:
    """The indices of matching instructions, the last first, so that a change there moves none of the others."""
    return [at for at, i in reversed(list(enumerate(instructions))) if isinstance(i, Instr) and matches(i)]


def named(instruction: object, name: str) -> TypeGuard[Instr]:
    """Whether this is an instruction of that name."""
    return isinstance(instruction, Instr) and instruction.name == name


def name_in(instruction: Instr) -> object:
    """The name that an instruction looks up. From Python 3.11 on, some carry a flag beside it."""
    return instruction.arg[1] if isinstance(instruction.arg, tuple) else instruction.arg


def load_global_as_constant(instruction: Instr, constant: object) -> list[Instr]:
    """Instructions that push `constant` where the `LOAD_GLOBAL` pushed a global; with the NULL that it may push."""
    pushes_null, _ = cast("tuple[bool, str]", instruction.arg)
    load = Instr("LOAD_CONST", constant, location=instruction.location)
    if not pushes_null:
        return [load]
    return in_order_of_call(load, Instr("PUSH_NULL", location=instruction.location))


def in_order_of_call(callee: Instr, null: Instr) -> list[Instr]:
    """The instructions that push a callee and a NULL, in the order that a call expects."""
    return [callee, null] if NULL_ABOVE else [null, callee]


def end_of_call(first: int) -> int:
    """The index after a call, given that of its first instruction."""
    return first + 1 + (FIRST_OF_CALL != "CALL")


def pop_jump_if(truth: bool, target: Label) -> Instr:
    """A jump forward, taken where the value on top of the stack is `truth`; that value is popped."""
    return Instr(f"{_POP_JUMP_IF}_{str(truth).upper()}", target)
