"""`capture="background"`: calls run as plain Python, and later ones on what a thread has captured meanwhile."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import is_direct
from torch import Tensor, nn
from torch._dynamo.convert_frame import DynamoOutput
from torch.testing._internal.two_tensor import TwoTensor

import frame_swap
from frame_swap import State
from frame_swap.capture.captures import PATIENCE, Capture, Outcome
from frame_swap.capture.thread import CaptureThread
from frame_swap.capture.thread import thread as capture_thread
from frame_swap.internals import callback, dynamo

from .harness import outcomes_of_captures

ROUNDS = 12
"""More than any of these programs has frames to capture one after the other."""


@pytest.fixture(autouse=True)
def in_the_background() -> Any:
    frame_swap.configure(capture="background")
    yield
    frame_swap.wait()


def compiled(target: Any, **keywords: Any) -> Any:
    return torch.compile(target, backend="frame_swap", **keywords)


def states() -> list[State]:
    return [region.state for region in frame_swap.report().regions]


def settle(call: Callable[[], object]) -> None:
    """Call, and wait for captures and compiles, until calls ask for no more."""
    for _ in range(ROUNDS):
        before = states()
        call()
        capturing = frame_swap.report().capturing
        frame_swap.wait()
        if not capturing and states() == before:
            return
    pytest.fail("captures do not come to an end")


# What serves calls


class Net(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)
        self.dropout, self.last = nn.Dropout(dropout), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(self.norm(self.first(x)).relu()))


def train(model: nn.Module, call: Any, steps: int, pause: Callable[[int], object] = lambda step: None) -> list[Any]:
    """Losses, and at last the parameters and buffers."""
    torch.manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    seen: list[Any] = []
    for step in range(steps):
        model.train(step % 7 != 3)
        optimizer.zero_grad()
        loss = call(torch.randn(6, 4)).square().sum()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
        pause(step)
    return [*seen, *(value.tolist() for value in model.state_dict().values())]


@pytest.mark.fast
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_training_is_bit_equal_to_eager_until_the_swap(dropout: float) -> None:
    frame_swap.configure(when="never")
    model = Net(dropout)
    twin = copy.deepcopy(model)
    expected = train(twin, twin, 24)
    capturing = []

    def pause(step: int) -> None:
        capturing.append(bool(frame_swap.report().capturing))
        if step % 4 == 3:
            frame_swap.wait()

    assert train(model, compiled(model), 24, pause) == expected
    assert capturing[0]
    assert sum(region.eager_calls for region in frame_swap.report().regions) > 4


def test_through_the_swap() -> None:
    model = Net()
    call, x = compiled(model), torch.randn(6, 4)
    want = model.eval()(x)
    with capture_thread.held():  # so that it is not captured before the report is read
        assert torch.equal(call(x), want)
        report = frame_swap.report()
    assert report.regions == []
    assert "is being captured, and runs as plain Python" in str(report)
    assert report.capturing[0].startswith("Net.forward, ")
    assert report.as_dict()["capturing"]
    frame_swap.wait()
    assert states() == [State.READY]
    assert frame_swap.report().capturing == []
    torch.testing.assert_close(call(x), want)
    assert states() == [State.INSTALLED]
    (region,) = frame_swap.report().regions
    assert region.eager_calls == 0
    torch.testing.assert_close(call(x), want)


def test_swap_by_hand() -> None:
    frame_swap.configure(when="manual")
    model = Net().eval()
    call, x = compiled(model), torch.randn(6, 4)
    call(x)
    frame_swap.wait()
    frame_swap.swap()
    assert states() == [State.READY]  # the frame is in nobody's cache yet
    call(x)
    frame_swap.swap()
    assert states() == [State.INSTALLED]


@pytest.mark.parametrize("way", ["dynamo.optimize", "opt_in", "a class opted in"])
def test_other_ways_in(way: str) -> None:
    model = Net().eval()
    call: Any
    if way == "dynamo.optimize":
        call = torch._dynamo.optimize(frame_swap.frame_swap_backend)(model)
    elif way == "opt_in":
        call = frame_swap.opt_in(model)
    else:

        @frame_swap.opt_in
        class Opted(Net):
            pass

        call = Opted().eval()
        call.load_state_dict(model.state_dict())
    x = torch.randn(6, 4)
    want = model(x) if way != "opt_in" else copy.deepcopy(model)(x)
    call(x)
    assert frame_swap.report().capturing
    settle(lambda: torch.testing.assert_close(call(x), want))
    assert states() == [State.INSTALLED]
    if way != "dynamo.optimize":
        call(x)
        assert is_direct(lambda: call(x))


def broken(x: Tensor) -> Tensor:
    x = x.sin()
    torch._dynamo.graph_break()
    x = x.cos()
    torch._dynamo.graph_break()
    return x + 1


def test_graph_breaks() -> None:
    call, x = compiled(broken), torch.randn(5)
    settle(lambda: torch.testing.assert_close(call(x), broken(x)))
    assert states() == [State.INSTALLED] * 3


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_dynamic_shapes(dynamic: bool | None) -> None:
    frame_swap.configure(when="never")

    def f(x: Tensor) -> Tensor:
        return (x * x.shape[0]).sum(0)

    call = compiled(f, dynamic=dynamic)
    for size in (3, 5, 7, 9, 3, 5):
        x = torch.randn(size, 2)
        settle(lambda x=x: torch.testing.assert_close(call(x), f(x)))
    assert len(states()) == {None: 2, True: 1, False: 4}[dynamic]


def test_shapes_at_random_are_each_captured_once() -> None:
    frame_swap.configure(when="never")

    def f(x: Tensor) -> Tensor:
        return x * 2

    call = compiled(f, dynamic=False)
    sizes = [2, 3, 4, 5, 6]
    for _ in range(len(sizes)):
        for size in sizes:
            call(torch.ones(size))
        frame_swap.wait()
    for size in sizes:
        call(torch.ones(size))
    assert len(states()) == len(sizes)
    assert all(region.eager_calls for region in frame_swap.report().regions)


def test_a_number_that_becomes_symbolic() -> None:
    frame_swap.configure(when="never")

    def f(x: Tensor, scale: float, n: int) -> Tensor:
        return x * scale + n

    call, x = compiled(f), torch.randn(3)
    for number in (2, 3, 5, 7):
        settle(lambda n=number: torch.testing.assert_close(call(x, n + 0.5, n), f(x, n + 0.5, n)))
    assert len(states()) <= 3


# What cannot be captured beside the program


def test_fullgraph_raises_at_once() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(broken, fullgraph=True)(torch.randn(3))


def test_fullgraph_is_captured_in_the_call() -> None:
    frame_swap.configure(when="never")
    compiled(Net(), fullgraph=True)(torch.randn(6, 4))
    assert states() == [State.EAGER]


def test_tensor_subclasses_are_captured_in_the_call() -> None:
    frame_swap.configure(when="never")

    def f(x: Tensor) -> Tensor:
        return x.sin() + 1

    call, x = compiled(f), TwoTensor(torch.ones(3), torch.zeros(3))
    settle(lambda: torch.testing.assert_close(call(x).a, f(x).a))
    assert [region.eager_calls > 0 for region in frame_swap.report().regions][-1]


@pytest.mark.parametrize("mode", ["device", "no torch functions", "wait", "CUDA"])
def test_captured_in_the_call(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mode == "CUDA":
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    frame_swap.configure(when="wait" if mode == "wait" else "never")
    context = {"device": torch.device("cpu"), "no torch functions": torch._C.DisableTorchFunctionSubclass()}
    with context.get(mode, torch.no_grad()):
        compiled(Net())(torch.randn(6, 4))
    assert len(states()) == 1


def test_a_function_that_is_disabled_for_itself_alone() -> None:
    frame_swap.configure(when="never")

    @torch._dynamo.disable(recursive=False)
    def outer(x: Tensor) -> Tensor:
        return x + 1

    def f(x: Tensor) -> Tensor:
        return outer(x.sin()).cos()

    call, x = compiled(f), torch.randn(3)
    settle(lambda: torch.testing.assert_close(call(x), f(x)))
    with_stock = torch._dynamo.testing.CompileCounter()
    torch.compile(f, backend=with_stock)(x)
    assert len(states()) == with_stock.frame_count


def test_errors_of_the_program() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        return x.sin() @ y

    call = compiled(f)
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"must have same reduction dim|shapes cannot be multiplied"):
            call(torch.ones(2, 3), torch.ones(2, 3))
        frame_swap.wait()
    x = torch.ones(3, 3)
    settle(lambda: torch.testing.assert_close(call(x, x), f(x, x)))
    assert State.INSTALLED in states()


def test_an_error_of_the_backend_comes_in_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stock would raise at the first call, a later call raises."""

    def fail(*args: Any) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr("frame_swap.backend._start", fail)
    call, x = compiled(Net()), torch.randn(6, 4)
    for _ in range(PATIENCE):
        call(x)
        frame_swap.wait()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="no such thing"):
        call(x)


# Skips and stale captures


def skipped(x: Tensor) -> Tensor:
    torch._dynamo.skip_frame()
    return x + 1


def in_loop(x: Tensor) -> Tensor:
    for _ in range(2):
        torch._dynamo.graph_break()
        x = x + 1
    return x


def calls_of(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """Arguments of the calls of `owner.name` from now on."""
    seen, stock = [], getattr(owner, name)

    def counted(*args: Any, **keywords: Any) -> Any:
        seen.append(args)
        return stock(*args, **keywords)

    monkeypatch.setattr(owner, name, counted)
    return seen


@pytest.mark.parametrize("f", [skipped, in_loop])
def test_a_frame_that_dynamo_skips_is_skipped_for_good(f: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    captures = calls_of(monkeypatch, Capture, "run")
    call, x = compiled(f), torch.randn(3)
    for _ in range(4):
        assert torch.equal(call(x), f(x))
        frame_swap.wait()
    n = len(captures)
    assert n
    for _ in range(3):
        call(x)
        frame_swap.wait()
    assert len(captures) == n


class Picky(nn.Module):
    kind: Any = torch

    def forward(self, x: Tensor) -> Tensor:
        y = x.sin()
        for _ in range(1):
            if self.kind is not torch:
                torch._dynamo.graph_break()  # in a loop: Dynamo skips the frame
            y = y + 1
        return y


def test_a_race_is_no_reason_for_a_lasting_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    frame_swap.configure(when="never")
    model = Picky()
    stock = Capture.run

    def run_during_a_race(capture: Capture) -> Any:
        monkeypatch.setattr(Capture, "run", stock)
        model.kind = None
        try:
            return stock(capture)
        finally:
            model.kind = torch

    monkeypatch.setattr(Capture, "run", run_during_a_race)
    call, x = compiled(model), torch.randn(3)
    settle(lambda: torch.testing.assert_close(call(x), model(x)))
    assert [region.eager_calls > 0 for region in frame_swap.report().regions] == [True]


class Counting(nn.Module):
    """Its number is specialised, and another at each call: each capture is stale when it is done."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.names = 0, ["a"]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * len(self.names[0])


def test_captures_that_go_stale_end_in_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    frame_swap.configure(when="never")
    model = Counting()
    captures = calls_of(monkeypatch, Capture, "run")
    outcomes = calls_of(monkeypatch, callback.CatchErrorsWrapper, "__call__")
    call, x = compiled(model), torch.randn(3)
    for at in range(1, 30):
        model.names[0] = "a" * at
        assert torch.equal(call(x), x * at)
        model.names[0] = "b" * at
        frame_swap.wait()
        if outcomes:
            break
    assert outcomes
    assert len(captures) <= PATIENCE + dynamo.recompile_limit() + 1


def test_each_torch_compile_of_a_function_shares_its_captures() -> None:
    def f(x: Tensor) -> Tensor:
        return x.sin() + 1

    x = torch.randn(3)
    for _ in range(3):
        assert torch.equal(compiled(f)(x), f(x))
        frame_swap.wait()
    assert states() == [State.INSTALLED]


def test_nothing_is_left_of_compiled_code_whose_capture_is_dropped() -> None:
    model = Net().eval()
    compiled(model)(torch.randn(6, 4))
    frame_swap.wait()
    assert states() == [State.READY]
    torch._dynamo.reset()
    gone = weakref.ref(model.first.weight)
    del model
    gc.collect()
    assert gone() is None
    assert states() == [State.STALE]


def test_guards_of_another_state_than_that_of_the_trace_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, outcomes = Net().eval(), outcomes_of_captures(monkeypatch)
    build = DynamoOutput.build_guards

    def build_guards(*args: Any, **keywords: Any) -> Any:
        model.train()
        return build(*args, **keywords)

    monkeypatch.setattr(DynamoOutput, "build_guards", build_guards)
    compiled(model)(torch.randn(6, 4))
    frame_swap.wait()
    assert outcomes == [Outcome.STALE]


def test_a_thread_that_cannot_be_started_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    thread, ended = CaptureThread(), threading.Event()
    capture: Any = SimpleNamespace(name="f", stopped=False, run=lambda: Outcome.STALE)

    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError):
            thread.submit(capture, lambda capture, outcome: None, lambda: True)
    assert frame_swap.report().capturing == []
    assert thread.submit(capture, lambda capture, outcome: ended.set(), lambda: True)
    assert ended.wait(60)
    thread.stop()
