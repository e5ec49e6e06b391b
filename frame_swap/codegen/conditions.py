"""Conditions on the inputs of a graph: inline in a code object, or as a function."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping
from typing import NamedTuple

from bytecode import Bytecode, Instr, Label

from .source import compile_function


class Condition(NamedTuple):
    """What must hold of a graph's inputs for compiled code to be called.

    Attributes:
        source: a Python expression over names of integers.
        inputs: the index of each named integer among the graph's inputs.
    """

    source: str
    inputs: Mapping[str, int]


def predicate(condition: Condition) -> Callable[..., bool]:
    """A function of the graph's inputs that returns whether `condition` holds, for use outside of frames."""
    inputs = "".join(f"    {name} = args[{which}]\n" for name, which in condition.inputs.items())
    return compile_function(f"def fits(*args):\n{inputs}    return {condition.source}\n")


def inline(condition: Condition, arguments: int) -> list[Instr | Label]:
    """Instructions that push whether `condition` holds, to stand right before a call with that many arguments."""
    names = {name: f"{_PREFIX}{name}" for name in condition.inputs}
    copies = [
        instruction
        for name, which in condition.inputs.items()
        for instruction in (Instr("COPY", arguments - which), Instr("STORE_FAST", names[name]))
    ]
    return [*copies, *_expression(condition.source, names)]


_PREFIX = "frame_swap:"
"""The prefix of the locals that `inline` adds to a frame; no identifier begins so, and no local of the frame."""


def _expression(source: str, variables: Mapping[str, str]) -> list[Instr | Label]:
    """Instructions that push a bool: the value of `source` over local `variables` and builtin functions."""
    end = Label()
    instructions: list[Instr | Label] = []
    for instruction in Bytecode.from_code(compile(source, "<frame-swap>", "eval")):
        match instruction:
            case Instr(name="RESUME"):
                pass
            case Instr(name="LOAD_NAME", arg=str(name)) if name in variables:
                instructions.append(Instr("LOAD_FAST", variables[name]))
            case Instr(name="LOAD_NAME", arg=str(name)):
                instructions.append(Instr("LOAD_CONST", getattr(builtins, name)))
            case Instr(name="RETURN_VALUE"):
                instructions.append(Instr("JUMP_FORWARD", end))
            case Instr() | Label():
                instructions.append(instruction)
    instructions[-1] = end  # in place of a jump to it
    return instructions
