"""Which eager code serves."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import frame_swap
from frame_swap import State, settings
from frame_swap.serving import eager

pytestmark = pytest.mark.fast

FLOATS = "its frame has floats that change from call to call"


def kinds() -> list[tuple[str, str]]:
    return [(region.eager, region.eager_reason) for region in frame_swap.report().regions]


@pytest.fixture
def no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """AOTAutograd must not trace anything in the call."""
    monkeypatch.setattr(eager, "trace_pair", lambda *_: pytest.fail("AOTAutograd has traced a pair"))


@pytest.mark.usefixtures("no_trace")
def test_dynamos_graph_serves_and_nothing_is_traced_in_the_call() -> None:
    frame_swap.configure(first="graph", when="manual")
    x = torch.randn(4, requires_grad=True)
    compiled = torch.compile(lambda x: (x.sin() * x).sum(), backend="frame_swap")
    (gradient,) = torch.autograd.grad(compiled(x), x)
    assert torch.equal(gradient, torch.autograd.grad((x.sin() * x).sum(), x)[0])
    assert kinds() == [("graph", "")]
    assert "before the swap: 1 on the graph" in str(frame_swap.report())


@pytest.mark.usefixtures("no_trace")
def test_a_forbidden_trace_is_seen() -> None:
    frame_swap.configure(first="pair", when="never")
    with pytest.raises(BaseException, match="AOTAutograd has traced a pair"):
        torch.compile(lambda x: x.sin(), backend="frame_swap")(torch.ones(2))


def by_configure(first: settings.First) -> Callable[..., Any]:
    frame_swap.configure(first=first)
    return torch.compile(lambda x: x.cos(), backend="frame_swap")


def by_options(first: settings.First) -> Callable[..., Any]:
    options: dict[str, Any] = {"first": first, "max_autotune": False}
    return torch.compile(lambda x: x.cos(), backend="frame_swap", options=options)


def by_opt_in(first: settings.First) -> Callable[..., Any]:
    return frame_swap.opt_in(first=first)(lambda x: x.cos())


def by_opt_in_with_a_mode(first: settings.First) -> Callable[..., Any]:
    return frame_swap.opt_in(mode="max-autotune-no-cudagraphs", first=first)(lambda x: x.cos())


@pytest.mark.parametrize("first", ["graph", "pair"])
@pytest.mark.parametrize("ask", [by_configure, by_options, by_opt_in, by_opt_in_with_a_mode])
def test_the_program_chooses(ask: Callable[..., Any], first: settings.First) -> None:
    other: settings.First = "pair" if first == "graph" else "graph"
    frame_swap.configure(first=other, when="never")
    compiled = ask(first)
    torch.testing.assert_close(compiled(torch.ones(3)), torch.ones(3).cos())
    assert kinds() == [(first, "")]


@pytest.mark.parametrize("ask", [by_configure, by_options, by_opt_in])
def test_an_unknown_choice_is_refused(ask: Callable[..., Any]) -> None:
    with pytest.raises(Exception, match="first='grph': choose one of 'graph', 'pair'; did you mean 'graph'"):
        ask("grph")(torch.ones(3))


def computes_with(x: Tensor, factor: float) -> Tensor:
    return x * factor + (x if factor // 2 > 1 else -x)


def decides_by(x: Tensor, factor: float) -> Tensor:
    """The graph does not have the float; the trace has a symbol for it."""
    return (x + 1 if factor > 0.5 else x).sin()


@pytest.mark.parametrize(("scaled", "factors"), [(computes_with, (1.5, 2.5, 7.0)), (decides_by, (1.5, 2.5, 0.25))])
def test_floats_that_change_take_the_pair_and_are_specialised_where_they_must_be(
    scaled: Callable[[Tensor, float], Tensor], factors: tuple[float, ...]
) -> None:
    """AOTAutograd starts Dynamo's capture over where it cannot make a tensor of a float."""
    frame_swap.configure(first="graph")
    compiled = torch.compile(scaled, backend="frame_swap", dynamic=True)
    x = torch.randn(3)
    for _ in range(2):
        for factor in factors:
            torch.testing.assert_close(compiled(x, factor), scaled(x, factor))
        frame_swap.wait()
    used = [r for r in frame_swap.report().regions if r.state is not State.STALE]
    assert used
    assert {region.state for region in used} == {State.INSTALLED}
    assert ("pair", FLOATS) in kinds()


def test_a_worker_knows_which_floats_are_constant() -> None:
    """Dynamo makes a float constant that an operator takes no tensor for; the symbol stays among the shapes."""
    # A new process for each compile: one that has met the float would know it.
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as executor:
        frame_swap.configure(executor=executor)
        compiled = torch.compile(nn.functional.leaky_relu, backend="frame_swap", dynamic=True)
        x = torch.randn(3)
        assert torch.equal(compiled(x, 0.5), nn.functional.leaky_relu(x, 0.5))
        frame_swap.wait()
        frame_swap.configure(executor=None)
    assert [r.state for r in frame_swap.report().regions] == [State.STALE, State.INSTALLED]


def test_inputs_that_share_memory_take_the_pair_whose_guard_tells_other_overlaps() -> None:
    frame_swap.configure(first="graph", when="wait")

    def changes(x: Tensor, y: Tensor) -> Tensor:
        x.add_(1)
        return y * 2

    def call(function: Callable[..., Any], overlap: bool) -> Tensor:
        base = torch.arange(8.0)
        x, y = (base[:4], base[2:6]) if overlap else (base[:4], base[4:])
        return torch.cat([function(x, y), base])

    compiled = torch.compile(changes, backend="frame_swap", dynamic=True)
    for overlap in (False, True, False):
        assert torch.equal(call(compiled, overlap), call(changes, overlap))
    assert kinds() == [("pair", "inputs of changing size share memory")] * 2


def test_operators_that_trace_in_each_call_take_the_pair() -> None:
    frame_swap.configure(first="graph", when="never")

    def chooses(x: Tensor) -> Tensor:
        out: Tensor = torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))
        return out

    x = torch.ones(3, requires_grad=True)
    torch.testing.assert_close(torch.compile(chooses, backend="frame_swap")(x), x.sin())
    assert kinds() == [("pair", "PyTorch would trace cond at each call")]


def masked(x: Tensor, w: Tensor, mask: Tensor) -> Tensor:
    y = x * w
    y = y.clone()
    y[mask] = w[0] * 2
    return y.sin().sum()


@pytest.mark.filterwarnings("ignore:Error detected in IndexPutBackward0")
@pytest.mark.parametrize("first", ["graph", "pair"])
def test_a_boolean_mask_is_no_reason_for_the_foreground_or_for_a_graph_break(first: settings.First) -> None:
    """The pair's joint graph has an operator whose output's size depends on values; Inductor's has none."""
    frame_swap.configure(first=first)
    x, mask = torch.randn(4, 3), torch.rand(4, 3) > 0.5
    w = torch.randn(3, requires_grad=True)
    compiled = torch.compile(masked, backend="frame_swap")
    (expected,) = torch.autograd.grad(masked(x, w, mask), w)
    for _ in range(2):
        torch.testing.assert_close(torch.autograd.grad(compiled(x, w, mask), w)[0], expected)
        frame_swap.wait()
    (region,) = frame_swap.report().regions
    assert (region.state, region.eager) == (State.INSTALLED, "graph")
    no_pair = "no pair: DynamicOutputShapeException: aten.nonzero.default"
    assert region.eager_reason == ("" if first == "graph" else no_pair)


def test_a_graph_that_needs_the_pair_and_has_none_is_compiled_by_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise NotImplementedError("no such operator")

    monkeypatch.setattr(eager, "trace_pair", fail)
    frame_swap.configure(first="graph")
    x = torch.ones(3)
    compiled = torch.compile(lambda x, factor: x * factor, backend="frame_swap", dynamic=True)
    assert torch.equal(compiled(x, 2.5), x * 2.5)
    (region,) = frame_swap.report().regions
    assert (region.state, region.eager) == (State.FOREGROUND, "")
    assert region.reason == "no eager code: NotImplementedError: no such operator"


class _Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.GELU(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def test_the_graph_is_bit_equal_to_eager_until_the_swap() -> None:
    """Also while workers compile: ops keep their number of threads, and so the order in which they add up."""
    frame_swap.configure(first="graph", when="manual")

    def train(compile: bool) -> list[Tensor]:
        torch.manual_seed(1)
        model = _Noisy()
        call = torch.compile(model, backend="frame_swap") if compile else model
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for step in range(6):
            model.train(step != 3)
            optimizer.zero_grad()
            call(torch.randn(16, 4)).square().mean().backward()
            optimizer.step()
        return [*model.state_dict().values(), torch.get_rng_state()]

    assert all(torch.equal(is_now, was) for is_now, was in zip(train(True), train(False), strict=True))
    assert {kind for kind, _ in kinds()} == {"graph"}
