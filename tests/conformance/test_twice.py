"""Mode "ready"'s check finds errors, and raises no false alarm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import frame_swap
from frame_swap.artifacts import load
from frame_swap.artifacts.compiled import Compiled
from frame_swap.checking.arguments import Arguments, Uncopyable
from frame_swap.internals import dynamo
from frame_swap.region import records

from . import twice

pytestmark = pytest.mark.quick

Graph = Callable[..., tuple[Any, ...]]


def graph(x: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """A stand-in for both sides: a gradient, a mutation, two outputs, the second in column-major order."""
    buffer += 1
    return x.sin() * buffer, x.T.cos().T.to(torch.float32)


def arguments() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.rand(3, 4, requires_grad=True), torch.rand(3, 4)


def test_equal_sides_pass_and_arguments_stay_as_they_are() -> None:
    x, buffer = arguments()
    before, state = buffer.clone(), torch.get_rng_state()
    assert twice.StrictComparison(graph, (x, buffer)).difference(graph) == ""
    assert x.grad is None
    assert torch.equal(buffer, before)
    assert torch.equal(torch.get_rng_state(), state)


def wrong_value(x: Tensor, buffer: Tensor) -> tuple[Any, ...]:
    first, second = graph(x, buffer)
    return first, second + (torch.arange(12).reshape(3, 4) == 7) * 1e-3


def wrong_stride(x: Tensor, buffer: Tensor) -> tuple[Any, ...]:
    first, second = graph(x, buffer)
    return first, second.T.contiguous().T


def wrong_dtype(x: Tensor, buffer: Tensor) -> tuple[Any, ...]:
    first, second = graph(x, buffer)
    return first, second.double()


def wrong_gradient(x: Tensor, buffer: Tensor) -> tuple[Any, ...]:
    first, second = graph(x, buffer)
    return first.detach() + 2 * (first - first.detach()), second


def lost_gradient(x: Tensor, buffer: Tensor) -> tuple[Any, ...]:
    first, second = graph(x, buffer)
    return first, second.detach()


def lost_mutation(x: Tensor, buffer: Tensor) -> tuple[Any, ...]:
    return graph(x, buffer.clone())


def lost_output(x: Tensor, buffer: Tensor) -> tuple[Any, ...]:
    return graph(x, buffer)[:1]


def extra_mutation(x: Tensor, buffer: Tensor) -> tuple[Any, ...]:
    first, second = graph(x, buffer)
    x.data.copy_(second.detach())
    return first, second


def raises(x: Tensor, buffer: Tensor) -> tuple[Any, ...]:
    raise IndexError("out of range")


@pytest.mark.parametrize(
    ("compiled", "found"),
    [
        (wrong_value, "output 1: value off double precision by 0.001"),
        (wrong_stride, "output 1: stride (1, 3), eager code's (4, 1) (shape (3, 4))"),
        (wrong_dtype, "output 1: dtype torch.float64, eager code's torch.float32"),
        (wrong_gradient, "gradient 0: value off double precision by"),
        (
            lost_gradient,
            "outputs that require a gradient: ['output 0', 'argument 0'], eager code's ['output 0', 'output 1',",
        ),
        (lost_mutation, "argument 1: value off double precision by 1,"),
        (lost_output, "compiled code gives output 0, argument 0, argument 1"),
        (extra_mutation, "argument 0: value off double precision"),
        (raises, "compiled code raises IndexError: out of range, eager code nothing"),
    ],
)
def test_finds(compiled: Graph, found: str) -> None:
    difference = twice.StrictComparison(graph, arguments(), graph).difference(compiled)
    assert found in difference


def test_rounding_is_judged_by_double_precision() -> None:
    twice.counts.clear()

    def exact(x: Tensor) -> tuple[Tensor]:
        return (x.sum(dtype=torch.double if x.dtype == torch.double else torch.float32).to(x.dtype),)

    def rounds_as_it_goes(x: Tensor) -> tuple[Tensor]:
        total = x.new_zeros(())
        for one in x:
            total = total + one
        return (total,)

    x = torch.rand(200).half()
    assert twice.StrictComparison(rounds_as_it_goes, (x,), exact).difference(exact) == ""
    assert twice.counts["judged by double precision"] == 1
    assert "output 0: value off" in twice.StrictComparison(exact, (x,), exact).difference(rounds_as_it_goes)


def test_random_numbers_may_be_others_but_not_their_layout() -> None:
    def draws(x: Tensor) -> tuple[Tensor]:
        return (x + torch.rand_like(x),)

    comparison = twice.StrictComparison(draws, (torch.zeros(2, 3),))
    assert comparison.random
    assert comparison.difference(lambda x: (draws(x)[0] / 2,)) == ""
    assert "stride" in comparison.difference(lambda x: (draws(x)[0].T.contiguous().T,))
    comparison = twice.StrictComparison(draws, (torch.zeros(2, 3),), same_numbers=True)
    assert comparison.difference(draws) == ""
    assert "value" in comparison.difference(lambda x: (draws(x)[0] / 2,))


def test_copies_keep_what_a_graph_can_see() -> None:
    weight = nn.Parameter(torch.rand(4, 6).T)
    base = torch.rand(20)
    history = torch.rand(3, requires_grad=True) * 2
    originals = [base[2:12:2], base[4:], weight, history, torch.rand(2, dtype=torch.cfloat).conj()]
    copies = Arguments([*originals, 7])
    for at, (copied, original) in enumerate(zip(copies.values, originals, strict=False)):
        assert torch.equal(copied, original), at
        assert copied.untyped_storage()._cdata != original.untyped_storage()._cdata, at
        for what in ("stride", "storage_offset", "is_conj", "_is_view"):
            assert getattr(copied, what)() == getattr(original, what)(), (at, what)
        for what in ("requires_grad", "is_leaf"):
            assert getattr(copied, what) == getattr(original, what), (at, what)
    assert isinstance(copies.values[2], nn.Parameter)
    copies.values[1].zero_()
    assert not copies.values[0][1:].any(), "the first two share memory"
    (copies.values[2].sum() + copies.values[3].sum()).backward()
    assert [leaf.grad.sum().item() for leaf in copies.leaves if leaf.grad is not None] == [24, 3]


def test_what_cannot_be_copied_is_said() -> None:
    with pytest.raises(Uncopyable, match="has layout"):
        Arguments((torch.eye(2).to_sparse(),))


def test_uninitialised_memory_is_excused() -> None:
    def blank(x: Tensor) -> tuple[Tensor]:
        return (torch.empty_like(x).fill_(next(values)),)

    values = iter([1.0, 2.0, 3.0, 4.0])
    graph = torch.fx.symbolic_trace(lambda x: (torch.empty_like(x),))
    assert twice.StrictComparison(blank, (torch.zeros(2),), graph).difference(blank) == ""
    assert "value off" in twice.StrictComparison(blank, (torch.zeros(2),)).difference(blank)


@pytest.fixture
def calls_made_twice() -> Iterator[None]:
    twice.mismatches.clear()
    twice.counts.clear()
    with twice.made_twice():
        frame_swap.configure(when="manual")
        yield


@pytest.mark.usefixtures("calls_made_twice")
def test_a_call_ends_in_the_rewritten_frame() -> None:
    seen: list[int] = []

    @torch.compile(backend="frame_swap")
    def step(x: Tensor) -> Tensor:
        x.add_(1)
        torch._dynamo.graph_break()
        seen.append(len(seen))
        return x.sin()

    x = torch.zeros(5)
    assert torch.equal(step(x), torch.ones(5).sin())
    assert torch.equal(x, torch.ones(5)), "the mutation was made once"
    assert seen == [0]
    first, second = records()
    assert (first.state, first.server) == ("installed", None), "the call itself went through the new code"
    assert second.state == "installed"
    assert twice.counts["compared"] == 2
    assert twice.counts["started over in the rewritten frame"] == 1, "not the second: that would append again"
    assert twice.mismatches == []


@pytest.mark.usefixtures("calls_made_twice")
def test_a_mismatch_names_the_graph_and_does_not_stop_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = load.load

    def load_wrong(*args: Any, **options: Any) -> Compiled:
        compiled = usual(*args, **options)

        def off_by_one(*inputs: Any) -> tuple[Any, ...]:
            return (compiled.call(*inputs)[0] + 1,)

        dynamo.skip_frames(off_by_one.__code__)
        return compiled._replace(call=off_by_one, boxed=None)

    monkeypatch.setattr(load, "load", load_wrong)

    @torch.compile(backend="frame_swap")
    def double(x: Tensor) -> Tensor:
        return x * 2

    assert torch.equal(double(torch.ones(3)), torch.full((3,), 3.0))
    (mismatch,) = twice.mismatches
    assert "graph 0/0 of " in mismatch
    assert "double" in mismatch
    assert "output 0: value off double precision by 1, eager code's by 0" in mismatch
