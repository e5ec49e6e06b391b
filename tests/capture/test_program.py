"""A capture beside the program leaves its state, its objects and its threads alone."""

from __future__ import annotations

import gc
import logging
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import frame_swap
from frame_swap import State, region
from frame_swap.capture.captures import Capture, Outcome
from frame_swap.internals import beside, read_log

from .harness import outcomes_of_captures

HANG = 120.0


@pytest.fixture(autouse=True)
def in_the_background() -> Iterator[None]:
    frame_swap.configure(capture="background", when="never")
    yield
    frame_swap.wait()


def compiled(target: Any, **keywords: Any) -> Any:
    return torch.compile(target, backend="frame_swap", **keywords)


class Noisy(nn.Module):
    """Draws random numbers, and makes tensors of the default dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = nn.functional.dropout(layer(x)) + torch.rand(4) + torch.ones(4)
        return x


def during_a_capture(look: Callable[[], object]) -> list[Any]:
    """What `look` returns while a capture runs, each time anew."""
    seen, ended = [], threading.Event()
    stock = Capture.run

    def run(capture: Capture) -> Any:
        try:
            return stock(capture)
        finally:
            ended.set()

    Capture.run = run  # type: ignore[method-assign]
    try:
        compiled(Noisy())(torch.randn(3, 4))
        while not ended.is_set():
            seen.append(look())
    finally:
        Capture.run = stock  # type: ignore[method-assign]
    assert len(seen) > 50
    return seen


@pytest.mark.fast
def test_random_numbers_come_in_the_same_order() -> None:
    torch.manual_seed(3)
    draws = during_a_capture(lambda: torch.rand(()).item())
    torch.manual_seed(3)
    Noisy()(torch.randn(3, 4))
    assert draws == [torch.rand(()).item() for _ in draws]


def test_pythons_random_numbers() -> None:
    def f(x: Tensor) -> Tensor:
        return x * random.uniform(0.0, 1.0)

    call, x = compiled(f), torch.ones(3)
    random.seed(5)
    expected = [random.uniform(0.0, 1.0) for _ in range(6)]
    random.seed(5)
    have = []
    for _ in range(6):
        have.append(call(x)[0].item())
        frame_swap.wait()
    assert have == pytest.approx(expected)


def test_the_default_dtype_is_not_put_back() -> None:
    dtypes = [torch.float32, torch.float64]
    try:

        def look() -> bool:
            dtypes.reverse()
            torch.set_default_dtype(dtypes[0])
            return torch.ones(8).sum().dtype is dtypes[0] and torch.get_default_dtype() is dtypes[0]

        assert all(during_a_capture(look))
    finally:
        torch.set_default_dtype(torch.float32)


def test_is_compiling_is_false_in_the_program() -> None:
    assert not any(during_a_capture(torch.compiler.is_compiling))


@pytest.mark.parametrize("first", ["graph", "pair"])
def test_no_fx_trace_patches_the_programs_modules(first: Any) -> None:
    """While one does, calls of compiled functions raise, on any thread."""
    frame_swap.configure(first=first)
    assert not any(during_a_capture(torch.fx._symbolic_trace.is_fx_symbolic_tracing))
    assert [row.state for row in frame_swap.report().regions] == [State.EAGER]


def test_a_graph_that_aotautograd_has_to_trace_is_captured_in_the_call() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    call, x = compiled(f), torch.ones(3)
    assert torch.equal(call(x), f(x))
    frame_swap.wait()
    assert torch.equal(call(x), f(x))
    assert frame_swap.report().regions[-1].eager_calls == 1


def test_an_optimizer_is_traced_in_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo makes its state when it traces."""
    outcomes = outcomes_of_captures(monkeypatch)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([weight], lr=0.1)
    weight.grad = torch.ones(3)

    def step() -> None:
        optimizer.step()

    call = compiled(step)
    call()
    frame_swap.wait()
    assert outcomes == [Outcome.IMPOSSIBLE]
    call()
    twin = torch.nn.Parameter(torch.ones(3))
    expected = torch.optim.Adam([twin], lr=0.1)
    for _ in range(2):
        twin.grad = torch.ones(3)
        expected.step()
    assert torch.allclose(weight, twin)


def test_a_lazy_module_is_initialized_by_a_call() -> None:
    torch.manual_seed(3)
    twin = nn.LazyLinear(4)
    x = torch.ones(2, 3)
    expected = twin(x)
    torch.manual_seed(3)
    model = nn.LazyLinear(4)
    call = compiled(model)
    for _ in range(4):
        assert torch.equal(call(x), expected)
        frame_swap.wait()
    assert any(row.eager_calls for row in frame_swap.report().regions)


def test_a_call_that_changes_its_own_arguments() -> None:
    def f(x: Tensor, items: list[Tensor], **others: Tensor) -> Tensor:
        x = x + len(items) + others.pop("y")
        items.append(x)
        return x + len(others)

    call, x = compiled(f), torch.ones(3)
    for _ in range(4):
        mine, twins = [x], [x]
        assert torch.equal(call(x, mine, y=x), f(x, twins, y=x))
        assert len(mine) == len(twins) == 2
        frame_swap.wait()
    assert any(row.eager_calls for row in frame_swap.report().regions)


def test_arguments_that_are_one_and_the_same() -> None:
    def f(x: Tensor, a: list[float], b: list[float]) -> Tensor:
        a.append(1.0)
        return x * len(b)

    x, same = torch.ones(3), list[float]()
    call = compiled(f)
    call(x, [], [])
    frame_swap.wait()
    assert torch.equal(call(x, same, same), x)  # not on what was captured
    frame_swap.wait()
    torch._dynamo.reset()
    region.record.forget_all()
    for _ in range(3):
        same = []
        assert torch.equal(call(x, same, same), x)
        frame_swap.wait()
    assert any(row.eager_calls for row in frame_swap.report().regions)


def test_deterministic_algorithms_stay_as_they_are() -> None:
    def f(x: Tensor) -> Tensor:
        torch.use_deterministic_algorithms(True)
        x = x + 1
        torch.use_deterministic_algorithms(False)
        return x

    torch.use_deterministic_algorithms(False)
    call = compiled(f)
    stock, seen = Capture.run, []

    def run(capture: Capture) -> Any:
        outcome = stock(capture)
        seen.append((outcome, torch.are_deterministic_algorithms_enabled()))
        return outcome

    Capture.run = run  # type: ignore[method-assign]
    try:
        call(torch.ones(3))
        frame_swap.wait()
    finally:
        Capture.run = stock  # type: ignore[method-assign]
    assert [enabled for _, enabled in seen] == [False]
    call(torch.ones(3))  # captured in the call
    assert region.records()


def test_a_change_of_the_default_dtype_ends_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    call, x = compiled(Noisy()), torch.randn(3, 4)
    stock = beside.trace

    def trace(*args: Any) -> Any:
        torch.set_default_dtype(torch.float64)
        try:
            return stock(*args)
        finally:
            torch.set_default_dtype(torch.float32)

    monkeypatch.setattr(beside, "trace", trace)
    outcomes = outcomes_of_captures(monkeypatch)
    call(x)
    frame_swap.wait()
    assert outcomes == [Outcome.STALE]
    assert frame_swap.report().regions == []


def test_gradient_modes_and_autocast_of_the_caller() -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        return x @ w

    x, w = torch.ones(3, 3), torch.ones(3, 3, requires_grad=True)
    contexts: list[Callable[[], Any]] = [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.enable_grad,
    ]
    for context in contexts:
        torch._dynamo.reset()
        region.record.forget_all()
        call = compiled(f)
        with context():
            call(x, w)
            frame_swap.wait()
            have, want = call(x, w), f(x, w)
        (row,) = frame_swap.report().regions
        assert row.eager_calls == 1, context
        assert (have.dtype, have.requires_grad, have.is_inference()) == (
            want.dtype,
            want.requires_grad,
            want.is_inference(),
        )


def test_another_number_of_threads() -> None:
    """Guards compare it, and each thread has its own."""
    usual = torch.get_num_threads()

    def f(x: Tensor) -> Tensor:
        return x.sin()

    x = torch.ones(3)
    try:
        for threads in (2, 1, 2):
            torch.set_num_threads(threads)
            torch._dynamo.reset()
            region.record.forget_all()
            call = compiled(f)
            call(x)
            frame_swap.wait()
            call(x)
            assert [row.eager_calls for row in frame_swap.report().regions] == [1], threads
    finally:
        torch.set_num_threads(usual)


# Objects


def test_inputs_die_when_the_capture_is_over() -> None:
    def f(x: Tensor) -> Tensor:
        return x * 2

    call = compiled(f)
    x = torch.ones(3)
    reference = weakref.ref(x)
    call(x)
    del x
    frame_swap.wait()
    gc.collect()
    assert reference() is None
    assert torch.equal(call(torch.ones(3)), torch.full((3,), 2.0))
    assert [row.eager_calls for row in frame_swap.report().regions] == [1]


def test_a_module_dies_with_what_was_captured_for_it() -> None:
    model = nn.Linear(3, 3)
    call = compiled(model)
    call(torch.ones(3))
    frame_swap.wait()
    reference = weakref.ref(model)
    assert frame_swap.report().regions[0].state is State.EAGER
    (record,) = region.records()
    assert record.server is not None
    del model, call
    gc.collect()
    assert reference() is None


class Using(nn.Module):
    used: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def _make(factor: float) -> Callable[[Tensor], Tensor]:
    scope: dict[str, Any] = {}
    exec(f"def scale(x): return x * {factor}", scope)
    function: Callable[[Tensor], Tensor] = scope["scale"]
    return function


def test_an_object_that_dies_between_capture_and_handover() -> None:
    """Another takes its place at the same address; guards by id cannot tell the two apart."""
    for _ in range(5):  # the address may be taken by something else
        torch._dynamo.reset()
        model, x = Using(), torch.ones(3)
        model.used = _make(2)
        call = compiled(model)
        call(x)
        frame_swap.wait()
        address = id(model.used.__code__)
        model.used = None
        gc.collect()
        others = [_make(3) for _ in range(500)]
        model.used = next((other for other in others if id(other.__code__) == address), None)
        if model.used is not None:
            break
    else:
        pytest.skip("no object came to the same address")
    assert torch.equal(call(x), x * 3)


def test_a_dead_object_differs_from_every_other() -> None:
    class Thing:
        pass

    differs = read_log._is_not(thing := Thing())
    assert not differs(thing)
    address = id(thing)
    del thing
    heirs = [thing for thing in [Thing() for _ in range(100)] if id(thing) == address]
    assert heirs
    assert differs(heirs[0])
    assert differs(None)


# Reset, threads


def test_what_was_captured_before_a_reset_is_dropped() -> None:
    def f(x: Tensor) -> Tensor:
        return x + 1

    call, x = compiled(f), torch.ones(3)
    call(x)
    frame_swap.wait()
    torch._dynamo.reset()
    gc.collect()
    (record,) = region.records()
    assert record.server is None
    call(x)
    assert frame_swap.report().capturing
    frame_swap.wait()
    call(x)
    assert [row.eager_calls for row in frame_swap.report().regions] == [0, 1]


def test_a_reset_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    def f(x: Tensor) -> Tensor:
        return x + 1

    reached, released = threading.Event(), threading.Event()
    stock = Capture.run

    def run(capture: Capture) -> Any:
        reached.set()
        assert released.wait(HANG)
        return stock(capture)

    monkeypatch.setattr(Capture, "run", run)
    call, x = compiled(f), torch.ones(3)
    call(x)
    assert reached.wait(HANG)
    torch._dynamo.reset()
    monkeypatch.setattr(Capture, "run", stock)
    call(x)  # asks for another capture
    assert len(frame_swap.report().capturing) == 2
    released.set()
    frame_swap.wait()
    gc.collect()
    assert [record.server is not None for record in region.records()] == [False, True]
    call(x)
    assert [row.eager_calls for row in frame_swap.report().regions] == [0, 1]


def test_several_threads() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    call = compiled(model)
    inputs = [torch.randn(n, 4) for n in range(2, 6)]
    wrong: list[int] = []

    def work(x: Tensor) -> None:
        for at in range(200):
            if not torch.equal(call(x), model(x)):
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(x,)) for x in inputs]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    frame_swap.wait()
    for x in inputs:
        work(x)
    assert not wrong
    assert 1 <= len(frame_swap.report().regions) <= 5


def test_one_capture_for_many_calls() -> None:
    def f(x: Tensor) -> Tensor:
        return x + 1

    call, x = compiled(f), torch.ones(3)
    begin = threading.Barrier(8)

    def work() -> None:
        begin.wait()
        call(x)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(frame_swap.report().capturing) <= 1
    frame_swap.wait()
    assert len(frame_swap.report().regions) == 1


def test_a_capture_in_a_call_does_not_wait_for_the_one_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops that one, which holds Dynamo's lock."""

    def f(x: Tensor) -> Tensor:
        return x + 1

    def g(x: Tensor) -> Tensor:
        return x + 2

    reached = threading.Event()
    stock = beside.FakeTensorMode.dispatch

    def dispatch(*args: Any, **keywords: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            reached.set()
            notes = read_log.log()
            while notes is not None:  # for ever, but for the look at the program that each op takes
                notes.checkpoint()
        return stock(*args, **keywords)

    monkeypatch.setattr(beside.FakeTensorMode, "dispatch", dispatch)
    call, x = compiled(f), torch.ones(3)
    call(x)
    assert reached.wait(HANG)
    compiled(g, fullgraph=True)(x)
    assert [row.state for row in frame_swap.report().regions][-1] is State.EAGER
    frame_swap.wait()
    monkeypatch.setattr(beside.FakeTensorMode, "dispatch", stock)
    call(x)
    frame_swap.wait()
    call(x)
    assert [row.eager_calls for row in frame_swap.report().regions][-1] == 1


def test_refused_guards_are_not_logged_as_errors(caplog: pytest.LogCaptureFixture) -> None:
    class Model(nn.Module):
        extra: Any = None

        def forward(self, x: Tensor) -> Tensor:
            return x * self.box.value

    model = Model()
    model.box = nn.Module()
    model.box.value = 2.0
    stock = torch._dynamo.convert_frame.DynamoOutput.build_guards

    def build(*args: Any, **keywords: Any) -> Any:
        del model.box
        return stock(*args, **keywords)

    dynamos = logging.getLogger("torch._dynamo")  # its records do not reach the root's handlers
    dynamos.addHandler(caplog.handler)
    torch._dynamo.convert_frame.DynamoOutput.build_guards = build
    try:
        compiled(model)(torch.ones(3))
        frame_swap.wait()
    finally:
        torch._dynamo.convert_frame.DynamoOutput.build_guards = stock
        dynamos.removeHandler(caplog.handler)
    assert not hasattr(model, "box")
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
