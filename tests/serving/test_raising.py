"""Compiled code that raises is answered by eager code, and the frame is eager code's from then on."""

from __future__ import annotations

import gc
import itertools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import faulty
import pytest
import torch
from helpers import assert_same, live, observe, wait_for_all
from torch import Tensor

import frame_swap
from frame_swap import FrameSwapWarning, Region, State, errors
from frame_swap.frames import cache_entry

pytestmark = pytest.mark.fast

Function = Callable[..., Any]


@pytest.fixture(autouse=True)
def honest() -> Iterator[None]:
    """Reset the faulty operators after each test."""
    yield
    faulty.lying, faulty.raising = False, None


def relays(x: Tensor) -> Tensor:
    return faulty.relaid(x.sin()).cos().sum(-1)  # of a layout that does not depend on lies


def breaks(x: Tensor) -> Tensor:
    return faulty.fragile(x.sin()).cos() + 1


def swapped(function: Function, *args: Any, wrap: Function | None = None) -> tuple[Function, Region]:
    """Compile `function`, call it once and swap; return it and its region."""
    frame_swap.configure(when="manual")
    compiled: Function = (wrap or compile_)(function)
    compiled(*args)
    wait_for_all()
    frame_swap.swap()
    (region,) = live(frame_swap.report())
    assert region.state is State.INSTALLED
    return compiled, region


def compile_(function: Function) -> Function:
    compiled: Function = torch.compile(function, backend="frame_swap")
    return compiled


def behind_a_wrapper(function: Function) -> Function:
    def wrapping(gm: torch.fx.GraphModule, inputs: list[Any]) -> Function:
        inner = frame_swap.frame_swap_backend(gm, inputs)
        return lambda *args: inner(*args)

    compiled: Function = torch.compile(function, backend=wrapping)
    return compiled


def check_answered(compiled: Function, function: Function, region: Region, make: Function) -> None:
    """Check a call in which compiled code raises, and later calls."""
    served, expected = region.eager_calls, observe(function, make())
    assert_same(observe(compiled, make()), expected, "on compiled code")
    assert region.eager_calls == served
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        faulty.lying = True
        assert_same(observe(compiled, make()), expected, "answered")
        assert region.eager_calls == served + 1
        assert_same(observe(compiled, make()), expected, "after that")
        assert region.eager_calls == served + 2
        faulty.lying = False
        assert_same(observe(compiled, make()), expected, "for good")
        assert region.eager_calls == served + 3
    (warning,) = (w for w in caught if issubclass(w.category, FrameSwapWarning))
    assert region.reason in str(warning.message)
    assert "back on its eager code" in str(warning.message)
    assert (region.state, region.artifacts) == (State.REJECTED, 0)
    assert "its compiled code raised AssertionError: expected size" in region.reason
    assert "1 rejected" in str(frame_swap.report())
    assert live(frame_swap.report()) == [region], "Dynamo compiled again"


@pytest.mark.parametrize("wrap", [compile_, frame_swap.opt_in, behind_a_wrapper])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_the_pair_answers_and_serves_from_then_on(wrap: Function, grad: bool) -> None:
    def make() -> tuple[Tensor]:
        torch.manual_seed(1)
        return (torch.rand(3, 4, requires_grad=grad),)

    with torch.set_grad_enabled(grad):
        compiled, region = swapped(relays, *make(), wrap=wrap)
        check_answered(compiled, relays, region, make)


def test_where_the_cache_entry_cannot_be_written_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def unfamiliar(entry: Any) -> Any:
        raise errors.UnknownLayout("for the test")

    monkeypatch.setattr(cache_entry, "_code_field", unfamiliar)
    compiled, region = swapped(relays, torch.rand(3, 4))
    assert "a check remains" in region.reason
    check_answered(compiled, relays, region, lambda: (torch.ones(3, 4),))


def test_where_a_late_guard_stands_before_the_call_too() -> None:
    def pool(images: Tensor) -> Tensor:
        pooled = torch.nn.functional.adaptive_max_pool2d(images, 4)
        return faulty.relaid(pooled.reshape(-1, 4)).cos().sum(-1)

    def make(size: int = 8) -> tuple[Tensor]:
        return (torch.ones(1, 2, size, size),)

    def compile_dynamic(function: Function) -> Function:
        compiled: Function = torch.compile(function, backend="frame_swap", dynamic=True)
        return compiled

    compiled, region = swapped(pool, *make(), wrap=compile_dynamic)
    assert region.late_guards
    frame_swap.configure(delay=3600)  # nothing that is asked for from now on arrives
    check_answered(compiled, pool, region, make)
    calls = region.eager_calls
    torch.testing.assert_close(compiled(*make(9)), pool(*make(9)))
    assert region.eager_calls == calls + 1
    assert not region.specialising, "it asked for more compiled code"


def test_what_the_pair_raises_where_a_late_guard_sends_the_call_there_is_the_callers() -> None:
    def pool(images: Tensor) -> Tensor:
        return faulty.fragile(torch.nn.functional.adaptive_max_pool2d(images, 4))

    def compile_dynamic(function: Function) -> Function:
        compiled: Function = torch.compile(function, backend="frame_swap", dynamic=True)
        return compiled

    compiled, region = swapped(pool, torch.ones(1, 2, 8, 8), wrap=compile_dynamic)
    frame_swap.configure(delay=3600)
    faulty.raising = ValueError("for the test")
    calls = region.eager_calls
    with pytest.raises(ValueError, match="for the test"):
        compiled(torch.ones(1, 2, 9, 9))
    assert (region.state, region.eager_calls) == (State.INSTALLED, calls + 1)


@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize("wrap", [compile_, behind_a_wrapper])
def test_where_the_pair_raises_too_its_error_is_the_callers_and_compiled_code_stays(wrap: Function) -> None:
    compiled, region = swapped(breaks, torch.rand(3), wrap=wrap)
    faulty.raising = ValueError  # another one each time
    calls = region.eager_calls
    with pytest.raises(ValueError) as raised:
        compiled(torch.rand(3))
    assert raised.value.__context__ is None
    assert region.eager_calls == calls + 1, "eager code was not asked"
    faulty.raising = None
    torch.testing.assert_close(compiled(torch.ones(3)), breaks(torch.ones(3)))
    assert (region.state, region.eager_calls) == (State.INSTALLED, calls + 1)


@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(3), torch.OutOfMemoryError("for the test")], ids=repr
)
@pytest.mark.parametrize("wrap", [compile_, behind_a_wrapper])
def test_an_interrupt_passes_and_so_does_running_out_of_memory(error: BaseException, wrap: Function) -> None:
    compiled, region = swapped(breaks, torch.rand(3), wrap=wrap)
    faulty.raising, calls = error, region.eager_calls
    with pytest.raises(type(error)) as raised:
        compiled(torch.rand(3))
    assert raised.value is error
    assert (region.state, region.eager_calls) == (State.INSTALLED, calls)


@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize("wrap", [compile_, frame_swap.opt_in, behind_a_wrapper])
def test_where_compiled_code_changes_inputs_the_error_is_the_callers(wrap: Function) -> None:
    def count(x: Tensor, calls: Tensor) -> Tensor:
        calls.add_(1)
        return faulty.relaid(x.sin()).sum(-1) * calls

    x, calls = torch.rand(3, 4), torch.zeros(())
    compiled, region = swapped(count, x, calls, wrap=wrap)
    assert calls == 1
    if wrap is not behind_a_wrapper:
        gc.collect()
        assert region.server is None, "eager code is kept, and there is nothing it could answer"
    compiled(x, calls)
    faulty.lying = True
    served = region.eager_calls
    with pytest.raises(AssertionError, match="expected size"):
        compiled(x, calls)
    assert calls <= 3
    assert (region.state, region.eager_calls) == (State.INSTALLED, served)


@pytest.mark.usefixtures("no_warnings")
def test_where_the_graph_has_effects_the_error_is_the_callers() -> None:
    def says(x: Tensor) -> Tensor:
        torch.ops.aten._print("for the test")
        return faulty.relaid(x.sin()).sum(-1)

    compiled, region = swapped(says, torch.rand(3, 4))
    faulty.lying, calls = True, region.eager_calls
    with pytest.raises(AssertionError, match="expected size"):
        compiled(torch.rand(3, 4))
    assert (region.state, region.eager_calls) == (State.INSTALLED, calls)


def test_where_inputs_are_changed_after_compiled_code_they_are_changed_once() -> None:
    def scale(x: Tensor, y: Tensor) -> Tensor:
        x.mul_(2)
        return faulty.relaid(x * y).sum(-1)

    def make() -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        return torch.rand(3, 4, requires_grad=True) * 1, torch.rand(3, 4)

    compiled, region = swapped(scale, *make())
    check_answered(compiled, scale, region, make)


@pytest.mark.usefixtures("no_warnings")
def test_an_error_after_inputs_were_changed_is_the_callers() -> None:
    def scale(x: Tensor, y: Tensor) -> Tensor:
        x.mul_(2)
        y.add_(x)
        return x + 1

    def ones() -> Tensor:
        return torch.ones(3, requires_grad=True) * 1

    compiled, region = swapped(scale, ones(), torch.ones(3))
    for function in (scale, compiled):
        x, served = ones(), region.eager_calls
        with torch.no_grad():
            view = ones()[:]  # which may not be changed where gradients are on, and nothing guards on that
        with pytest.raises(RuntimeError, match="created in no_grad mode"):
            function(x, view)
        assert (x == 2).all(), "it was changed twice"
        assert (region.state, region.eager_calls) == (State.INSTALLED, served)


def test_threads_that_raise_together_are_all_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(3, 4)
    expected = relays(x)
    compiled, region = swapped(relays, x)
    inside, calls, results = threading.Barrier(2, timeout=60), itertools.count(), []

    def meet() -> None:
        if next(calls) < 2:  # both in compiled code; after that comes eager code
            inside.wait()

    monkeypatch.setattr(faulty, "before_relaid", meet)
    faulty.lying = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=lambda: results.append(compiled(x))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(results) == 2
    for result in results:
        torch.testing.assert_close(result, expected)
    assert len([w for w in caught if issubclass(w.category, FrameSwapWarning)]) == 1
    assert region.state is State.REJECTED


@pytest.mark.parametrize("wrap", [compile_, frame_swap.opt_in])
def test_when_the_frame_goes_so_does_the_pair(wrap: Function) -> None:
    _, region = swapped(relays, torch.rand(3, 4), wrap=wrap)
    pair = weakref.ref(region.server.eager)
    assert pair() is not None
    torch._dynamo.reset()
    gc.collect()
    assert region.server is None
    assert pair() is None
