"""`tiers="auto"`: default-tuned code first, and autotuned code in its place where that is faster."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import faulty
import pytest
import torch
from helpers import live, until
from torch import Tensor

import frame_swap
from frame_swap import Compile, FrameSwapWarning, Region, State
from frame_swap.checking.profit import CALLS, WARM_UP
from frame_swap.region import Purpose

pytestmark = pytest.mark.fast

MODE = "max-autotune-no-cudagraphs"
TIMED = 2 * (WARM_UP + CALLS)
FASTER = faulty.Miscompile("frame_swap_faulty.slowly.default", "aten.clone.default")


def slow_sine(x: Tensor) -> Tensor:
    out: Tensor = faulty.slowly(x.sin())
    return out


def settled(call: Callable[[], Any]) -> Region:
    """Make calls until there is a verdict on the second tier; a call beside a compile or a load is not measured."""

    def attempts() -> tuple[Compile, ...]:
        call()
        (region,) = live(frame_swap.report())
        return region.compiles

    until(lambda: len(attempts()) == 2 and State.PENDING not in {one.state for one in attempts()})
    for _ in range(100 * TIMED):
        if not {State.READY, State.TRIAL} & {one.state for one in attempts()}:
            (region,) = live(frame_swap.report())
            return region
    raise AssertionError(frame_swap.report())


def through_both_tiers(custom_pass: Any, x: Tensor) -> Region:
    """Call a compiled function until there is a verdict on the second tier; each call is right."""
    compiled = torch.compile(slow_sine, backend="frame_swap", mode=MODE)
    with torch._inductor.config.patch(post_grad_custom_post_pass=custom_pass):
        torch.testing.assert_close(compiled(x), slow_sine(x))
        frame_swap.wait()
        torch.testing.assert_close(compiled(x), slow_sine(x))  # installs the first tier
        frame_swap.wait()
    return settled(lambda: torch.testing.assert_close(compiled(x), slow_sine(x)))


def test_autotuned_code_takes_over_where_it_is_faster(no_warnings: None) -> None:
    region = through_both_tiers(faulty.IfAutotuned(True, FASTER), torch.rand(3))
    first, second = region.compiles
    assert (first.state, first.autotuned, first.purpose) == (State.REPLACED, False, Purpose.FIRST)
    assert (second.state, second.autotuned, second.purpose) == (State.INSTALLED, True, Purpose.BETTER)
    assert first.installed_at is not None
    assert "autotuned code: installed" in " ".join(str(frame_swap.report()).split())


@pytest.mark.parametrize(
    ("custom_pass", "words"),
    [
        (faulty.IfAutotuned(False, FASTER), "it is slower than what serves now"),
        (None, "than what serves now"),  # both sleep for as long, so either is not faster, or by chance slower
    ],
    ids=["slower", "the same"],
)
def test_autotuned_code_is_left_out_where_it_is_not_faster(custom_pass: Any, words: str, no_warnings: None) -> None:
    region = through_both_tiers(custom_pass, torch.rand(3))
    first, second = region.compiles
    if words in second.reason:
        assert (first.state, second.state) == (State.INSTALLED, State.REJECTED)
    else:
        assert custom_pass is None, "by chance it was measured as faster"


@pytest.mark.parametrize("settings", [{"tiers": "one"}, {"when": "wait"}], ids=["one", "wait"])
def test_one_tier_is_autotuned_at_once(settings: dict[str, Any]) -> None:
    frame_swap.configure(**settings)
    compiled = torch.compile(lambda x: x.sin() + 5, backend="frame_swap", mode=MODE)
    compiled(torch.rand(3))
    (region,) = live(frame_swap.wait())
    assert [(one.purpose, one.autotuned) for one in region.compiles] == [(Purpose.FIRST, True)]


def test_without_autotuning_there_is_one_tier() -> None:
    compiled = torch.compile(lambda x: x.sin() + 6, backend="frame_swap")
    compiled(torch.rand(3))
    (region,) = live(frame_swap.wait())
    assert [one.autotuned for one in region.compiles] == [False]


def test_training_goes_on_through_both_tiers() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())
    compiled = torch.compile(model, backend="frame_swap", mode=MODE)
    x = torch.randn(4, 8)

    def gradients(call: Any) -> list[Tensor]:
        model.zero_grad()
        call(x).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FrameSwapWarning)
        region = settled(lambda: torch.testing.assert_close(gradients(compiled), expected))
    assert [one.state for one in region.compiles] in (
        [State.REPLACED, State.INSTALLED],
        [State.INSTALLED, State.REJECTED],
    )
