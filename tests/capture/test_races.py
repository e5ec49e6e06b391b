"""The program changes what a capture reads while it reads it: no call computes anything else than eager code."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.convert_frame import DynamoOutput
from torch._dynamo.symbolic_convert import InliningInstructionTranslator

import frame_swap
from frame_swap.internals import read_log
from frame_swap.region import record

from . import subjects
from .harness import Planned, changed_meanwhile, run_elsewhere, same_as_eager
from .subjects import CHANGES, Parts


@pytest.fixture(autouse=True)
def in_the_background() -> Iterator[None]:
    frame_swap.configure(capture="background", when="never")
    yield
    frame_swap.wait()  # captures that the test's last calls have asked for
    subjects.restore()


def compiled(model: torch.nn.Module) -> Callable[..., Any]:
    return torch.compile(model, backend="frame_swap")


def handed_over() -> bool:
    """Whether a call has been served by a captured graph."""
    return any(region.eager_calls for region in frame_swap.report().regions)


@pytest.fixture
def before_guards(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """What the program does between a trace and the building of its guards; the worst moment."""
    todo: list[Callable[[], object]] = []
    build = DynamoOutput.build_guards

    def build_later(*args: Any, **keywords: Any) -> Any:
        while todo:
            run_elsewhere(todo.pop())
        return build(*args, **keywords)

    monkeypatch.setattr(DynamoOutput, "build_guards", build_later)
    return todo


@pytest.mark.fast
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_between_trace_and_guards(name: str, before_guards: list[Callable[[], object]]) -> None:
    change, model, x = CHANGES[name], Parts(1), torch.randn(4, 3)
    call = compiled(model)
    before_guards.append(lambda: change.do(model.parts[0]))
    call(x)
    frame_swap.wait()
    assert not before_guards, "nothing was captured"
    assert same_as_eager(call, model, x)
    assert not handed_over()
    frame_swap.wait()
    assert same_as_eager(call, model, x)
    assert handed_over()
    change.undo(model.parts[0])
    assert same_as_eager(call, model, x)


@pytest.mark.fast
@pytest.mark.parametrize("while_in", ["inline_call", "build_inline_tracer"])
def test_code_that_is_replaced_only_while_its_function_is_inlined(
    monkeypatch: pytest.MonkeyPatch, while_in: str
) -> None:
    """Before the trace, and when guards are built, the function has the code that it has now."""
    change, model, x = CHANGES["a function's code"], Parts(1), torch.randn(4, 3)
    stock = getattr(InliningInstructionTranslator, while_in)
    changed: list[str] = []

    def inline_other_code(parent: Any, function: Any, *args: Any, **keywords: Any) -> Any:
        if changed or function.get_name() != "helper":
            return stock(parent, function, *args, **keywords)
        changed.append(while_in)
        run_elsewhere(lambda: change.do(model.parts[0]))
        try:
            return stock(parent, function, *args, **keywords)
        finally:
            run_elsewhere(lambda: change.undo(model.parts[0]))

    monkeypatch.setattr(InliningInstructionTranslator, while_in, staticmethod(inline_other_code))
    call = compiled(model)
    call(x)
    frame_swap.wait()
    assert changed, "nothing was captured"
    assert same_as_eager(call, model, x)
    frame_swap.wait()
    assert same_as_eager(call, model, x)
    assert handed_over()


def fuzz(seed: int, toggles: int) -> Counter[str]:
    """Captures of a program that changes at random moments, and mostly back again; what has become of them."""
    choose, seen, length = random.Random(seed), Counter[str](), 20_000
    while seen["toggles"] < toggles:
        torch._dynamo.reset()
        record.forget_all()
        model, x = Parts(1), torch.randn(4, 3)
        call = compiled(model)
        plan: list[Planned] = []
        done: list[str] = []
        for name in choose.sample(sorted(CHANGES), k=choose.choice((1, 1, 2))):
            do, undo = CHANGES[name]
            at = choose.randrange(length)
            done.append(name)
            plan.append(Planned(at, lambda do=do: do(model.parts[0])))
            if choose.random() < 0.7:
                done.pop()
                plan.append(Planned(at + choose.choice((30, 300, 3000)), lambda undo=undo: undo(model.parts[0])))
        plan.sort(key=lambda planned: planned.at)
        seen["toggles"] += len(plan)
        with changed_meanwhile(plan) as lengths:
            call(x)
            frame_swap.wait()
        length = lengths[0]
        for planned in plan:  # the capture was shorter
            planned.do()
        for state in ("as it is", "undone"):
            if not same_as_eager(call, model, x):
                seen["wrong"] += 1
                print(f"wrong, seed {seed}, {state}: {done}")
            if state == "as it is":
                for name in done:
                    CHANGES[name].undo(model.parts[0])
        seen["handed over"] += handed_over()
        seen["captures"] += 1
        frame_swap.wait()
        subjects.restore()
    return seen


def test_changes_at_random_moments() -> None:
    seen = fuzz(seed=0, toggles=60)
    assert seen["wrong"] == 0
    assert seen["handed over"]


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_ten_thousand_changes_at_random_moments() -> None:
    seen = fuzz(seed=1, toggles=10_000)
    assert seen["wrong"] == 0
    assert seen["handed over"] > seen["captures"] / 20


def test_the_planted_changes_are_found_by_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above can fail: without the log, calls compute something else."""
    monkeypatch.setattr(read_log.ReadLog, "_differs", lambda *args, **keywords: None)
    monkeypatch.setattr(read_log.ReadLog, "guarded", lambda *args: None)
    assert fuzz(seed=0, toggles=60)["wrong"]
