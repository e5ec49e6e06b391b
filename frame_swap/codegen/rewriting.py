"""New code objects from old ones."""

from __future__ import annotations

import builtins
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from types import CodeType
from typing import Any, NamedTuple, cast

from bytecode import Bytecode, Instr, Label
from bytecode.instr import TryBegin, TryEnd

from ..errors import Indirect
from .source import compile_function

Answer = Callable[..., Any]
"""Given the exception that a call raised and that call's arguments, returns what the call is to return."""


class Condition(NamedTuple):
    """What must hold of a graph's inputs for compiled code to be called.

    Attributes:
        source: a Python expression over names of integers.
        inputs: for each name, which of the graph's inputs it is.
    """

    source: str
    inputs: Mapping[str, int]


def call_constants(code: CodeType, callees: Mapping[str, object]) -> CodeType:
    """`code` with each `LOAD_GLOBAL name` of a name in `callees` replaced by its callee, as a constant.

    What Dynamo's code records for the profiler before it calls a graph is left out, with the question whether there
    is one (torch 2.15); and so is what it makes between the last call and its return, and does not return.
    """

    def load(instruction: Instr) -> list[Instr]:
        pushes_null, name = cast("tuple[bool, str]", instruction.arg)
        constant = Instr("LOAD_CONST", callees[name], location=instruction.location)
        if not pushes_null:
            return [constant]
        null = Instr("PUSH_NULL", location=instruction.location)
        # Python 3.13 turned the order of callable and NULL around.
        return [constant, null] if sys.version_info >= (3, 13) else [null, constant]

    instructions = Bytecode.from_code(code)
    for at in _find(instructions, lambda i: i.name == "LOAD_GLOBAL" and _name(i) in callees):
        instructions[at : at + 1] = load(cast(Instr, instructions[at]))
    for at in _find(instructions, lambda i: i.name in ("LOAD_ATTR", "LOAD_METHOD") and _name(i) in _RECORDS):
        _answer_with_none(instructions, at)
    _drop_unread(instructions)
    while any(_join(instructions, at) for at in _find(instructions, lambda i: i.name.startswith("POP_JUMP_"))):
        _drop_unread(instructions)
    _return_at_once(instructions)
    return instructions.to_code()


_RECORDS = ("record_pregraph_bytecode_enter", "record_pregraph_bytecode_exit")


def _name(instruction: Instr) -> object:
    return instruction.arg[1] if isinstance(instruction.arg, tuple) else instruction.arg


def _answer_with_none(instructions: Bytecode, at: int) -> None:
    """Leave out a call of the function that the instruction at `at` gets from what the one before it pushed."""
    end = next(i for i in range(at, len(instructions)) if _named(instructions[i], "CALL")) + 1
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
    for at in _find(instructions, lambda i: i.name == "POP_TOP" or (i.name == "STORE_FAST" and i.arg not in named)):
        start = _start_of_value(instructions, at)
        if start is not None:
            dropped.append(cast(Instr, instructions[at]).arg)
            del instructions[start : at + 1]
    stored = [i.arg for i in instructions if isinstance(i, Instr) and i.name == "STORE_FAST"]
    for at in _find(instructions, lambda i: i.name == "DELETE_FAST" and i.arg in dropped and i.arg not in stored):
        del instructions[at]


def _start_of_value(instructions: Bytecode, end: int) -> int | None:
    """Where begins what pushes the value that the instruction at `end` takes, if it does nothing else."""
    at = end - 1
    while _named(instructions[at], "NOP"):
        at -= 1
    value = instructions[at]
    if not isinstance(value, Instr):
        return None
    if value.name == "LOAD_ATTR" and _name(value) == "_is_profiler_enabled":
        return _start_of_value(instructions, at)
    import_of_dynamos = value.name == "LOAD_GLOBAL" and str(_name(value)).startswith("__import_torch")
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
    first = at - _named(instructions[at - 1], "TO_BOOL")  # from Python 3.13 on
    first -= 3 if _named(instructions[first - 1], "IS_OP") else 1
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


def call_instead(
    code: CodeType,
    old: object,
    new: object,
    boxed: Callable[[list[Any]], Any] | None = None,
    answer: Answer | None = None,
) -> CodeType:
    """`code` with `new` called in place of the constant `old`; or `boxed`, with the arguments in one list.

    Where that raises an `Exception`, `answer` is called.

    Raises:
        Indirect: what `answer` needs cannot be told from the code.
    """
    instructions = Bytecode.from_code(code)
    for at in _find(instructions, lambda i: i.name == "LOAD_CONST" and i.arg is old):
        callee = new
        if answer is not None:
            at += _answer_errors(instructions, at, answer)
        if boxed is not None:
            ready, arguments = _ready_for_call(instructions, at)
            if cast(Instr, instructions[ready]).name == _CALL:  # no condition stands in between
                end = ready + 1 + (_CALL != "CALL")
                calls = [Instr(cast(Instr, i).name, 1) for i in instructions[ready:end]]
                instructions[ready:end] = [Instr("BUILD_LIST", arguments), *calls]
                callee = boxed
        instructions[at] = Instr("LOAD_CONST", callee)
    return instructions.to_code()


def call_if(
    code: CodeType, condition: Condition, old: object, new: object, answer: Answer | None = None
) -> CodeType:
    """`code` with `new` called in place of the constant `old` where `condition` holds; decided inline, each time.

    Where what is called raises an `Exception`, be it `new` or `old`, `answer` is called. May be used again on its
    own result: of conditions that hold, the first one added decides.

    Raises:
        Indirect: what is called with what cannot be told from the code.
    """
    instructions = Bytecode.from_code(code)
    for at in _find(instructions, lambda i: i.name == "LOAD_CONST" and i.arg is old):
        if answer is not None:
            at += _answer_errors(instructions, at, answer)
        ready, arguments = _ready_for_call(instructions, at)
        instructions[ready:ready] = _change_callee_if(condition, new, arguments)
    return instructions.to_code()


def _answer_errors(instructions: Bytecode, at: int, answer: Answer) -> int:
    """Have `answer` called where the call of what the instruction at `at` pushes raises an `Exception`.

    Returns by how much that instruction has moved.

    As long as it does not, this costs nothing: the call is in a try block, which is an entry in a table. Its
    arguments are not kept either: the handler, at the end of the code, repeats the instructions that loaded them.
    """
    ready, arguments = _ready_for_call(instructions, at)
    begin, end = at - (1 - _NULL_ABOVE), ready + 1 + (_CALL != "CALL")
    null: Any = instructions[at + 1 if _NULL_ABOVE else begin]
    loads: Any = instructions[at + 1 + _NULL_ABOVE : ready]
    written_so = _named(null, "PUSH_NULL") and _named(instructions[ready], _CALL)
    if not (written_so and _repeatable(loads)):
        raise Indirect("what it passes to the graph cannot be loaded a second time")
    handler, caught, answered = Label(), Label(), Label()
    function = Instr("LOAD_CONST", answer)
    # The exception is on the stack, above what was below the callee. It is not put into `sys.exc_info()`: what the
    # answer raises has no context.
    handling: list[Any] = [
        handler,
        Instr("LOAD_CONST", Exception),
        Instr("CHECK_EXC_MATCH"),
        Instr(f"{_JUMP_IF}_TRUE", caught),
        Instr("RERAISE", 0),
        caught,
        *((null.copy(), function) if _NULL_ABOVE else (function, null.copy())),
        Instr("SWAP", 3),  # and so callee, NULL and exception are in the order of a call
        *(instruction.copy() for instruction in loads),
        *(Instr(cast(Instr, i).name, arguments + 1) for i in instructions[ready:end]),
    ]
    back = Instr("JUMP_BACKWARD_NO_INTERRUPT", answered)
    for instruction in (*handling, back):
        if isinstance(instruction, Instr):
            instruction.location = cast(Instr, instructions[ready]).location
    # It begins at the callee, so that nothing of the call is left on the stack for the handler.
    block = TryBegin(handler, push_lasti=False)
    opening: list[Any] = [block]
    closing: list[Any] = [TryEnd(block), answered]
    # Try blocks do not nest here: the one around the call is interrupted for it, and goes for the handler too.
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


def _named(instruction: object, name: str) -> bool:
    return isinstance(instruction, Instr) and instruction.name == name


_REPEATABLE = re.compile(
    r"LOAD_(CONST|FAST.*|DEREF|CLOSURE|CLASSDEREF|GLOBAL|NAME|ATTR|METHOD)|BINARY_(SUBSCR|SLICE)|BUILD_(SLICE|TUPLE|LIST)"
    r"|PUSH_NULL|POP_TOP|COPY|SWAP|NOP|PRECALL|CALL|KW_NAMES|EXTENDED_ARG"
)


def _repeatable(loads: Iterable[Any]) -> bool:
    """Whether instructions that read sources, as Dynamo calls them, do the same when they run once more.

    Dynamo reads the sources of a graph's inputs again and again, for its guards, so that is harmless; calls among
    them are conversions (`torch.as_tensor`) and getters (`Tensor.size`). Temporary variables must be set in them.
    """
    read: set[object] = set()
    for instruction in loads:
        if not isinstance(instruction, Instr):
            return False
        if instruction.name == "STORE_FAST":
            if instruction.arg in read:
                return False
        elif not _REPEATABLE.fullmatch(instruction.name):
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


# What stands at a call, above its callee: Python 3.13 turned the order of callable and NULL around. And 3.11 has
# an instruction more, right before the call.
_NULL_ABOVE = 1 if sys.version_info >= (3, 13) else 0
_CALL = "PRECALL" if sys.version_info < (3, 12) else "CALL"
_JUMP_IF = "POP_JUMP_FORWARD_IF" if sys.version_info < (3, 12) else "POP_JUMP_IF"
_LOCALS = "frame_swap:"  # no identifier begins so: no local of the frame's has such a name


def _ready_for_call(instructions: Bytecode, at: int) -> tuple[int, int]:
    """Where what the instruction at `at` pushes is about to be called, with all its arguments pushed; and how many.

    That is its call, or the first of the conditions that stand before it already.
    """
    above = 0  # how much is on the stack above the callee
    above_at: dict[Label, int] = {}  # where code so far jumps to
    for position, instruction in enumerate(instructions[at + 1 :], at + 1):
        if isinstance(instruction, Label):
            above = above_at.get(instruction, above)
        if not isinstance(instruction, Instr):
            continue
        arguments = above - _NULL_ABOVE
        if instruction.name == _CALL and instruction.arg == arguments:
            return position, arguments
        if instruction.name == "STORE_FAST" and str(instruction.arg).startswith(_LOCALS):
            return position - 1, arguments - 1  # a copy of an argument is pushed right before it
        if isinstance(instruction.arg, Label):
            above_at[instruction.arg] = above + instruction.stack_effect(jump=True)
        above += instruction.stack_effect(jump=False)
        if above < 0:
            break
    raise Indirect("it calls the graph in a way that is not Dynamo's")


def _change_callee_if(condition: Condition, new: object, arguments: int) -> list[Instr | Label]:
    """To stand right before a call: what is called becomes `new` where `condition` holds."""
    names = {name: f"{_LOCALS}{name}" for name in condition.inputs}
    unchanged = Label()
    copies = [
        instruction
        for name, which in condition.inputs.items()
        for instruction in (Instr("COPY", arguments - which), Instr("STORE_FAST", names[name]))
    ]
    return [
        *copies,
        *_expression(condition.source, names),
        Instr(f"{_JUMP_IF}_FALSE", unchanged),
        Instr("LOAD_CONST", new),
        Instr("SWAP", arguments + _NULL_ABOVE + 2),
        Instr("POP_TOP"),
        unchanged,
    ]


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
    instructions[-1] = end  # instead of a jump to it
    return instructions


def _find(instructions: Bytecode, matches: Callable[[Instr], bool]) -> list[int]:
    """Where `instructions` match, the last first: those before a change stay where they are."""
    return [at for at, i in reversed(list(enumerate(instructions))) if isinstance(i, Instr) and matches(i)]


def predicate(condition: Condition) -> Callable[..., bool]:
    """A function of the graph's inputs that says whether `condition` holds: for where it cannot stand inline."""
    inputs = "".join(f"    {name} = args[{which}]\n" for name, which in condition.inputs.items())
    return compile_function(f"def fits(*args):\n{inputs}    return {condition.source}\n")
