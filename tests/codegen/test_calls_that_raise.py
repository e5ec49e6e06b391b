"""Rewritten code that makes a call again does what its source says, and costs nothing where nothing raises."""

from __future__ import annotations

import dis
import itertools
import sys
from collections.abc import Callable
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest

from frame_swap import errors
from frame_swap.codegen import calls

pytestmark = pytest.mark.quick

Function = Callable[..., Any]


PLACEHOLDER = "frame_swap:placeholder"


def eager_code(x: Any, y: Any) -> Any:
    raise AssertionError("nothing calls it")


def compiled_code(x: Any, y: Any) -> Any:
    if isinstance(x, BaseException):
        raise x
    return x, y


def compiled_code_boxed(args: list[Any]) -> Any:
    return compiled_code(*args)


def recover(error: Exception, /, *args: Any) -> Any:
    if isinstance(args[1], BaseException):
        raise args[1]
    return "recovered", error, *args


def directed(base: CodeType, boxed: Any, recover: calls.Recover | None = None) -> CodeType:
    targets = [calls.Target(compiled_code, boxed, None)]
    return calls.direct_calls(base, PLACEHOLDER, eager_code, targets, recover)


class Managed:
    """A context manager that notes what it saw."""

    def __init__(self) -> None:
        self.seen: list[type[BaseException] | None] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.seen.append(kind)


def plainly(x: Any, y: Any, manager: Managed) -> Any:
    return [y, call(x, y), x]  # noqa: F821


def in_a_try_block(x: Any, y: Any, manager: Managed) -> Any:
    try:
        return [y, call(x, y), x]  # noqa: F821
    except ZeroDivisionError as error:
        return "outer", error, error.__context__
    finally:
        manager.seen.append(None)


def in_a_with_block(x: Any, y: Any, manager: Managed) -> Any:
    with manager:
        return {0: y, 1: (y, call(x, y))}  # noqa: F821


def twice(x: Any, y: Any, manager: Managed) -> Any:
    return [y, call(y, x) if isinstance(x, int) else 0, call(x, y), x]  # noqa: F821


@pytest.mark.parametrize("boxed", [None, compiled_code_boxed], ids=["arguments", "one list"])
@pytest.mark.parametrize("frame", [plainly, in_a_try_block, in_a_with_block, twice], ids=lambda f: f.__name__)
def test_rewritten_code_does_what_the_source_says(frame: FunctionType, boxed: Any) -> None:
    code = calls.call_constants(frame.__code__, {"call": PLACEHOLDER})
    recovering = FunctionType(directed(code, boxed, recover), globals())
    source = FunctionType(frame.__code__, {**globals(), "call": recovering_in_source})
    errors = [ValueError(), ZeroDivisionError(), KeyboardInterrupt(), GeneratorExit()]
    for x, y in itertools.product([1, *errors], [2, *errors]):
        managers = Managed(), Managed()
        outcomes = [outcome(f, x, y, m) for f, m in zip((source, recovering), managers, strict=True)]
        assert outcomes[0] == outcomes[1]
        assert managers[0].seen == managers[1].seen


def recovering_in_source(x: Any, y: Any) -> Any:
    try:
        return compiled_code(x, y)
    except Exception as error:
        failure = error
    return recover(failure, x, y)


def outcome(function: Function, *args: Any) -> Any:
    try:
        return function(*args)
    except BaseException as error:
        return error, error.__context__


def test_nothing_more_runs_where_nothing_raises() -> None:
    code = calls.call_constants(in_a_with_block.__code__, {"call": PLACEHOLDER})
    plain = directed(code, compiled_code_boxed)
    recovering = directed(code, compiled_code_boxed, recover)
    assert executed(plain) == executed(recovering)
    assert executed(recovering, ValueError()) != executed(recovering)


def executed(code: CodeType, x: Any = 1) -> list[tuple[str, Any]]:
    """The names and arguments of the instructions of `code` that a call runs."""
    ran = []
    names = {i.offset: (i.opname, "" if i.opcode in dis.hasjrel else i.argrepr) for i in dis.get_instructions(code)}

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_code is code:
            frame.f_trace_opcodes = True
            if event == "opcode":
                ran.append(names[frame.f_lasti])
            return trace
        return None

    sys._getframe().f_trace_opcodes = True  # Python 3.12 heeds the flag only if it was set before `settrace`
    sys.settrace(trace)
    try:
        FunctionType(code, globals())(x, 2, Managed())
    finally:
        sys.settrace(None)
    return ran


def test_arguments_that_cannot_be_loaded_twice_are_refused() -> None:
    def frame(x: Any, y: Any) -> Any:
        return call(x, y + 1)  # noqa: F821

    code = calls.call_constants(frame.__code__, {"call": PLACEHOLDER})
    with pytest.raises(errors.Indirect, match="a second time"):
        directed(code, None, recover)
