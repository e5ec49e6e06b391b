"""An offer that replaces installed code with better code for the same calls: a second rewrite of the frame."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import called, codes_called, live
from torch import Tensor, nn

import frame_swap
from frame_swap import FrameSwapWarning, State, delivery
from frame_swap.artifacts import load
from frame_swap.artifacts.compiled import Compiled
from frame_swap.checking.trial import Sides, Trial
from frame_swap.codegen.conditions import Condition
from frame_swap.delivery import Order, request
from frame_swap.region import Attempt, Purpose, Record
from frame_swap.serving import plan
from frame_swap.serving.plan import Offer, Served, planned


class Orders:
    """What was ordered, and a way to order the same again as better code."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Order] = []
        self.loaded: list[weakref.ref[Any]] = []
        self.trials: list[Trial] = []
        make, load_artifact, trials = delivery.Delivery.__init__, load.load, delivery.Delivery._trials

        def noting(self_: Any, order: Order, *args: Any, **options: Any) -> None:
            self.made.append(order)
            make(self_, order, *args, **options)

        def load_noting(*args: Any, **options: Any) -> Compiled:
            compiled = load_artifact(*args, **options)
            self.loaded.append(weakref.ref(compiled.call))
            return compiled

        monkeypatch.setattr(delivery.Delivery, "__init__", noting)
        monkeypatch.setattr(
            delivery.Delivery, "_trials", lambda self_, compiled: iter([*trials(self_, compiled), *self.trials])
        )
        monkeypatch.setattr(load, "load", load_noting)

    def better(self) -> Attempt:
        """Request better code for the region that was ordered first, and wait until it is offered or failed."""
        order = self.made[0]
        installed = next(a for a in order.record.attempts if a.state is State.INSTALLED)
        attempt = request(order, Purpose.BETTER, replaces=installed)
        frame_swap.wait()
        return attempt


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> Orders:
    return Orders(monkeypatch)


def one_region() -> Record:
    (record,) = live(frame_swap.report())
    return record


def inference(x: Tensor) -> Tensor:
    return (x.sin() @ x).relu()


def training(x: Tensor) -> Tensor:
    return (x * 2).cos().sum()


def check(compiled: Callable[..., Any], function: Callable[..., Any]) -> None:
    x = torch.rand(8, 8)
    leaves = [x.clone().requires_grad_(function is training) for _ in range(2)]
    actual, expected = compiled(leaves[0]), function(leaves[1])
    torch.testing.assert_close(actual, expected)
    if function is training:
        actual.backward()
        expected.backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("function", [inference, training])
@pytest.mark.parametrize("wrap", ["compile", "opt_in"])
def test_better_code_takes_the_place_of_the_first(orders: Orders, function: Any, wrap: str) -> None:
    compiled = torch.compile(function, backend="frame_swap") if wrap == "compile" else frame_swap.opt_in(function)
    check(compiled, function)
    frame_swap.wait()
    check(compiled, function)
    record = one_region()
    calls, first = record.eager_calls, record.attempts[0]
    before = [code.co_name for code in codes_called(lambda: check(compiled, function))]
    second = orders.better()
    assert (first.state, second.state, record.state) == (State.REPLACED, State.INSTALLED, State.INSTALLED)
    after = [code.co_name for code in codes_called(lambda: check(compiled, function))]
    assert after == before, "something stands in the way"
    assert record.eager_calls == calls
    assert "Trampoline.__call__" not in called(lambda: check(compiled, function))
    gc.collect()
    assert [ref() is None for ref in orders.loaded] == [True, False], "the replaced code is kept"
    assert record.row().artifacts == 1
    assert [row.state for row in record.row().compiles] == [State.REPLACED, State.INSTALLED]


def test_it_can_be_replaced_again_and_again(orders: Orders) -> None:
    compiled = torch.compile(inference, backend="frame_swap")
    check(compiled, inference)
    frame_swap.wait()
    for _ in range(3):
        orders.better()
        check(compiled, inference)
    record = one_region()
    assert [a.state for a in record.attempts] == [State.REPLACED] * 3 + [State.INSTALLED]
    assert (record.state, record.reason, record.eager_calls) == (State.INSTALLED, "", 1)


def test_a_graph_that_changes_buffers_keeps_its_trampoline_while_more_is_awaited(orders: Orders) -> None:
    model = nn.BatchNorm1d(4)
    reference = nn.BatchNorm1d(4)
    compiled = torch.compile(model, backend="frame_swap")
    x = torch.rand(8, 4)

    def check_model() -> None:
        torch.testing.assert_close(compiled(x), reference(x))
        torch.testing.assert_close(model.running_mean, reference.running_mean)

    frame_swap.configure(when="manual")
    check_model()
    frame_swap.wait()
    record = one_region()
    order = orders.made[0]
    second = request(order, Purpose.BETTER, replaces=record.attempts[0])  # before the first is installed
    assert record.awaited
    frame_swap.swap()
    check_model()
    assert record.server is not None, "nobody is left to install what is awaited"
    frame_swap.wait()
    frame_swap.swap()
    check_model()
    assert [a.state for a in record.attempts] == [State.REPLACED, State.INSTALLED]
    assert second.state is State.INSTALLED
    gc.collect()
    assert record.server is None, "nothing is awaited any more"
    check_model()


class Verdict(Trial):
    """Serves by what there is, and then says what it was told to."""

    def __init__(self, says: str, raising: bool = False) -> None:
        super().__init__()
        self.says, self.raising, self.calls = says, raising, 0

    def call(self, sides: Sides, args: Sequence[Any]) -> Any:
        self.calls += 1
        self.verdict = self.says
        return sides.compiled(*args) if self.raising else sides.current(*args)


@pytest.mark.parametrize("says", ["", "it is slower"])
def test_a_trial_of_better_code_sees_the_calls_and_decides(orders: Orders, says: str) -> None:
    compiled = torch.compile(inference, backend="frame_swap")
    check(compiled, inference)
    frame_swap.wait()
    record = one_region()
    calls = record.eager_calls
    trial = Verdict(says)
    orders.trials.append(trial)
    orders.better()
    assert record.attempts[1].state is State.TRIAL
    assert record.state is State.INSTALLED
    if says:
        with pytest.warns(FrameSwapWarning, match="keeps the compiled code that it has: it is slower"):
            check(compiled, inference)
    else:
        check(compiled, inference)
    assert trial.calls == 1
    check(compiled, inference)
    assert trial.calls == 1
    assert record.eager_calls == calls, "eager code served, although compiled code was there"
    states = [State.INSTALLED, State.REJECTED] if says else [State.REPLACED, State.INSTALLED]
    assert [a.state for a in record.attempts] == states
    assert "Trampoline.__call__" not in called(lambda: check(compiled, inference)), "the frame was not rewritten"
    assert record.reason == (f"it keeps the compiled code that it has: {says}" if says else "")


def test_better_code_that_raises_on_trial_leaves_the_first(orders: Orders, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile(inference, backend="frame_swap")
    check(compiled, inference)
    frame_swap.wait()
    orders.trials.append(Verdict("", raising=True))
    of = Served.of

    def raising(attempt: Attempt, code: Compiled, condition: Condition | None = None) -> Served:
        def call(*args: Any) -> Any:
            raise RuntimeError("for the test")

        return of(attempt, code._replace(call=call, boxed=None), condition)

    monkeypatch.setattr(plan.Served, "of", raising)
    orders.better()
    with pytest.warns(FrameSwapWarning, match="keeps the compiled code that it has: .*for the test"):
        check(compiled, inference)
    record = one_region()
    assert [a.state for a in record.attempts] == [State.INSTALLED, State.REJECTED]
    assert "Trampoline.__call__" not in called(lambda: check(compiled, inference))


def test_a_better_compile_that_fails_leaves_the_first(orders: Orders) -> None:
    compiled = torch.compile(inference, backend="frame_swap")
    check(compiled, inference)
    frame_swap.wait()
    frame_swap.configure(executor=_Broken())
    with pytest.warns(FrameSwapWarning, match="keeps the compiled code that it has"):
        orders.better()
    record = one_region()
    assert [a.state for a in record.attempts] == [State.INSTALLED, State.FAILED]
    assert record.state is State.INSTALLED
    assert "Trampoline.__call__" not in called(lambda: check(compiled, inference))


class _Broken:
    def submit(self, *args: Any) -> Any:
        raise RuntimeError("no more compiles today")


# --- Which code serves which calls -------------------------------------------------------------------------


def code(name: str) -> Compiled:
    return Compiled(lambda *args: name, None, (), repeatable=True)


def offered(name: str, condition: Condition | None = None, replaces: Attempt | None = None) -> Offer:
    return Offer(Served.of(Attempt(Record(None, name)), code(name), condition), replaces=replaces)


def small(bound: int) -> Condition:
    return Condition(f"s < {bound}", {"s": 0})


def names(entries: plan.Plan) -> list[str]:
    return [served.compiled.call() for served in entries]


def test_code_for_other_calls_comes_before_code_for_all() -> None:
    plan = planned((), offered("all"))
    plan = planned(plan, offered("small", small(3)))
    plan = planned(plan, offered("smaller", small(2)))
    assert names(plan) == ["small", "smaller", "all"]


@pytest.mark.parametrize(
    ("condition", "then"),
    [(small(3), ["new", "all"]), (small(2), ["new", "small", "all"]), (None, ["new", "all"])],
    ids=["the same condition", "another", "none"],
)
def test_code_that_replaces_takes_the_calls_of_the_old(condition: Condition | None, then: list[str]) -> None:
    plan = planned(planned((), offered("small", small(3))), offered("all"))
    old = plan[0]
    plan = planned(plan, offered("new", condition, replaces=old.attempt))
    assert names(plan) == then
    assert sum(served.condition is None for served in plan) == 1
    if condition is None:
        assert plan[0].condition == small(3), "it takes calls that it was not to replace"


def test_code_with_a_condition_leaves_the_rest_to_the_old_code_for_all() -> None:
    plan = planned((), offered("all"))
    plan = planned(plan, offered("new", small(3), replaces=plan[0].attempt))
    assert names(plan) == ["new", "all"]


def test_two_codes_for_all_calls_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="neither is to replace the other"):
        planned(planned((), offered("all")), offered("all"))
