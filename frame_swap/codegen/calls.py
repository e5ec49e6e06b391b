"""New code objects from Dynamo's, which call something else where that calls a graph."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import CodeType
from typing import Any, NamedTuple, cast

from bytecode import Bytecode, Instr, Label
from bytecode.instr import TryBegin, TryEnd

from ..errors import Indirect
from . import conditions
from .bytecodes import (
    FIRST_OF_CALL,
    NULL_ABOVE,
    end_of_call,
    find,
    from_code,
    in_order_of_call,
    load_global_as_constant,
    name_in,
    named,
    pop_jump_if,
    to_code,
)
from .cleaning import clean
from .conditions import Condition

Recover = Callable[..., Any]
"""Takes the exception that a call raised and that call's arguments; returns what the call is to return."""


class Target(NamedTuple):
    """Something to call in place of a graph.

    Attributes:
        call: takes the graph's inputs.
        boxed: the same, taking all inputs in one list, where that is cheaper.
        condition: what must hold of the inputs; None: nothing.
    """

    call: object
    boxed: Callable[[list[Any]], Any] | None
    condition: Condition | None


def call_constants(code: CodeType, callees: Mapping[str, object]) -> CodeType:
    """`code` with constants in place of the globals that `callees` names, and cleaned (see `cleaning`)."""
    instructions = from_code(code)
    for at in find(instructions, lambda i: i.name == "LOAD_GLOBAL" and name_in(i) in callees):
        load = cast(Instr, instructions[at])
        instructions[at : at + 1] = load_global_as_constant(load, callees[cast(str, name_in(load))])
    clean(instructions)
    return to_code(instructions)


def direct_calls(
    base: CodeType,
    placeholder: object,
    usual: object,
    targets: Sequence[Target],
    recover: Recover | None,
    keep: object | None = None,
) -> CodeType:
    """`base` with a callee in place of the constant `placeholder`: the first target whose condition holds.

    The conditions are evaluated inline, at each call. Without a target that has none, `usual` is called where no
    condition holds.

    Args:
        base: from `call_constants`; or from this function, where the frame has several calls.
        placeholder: a string that is no other constant of `base`.
        usual: what to call where no target fits.
        targets: at most one has no condition, and it is the last. The `boxed` of that one is called if it is alone.
        recover: called where the callee raises an `Exception`, be it a target or `usual`. Not used without targets.
        keep: something for the code object to keep alive.

    Raises:
        Indirect: the arguments of the call cannot be found in `base`, or not be loaded a second time for `recover`.
    """
    conditional = [target for target in targets if target.condition is not None]
    unconditional = targets[len(conditional) :]
    if len(unconditional) > 1 or any(target.condition is not None for target in unconditional):
        raise ValueError("a target without a condition must be the last one")
    otherwise = unconditional[0] if unconditional else Target(usual, None, None)
    if not targets:
        consts = tuple(usual if _same(constant, placeholder) else constant for constant in base.co_consts)
        return base.replace(co_consts=consts if keep is None else (*consts, _Kept(keep)))
    instructions = from_code(base)
    for at in find(instructions, lambda i: i.name == "LOAD_CONST" and _same(i.arg, placeholder)):
        if recover is not None and targets:
            at += _recover_from_errors(instructions, at, recover)
        callee = otherwise.call
        if conditional:
            ready, arguments = _ready_for_call(instructions, at)
            instructions[ready:ready] = _choose(conditional, arguments)
        elif otherwise.boxed is not None:
            callee = otherwise.boxed
            _box_arguments(instructions, at)
        instructions[at] = Instr("LOAD_CONST", callee)
    code = to_code(instructions)
    kept = [c for c in base.co_consts if type(c) is _Kept]  # by this function, for another call of the frame
    kept += [] if keep is None else [_Kept(keep)]
    return code.replace(co_consts=(*code.co_consts, *kept)) if kept else code


class _Kept:
    """A constant that no instruction loads; `bytecode` would leave it out."""

    def __init__(self, kept: object) -> None:
        self.kept = kept


def _same(constant: object, placeholder: object) -> bool:
    """Python may replace a string among the constants of a code object by an equal one."""
    return constant is placeholder or (type(constant) is type(placeholder) is str and constant == placeholder)


def _choose(targets: Sequence[Target], arguments: int) -> list[Instr | Label]:
    """To stand right before a call: replaces the callee by the first target whose condition holds."""
    chosen = Label()
    instructions: list[Instr | Label] = []
    for target in targets:
        assert target.condition is not None
        differs = Label()
        instructions += [
            *conditions.inline(target.condition, arguments),
            pop_jump_if(False, differs),
            *_replace_callee(target.call, arguments),
            Instr("JUMP_FORWARD", chosen),
            differs,
        ]
    del instructions[-2]  # no jump to the next instruction
    return [*instructions, chosen]


def _replace_callee(new: object, arguments: int) -> list[Instr]:
    """To stand right before a call: replaces the callee."""
    return [Instr("LOAD_CONST", new), Instr("SWAP", arguments + NULL_ABOVE + 2), Instr("POP_TOP")]


def _box_arguments(instructions: Bytecode, at: int) -> None:
    """Pass the arguments in one list to the callee that the instruction at `at` pushes."""
    ready, arguments = _ready_for_call(instructions, at)
    end = end_of_call(ready)
    calls = [Instr(cast(Instr, i).name, 1) for i in instructions[ready:end]]
    instructions[ready:end] = [Instr("BUILD_LIST", arguments), *calls]


def _ready_for_call(instructions: Bytecode, at: int) -> tuple[int, int]:
    """Index of the call of the callee that the instruction at `at` pushes, and its argument count."""
    above = 0  # how much is on the stack above the callee
    above_at: dict[Label, int] = {}  # the same at the labels that code so far jumps to
    for position, instruction in enumerate(instructions[at + 1 :], at + 1):
        if isinstance(instruction, Label):
            above = above_at.get(instruction, above)
        if not isinstance(instruction, Instr):
            continue
        arguments = above - NULL_ABOVE
        if instruction.name == FIRST_OF_CALL and instruction.arg == arguments:
            return position, arguments
        if isinstance(instruction.arg, Label):
            above_at[instruction.arg] = above + instruction.stack_effect(jump=True)
        above += instruction.stack_effect(jump=False)
        if above < 0:
            break
    raise Indirect("it calls the graph in a way that is not Dynamo's")


def _recover_from_errors(instructions: Bytecode, at: int, recover: Recover) -> int:
    """Call `recover` where the callee that the instruction at `at` pushes raises an `Exception`.

    Returns by how much that instruction has moved.

    A call that does not raise pays nothing for it: a try block is an entry in a table. Nor are the arguments kept:
    the handler, at the end of the code, repeats the instructions that loaded them.
    """
    ready, arguments = _ready_for_call(instructions, at)
    begin, end = at - (1 - NULL_ABOVE), end_of_call(ready)
    null: Any = instructions[at + 1 if NULL_ABOVE else begin]
    loads: Any = instructions[at + 1 + NULL_ABOVE : ready]
    written_so = named(null, "PUSH_NULL") and named(instructions[ready], FIRST_OF_CALL)
    if not (written_so and _loads_again(loads)):
        raise Indirect("what it passes to the graph cannot be loaded a second time")
    handler, caught, recovered = Label(), Label(), Label()
    function = Instr("LOAD_CONST", recover)
    # The exception is on the stack, above what was below the callee. It is not put into `sys.exc_info()`: what
    # `recover` raises has no context.
    handling: list[Any] = [
        handler,
        Instr("LOAD_CONST", Exception),
        Instr("CHECK_EXC_MATCH"),
        pop_jump_if(True, caught),
        Instr("RERAISE", 0),
        caught,
        *reversed(in_order_of_call(function, null.copy())),
        Instr("SWAP", 3),  # now callee, NULL and exception are in the order of a call
        *(instruction.copy() for instruction in loads),
        *(Instr(cast(Instr, i).name, arguments + 1) for i in instructions[ready:end]),
    ]
    back = Instr("JUMP_BACKWARD_NO_INTERRUPT", recovered)
    for instruction in (*handling, back):
        if isinstance(instruction, Instr):
            instruction.location = cast(Instr, instructions[ready]).location
    # The block begins at the callee, so that nothing of the call is left on the stack for the handler.
    block = TryBegin(handler, push_lasti=False)
    opening: list[Any] = [block]
    closing: list[Any] = [TryEnd(block), recovered]
    # Try blocks do not nest here: the one around the call is interrupted for it, and covers the handler too.
    around = _block_around(instructions, begin)
    if around is not None:
        resumed, handlers_own = (TryBegin(around.target, around.push_lasti) for _ in range(2))
        old_end = next(i for i in instructions[end:] if isinstance(i, TryEnd) and i.entry is around)
        old_end.entry = resumed
        opening.insert(0, TryEnd(around))
        closing.append(resumed)
        handling = [handlers_own, *handling, TryEnd(handlers_own)]
    instructions[end:end] = closing
    instructions[begin:begin] = opening
    instructions += [*handling, back]
    return len(opening)


_LOADS_AGAIN = re.compile(
    r"LOAD_(CONST|FAST.*|DEREF|CLOSURE|CLASSDEREF|GLOBAL|NAME|ATTR|METHOD)|BINARY_(SUBSCR|SLICE)|BUILD_(SLICE|TUPLE|LIST)"
    r"|PUSH_NULL|POP_TOP|COPY|SWAP|NOP|PRECALL|CALL|KW_NAMES|EXTENDED_ARG"
)


def _loads_again(loads: Iterable[Any]) -> bool:
    """Whether these instructions load the same values when they run once more.

    They do where they read sources, as Dynamo calls them: Dynamo reads the sources of a graph's inputs again and
    again, for its guards. Calls among them are conversions (`torch.as_tensor`) and getters (`Tensor.size`). A
    temporary variable must be set before it is read.
    """
    read: set[object] = set()
    for instruction in loads:
        if not isinstance(instruction, Instr):
            return False
        if instruction.name == "STORE_FAST":
            if instruction.arg in read:
                return False
        elif not _LOADS_AGAIN.fullmatch(instruction.name):
            return False
        elif instruction.name.startswith("LOAD_FAST"):
            read.update(instruction.arg if isinstance(instruction.arg, tuple) else [instruction.arg])
    return True


def _block_around(instructions: Bytecode, at: int) -> TryBegin | None:
    """The try block that the instruction at `at` is in."""
    around = None
    for instruction in instructions[:at]:
        if isinstance(instruction, TryBegin):
            around = instruction
        elif isinstance(instruction, TryEnd):
            around = None
    return around
