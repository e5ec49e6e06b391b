"""Rewritten code: instructions of Dynamo's that are removed or must stay, and calls that go to another callee."""

from __future__ import annotations

import dis
import gc
import sys
import weakref
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import pytest
import torch
from bytecode import Bytecode, Instr, Label

import frame_swap
from frame_swap import errors
from frame_swap.codegen import calls
from frame_swap.codegen.conditions import Condition
from frame_swap.internals import dynamo

pytestmark = pytest.mark.quick


def assembled(*instructions: tuple[Any, ...] | Label, argnames: tuple[str, ...] = ("x",)) -> CodeType:
    """A function's code, after the few instructions that all functions begin with."""
    code = Bytecode([Instr("RESUME", 0), *(i if isinstance(i, Label) else Instr(*i) for i in instructions)])
    code.argnames, code.argcount, code.name = list(argnames), len(argnames), "f"
    code.flags |= 3  # optimised, with locals of its own
    return code.to_code()


def shortened(code: CodeType) -> tuple[Callable[..., Any], list[str]]:
    """The function, and its instructions but for the first."""
    new = calls.call_constants(code, {})
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


def test_the_test_for_a_profiler_is_removed_with_its_records() -> None:
    """torch 2.15 tests for a profiler before each call of a graph."""
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
def test_values_that_are_used_twice_or_changed_stay(instructions: Any, result: Callable[[Any], bool]) -> None:
    f, names = shortened(assembled(*instructions))
    assert result(f(5))
    assert names == [name for name, *_ in instructions]


def test_a_look_up_that_is_not_returned_still_happens() -> None:
    """The container may be any object, and the look-up may have effects."""
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


def test_values_that_were_on_the_stack_before_stay() -> None:
    f, _ = shortened(
        assembled(("LOAD_FAST", "x"), ("UNARY_NEGATIVE",), ("LOAD_FAST", "x"), ("BUILD_TUPLE", 2), RETURN)
    )
    assert f(5) == (-5, 5)


def test_unread_constants_are_removed_and_arguments_stay() -> None:
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


# A graph's call, directed to one of several targets

PLACEHOLDER = "frame_swap:placeholder"


def usual(*args: Any) -> Any:
    return "usual", *args


def large(*args: Any) -> Any:
    return "large", *args


def larger(*args: Any) -> Any:
    return "larger", *args


def always(*args: Any) -> Any:
    return "always", *args


def always_boxed(args: list[Any]) -> Any:
    return "boxed", *args


def recover(error: Exception, /, *args: Any) -> Any:
    return "recovered", error, *args


def frame(x: Any, n: int) -> Any:
    return [n, call(x, n), x]  # noqa: F821


def frame_with_two_calls(x: Any, n: int) -> Any:
    return [n, call(n, x), call(x, n)]  # noqa: F821


IF_LARGE = calls.Target(large, None, Condition("n > 10", {"n": 1}))
IF_LARGER = calls.Target(larger, None, Condition("m > 20 and m % 2 == 0", {"m": 1}))
ALWAYS = calls.Target(always, None, None)
ALWAYS_BOXED = calls.Target(always, always_boxed, None)


def directed(
    *targets: calls.Target,
    source: Any = frame,
    recover: Callable[..., Any] | None = None,
    keep: object | None = None,
) -> FunctionType:
    base = calls.call_constants(source.__code__, {"call": PLACEHOLDER})
    return FunctionType(calls.direct_calls(base, PLACEHOLDER, usual, targets, recover, keep), {})


def callees(f: FunctionType, sizes: list[int]) -> list[str]:
    """The name of what is called at each size; the arguments must arrive in any case."""
    called = []
    for n in sizes:
        before, (name, *args), after = f("x", n)
        assert (before, args, after) == (n, ["x", n], "x")
        called.append(name)
    return called


@pytest.mark.parametrize("recover", [None, recover], ids=["", "recovering"])
@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ([], ["usual", "usual", "usual"]),
        ([ALWAYS], ["always", "always", "always"]),
        ([ALWAYS_BOXED], ["boxed", "boxed", "boxed"]),
        ([IF_LARGE], ["usual", "large", "large"]),
        ([IF_LARGE, IF_LARGER], ["usual", "large", "large"]),
        ([IF_LARGER, IF_LARGE], ["usual", "large", "larger"]),
        ([IF_LARGE, ALWAYS], ["always", "large", "large"]),
        ([IF_LARGER, IF_LARGE, ALWAYS_BOXED], ["always", "large", "larger"]),
    ],
)
def test_the_first_target_whose_condition_holds_is_called(
    targets: list[calls.Target], expected: list[str], recover: Any
) -> None:
    assert callees(directed(*targets, recover=recover), [5, 15, 30]) == expected


@pytest.mark.parametrize("targets", [[ALWAYS], [IF_LARGE], [IF_LARGER, IF_LARGE, ALWAYS]], ids=len)
@pytest.mark.parametrize("recover", [None, recover], ids=["", "recovering"])
def test_each_call_in_a_frame_has_its_own_choice(targets: list[calls.Target], recover: Any) -> None:
    other = targets[-1].call if targets[-1].condition is None else usual
    first = targets[0].call
    f = directed(*targets, source=frame_with_two_calls, recover=recover)
    assert f(2, 30) == [30, other(30, 2), first(2, 30)]
    assert f(30, 2) == [2, first(2, 30), other(30, 2)]


def test_a_condition_is_not_evaluated_after_one_that_holds() -> None:
    undefined = calls.Target(usual, None, Condition("1 // (n - 15) > 0", {"n": 1}))
    assert callees(directed(IF_LARGE, undefined, ALWAYS), [15]) == ["large"]
    with pytest.raises(ZeroDivisionError):
        directed(undefined, IF_LARGE, ALWAYS)("x", 15)


@pytest.mark.parametrize(
    "targets",
    [[ALWAYS], [ALWAYS_BOXED], [IF_LARGE], [IF_LARGER, IF_LARGE, ALWAYS_BOXED]],
    ids=["always", "boxed", "usual", "several"],
)
def test_errors_of_targets_and_of_the_usual_callee_are_recovered_from(targets: list[calls.Target]) -> None:
    error = ValueError("for the test")

    def fail(*args: Any) -> Any:
        raise error

    failing = [t._replace(call=fail, boxed=t.boxed and fail) for t in targets]
    base = calls.call_constants(frame.__code__, {"call": PLACEHOLDER})
    f = FunctionType(calls.direct_calls(base, PLACEHOLDER, fail, failing, recover), {})
    for n in (5, 15, 30):
        assert f("x", n) == [n, ("recovered", error, "x", n), "x"]
    f = FunctionType(calls.direct_calls(base, PLACEHOLDER, fail, failing, None), {})
    with pytest.raises(ValueError, match="for the test"):
        f("x", 5)


def test_without_targets_the_code_has_nothing_to_recover_with() -> None:
    f = directed(recover=recover)
    assert recover not in f.__code__.co_consts
    assert not f.__code__.co_exceptiontable
    assert usual not in directed(ALWAYS, recover=recover).__code__.co_consts, "nothing calls it"


def test_the_code_keeps_an_object_alive() -> None:
    class Kept:
        def __call__(self) -> None: ...

    kept: Any = Kept()
    f, alive = directed(IF_LARGE, ALWAYS, recover=recover, keep=kept), weakref.ref(kept)
    assert callees(f, [5, 15]) == ["always", "large"]
    del kept
    assert alive() is not None
    del f
    gc.collect()
    assert alive() is None


def test_two_calls_with_their_own_targets_in_one_frame() -> None:
    """Each is directed in turn; the second time undoes nothing of the first."""

    class Kept:
        def __call__(self) -> None: ...

    def source(x: Any, n: int) -> Any:
        first = one(x, n)  # noqa: F821
        return [other(first, n), x]  # noqa: F821

    placeholders = {"one": "frame_swap:one", "other": "frame_swap:other"}
    base = calls.call_constants(source.__code__, placeholders)
    kept: Any = [Kept(), Kept()]
    alive = [weakref.ref(k) for k in kept]
    code = calls.direct_calls(base, placeholders["one"], usual, [IF_LARGE], recover, kept[0])
    code = calls.direct_calls(code, placeholders["other"], usual, [IF_LARGER, ALWAYS], recover, kept[1])
    f = FunctionType(code, {})
    assert f("x", 5) == [("always", ("usual", "x", 5), 5), "x"]
    assert f("x", 30) == [("larger", ("large", "x", 30), 30), "x"]
    del kept
    gc.collect()
    assert all(ref() is not None for ref in alive)
    del code, f
    gc.collect()
    assert not any(ref() for ref in alive)


def test_a_target_after_an_unconditional_one_is_refused() -> None:
    for targets in ([ALWAYS, IF_LARGE], [ALWAYS, ALWAYS]):
        with pytest.raises(ValueError, match="must be the last one"):
            directed(*targets)


def test_a_call_whose_arguments_cannot_be_found_or_loaded_again_is_refused() -> None:
    def computes(x: Any, n: int) -> Any:
        return [n, call(x, n + 1), x]  # noqa: F821

    with pytest.raises(errors.Indirect, match="a second time"):
        directed(ALWAYS, source=computes, recover=recover)
    assert directed(ALWAYS, source=computes)("x", 1) == [1, ("always", "x", 2), "x"]

    def unpacks(x: Any, n: int) -> Any:
        return call(*x)  # noqa: F821

    with pytest.raises(errors.Indirect, match="not Dynamo's"):
        directed(IF_LARGE, source=unpacks)
    assert directed(ALWAYS, source=unpacks)([1, 2], 0) == ("always", 1, 2)
