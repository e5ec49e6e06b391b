"""New code objects from old ones: what is left out of Dynamo's code, and what must stay."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import pytest
import torch
from bytecode import Bytecode, Instr, Label

import frame_swap
from frame_swap.codegen import rewriting
from frame_swap.internals import dynamo


def assembled(*instructions: tuple[Any, ...] | Label, argnames: tuple[str, ...] = ("x",)) -> CodeType:
    """A function's code, after the few instructions that all functions begin with."""
    code = Bytecode([Instr("RESUME", 0), *(i if isinstance(i, Label) else Instr(*i) for i in instructions)])
    code.argnames, code.argcount, code.name = list(argnames), len(argnames), "f"
    code.flags |= 3  # optimised, with locals of its own
    return code.to_code()


def shortened(code: CodeType) -> tuple[Callable[..., Any], list[str]]:
    """The function, and its instructions but for the first."""
    new = rewriting.call_constants(code, {})
    return FunctionType(new, {}), [i.opname for i in dis.get_instructions(new)][1:]


RETURN = ("RETURN_VALUE",)


def either(first: object, second: object, *condition: tuple[Any, ...]) -> list[tuple[Any, ...] | Label]:
    """Instructions that push the one or the other."""
    other, end = Label(), Label()
    if sys.version_info >= (3, 13):
        condition = (*condition, ("TO_BOOL",))
    jump = "POP_JUMP_FORWARD_IF_FALSE" if sys.version_info < (3, 12) else "POP_JUMP_IF_FALSE"
    return [
        *condition,
        (jump, other),
        ("LOAD_CONST", first),
        ("JUMP_FORWARD", end),
        other,
        ("LOAD_CONST", second),
        end,
    ]


def test_a_question_whose_answer_nobody_reads_is_not_asked() -> None:
    """Whether there is a profiler, which torch 2.15 asks before each call of a graph."""
    attribute: Any = "_is_profiler_enabled" if sys.version_info < (3, 12) else (False, "_is_profiler_enabled")
    f, names = shortened(
        assembled(
            ("LOAD_GLOBAL", (False, "__import_torch_dot_autograd_dot_profiler")),
            ("LOAD_ATTR", attribute),
            ("STORE_FAST", "tmp"),
            *either(None, None, ("LOAD_FAST", "tmp")),
            ("NOP",),
            ("POP_TOP",),
            *either(None, None, ("LOAD_FAST", "tmp"), ("LOAD_CONST", None), ("IS_OP", 0)),
            ("POP_TOP",),
            ("LOAD_FAST", "x"),
            RETURN,
        )
    )
    assert f(7) == 7
    assert names == ["LOAD_FAST", "RETURN_VALUE"]


def test_other_conditions_stay() -> None:
    f, _ = shortened(assembled(*either(1, 2, ("LOAD_FAST", "x")), RETURN))
    assert (f(True), f(False)) == (1, 2)
    _, names = shortened(assembled(*either(1, 1, ("LOAD_FAST", "x"), ("UNARY_NEGATIVE",)), RETURN))
    assert "UNARY_NEGATIVE" in names, "it may raise"


def test_lists_that_are_not_returned_are_not_made() -> None:
    f, names = shortened(
        assembled(
            ("BUILD_LIST", 0),
            ("LOAD_FAST", "x"),
            ("LOAD_CONST", 0),
            ("BINARY_SUBSCR",),
            ("BUILD_LIST", 0),
            ("BUILD_LIST", 0),
            ("SWAP", 2),
            ("BUILD_LIST", 0),
            ("LIST_EXTEND", 2),
            ("POP_TOP",),
            ("BUILD_LIST", 1),
            ("SWAP", 2),
            ("SWAP", 3),
            ("POP_TOP",),
            ("POP_TOP",),
            RETURN,
        )
    )
    assert f([7]) == 7
    assert names == ["LOAD_FAST", "LOAD_CONST", "BINARY_SUBSCR", "RETURN_VALUE"]


@pytest.mark.parametrize(
    ("instructions", "result"),
    [
        pytest.param(  # one list, returned twice
            [("LOAD_FAST", "x"), ("BUILD_LIST", 1), ("COPY", 1), ("BUILD_TUPLE", 2), RETURN],
            lambda r: r == ([5], [5]) and r[0] is r[1],
            id="used twice",
        ),
        pytest.param(
            [("BUILD_LIST", 0), ("LOAD_FAST", "x"), ("BUILD_LIST", 1), ("LIST_EXTEND", 1), RETURN],
            lambda r: r == [5],
            id="changed",
        ),
    ],
)
def test_what_cannot_be_made_from_its_parts_stays(instructions: Any, result: Callable[[Any], bool]) -> None:
    f, names = shortened(assembled(*instructions))
    assert result(f(5))
    assert names == [name for name, *_ in instructions]


def test_a_look_up_that_is_not_returned_still_happens() -> None:
    """The container may be anything, and the look-up have effects."""
    seen = []

    class Container:
        def __getitem__(self, key: int) -> int:
            seen.append(key)
            return key

    f, _ = shortened(
        assembled(
            ("LOAD_FAST", "x"), ("LOAD_CONST", 3), ("BINARY_SUBSCR",), ("POP_TOP",), ("LOAD_FAST", "x"), RETURN
        )
    )
    f(Container())
    assert seen == [3]


def test_what_was_on_the_stack_before_stays_there() -> None:
    f, _ = shortened(
        assembled(("LOAD_FAST", "x"), ("UNARY_NEGATIVE",), ("LOAD_FAST", "x"), ("BUILD_TUPLE", 2), RETURN)
    )
    assert f(5) == (-5, 5)


def test_constants_that_nothing_reads_go_and_arguments_stay() -> None:
    f, names = shortened(
        assembled(
            ("LOAD_CONST", None),
            ("STORE_FAST", "unread"),
            ("LOAD_CONST", 1),
            ("STORE_FAST", "read"),
            ("LOAD_CONST", None),
            ("POP_TOP",),
            ("LOAD_CONST", None),
            ("STORE_FAST", "y"),  # frees an argument
            ("DELETE_FAST", "unread"),
            ("LOAD_FAST", "read"),
            RETURN,
            argnames=("x", "y"),
        )
    )
    assert f(5, 6) == 1
    assert names == ["LOAD_CONST", "STORE_FAST", "LOAD_CONST", "STORE_FAST", "LOAD_FAST", "RETURN_VALUE"]


def test_a_frame_that_is_one_graph_only_loads_calls_and_returns() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return (x + 1).relu()

    with torch.no_grad():
        compiled = torch.compile(f, backend="frame_swap")
        compiled(torch.randn(4))
        frame_swap.wait()
        (entry,) = dynamo.cache_entries(f.__code__)
        instructions = list(dis.get_instructions(entry.code))
        assert [i.arg for i in instructions if i.opname == "BUILD_LIST"] == [1]
        assert not {"LIST_EXTEND", "DELETE_FAST"} & {i.opname for i in instructions}
