"""Attention masks that are true everywhere, and that what serves leaves out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attention

import frame_swap
from frame_swap.serving import eager
from frame_swap.serving.masks import leave_out_masks

pytestmark = pytest.mark.fast

LENGTH = 8


def all_true(x: Tensor) -> Tensor:
    """As transformers makes it for a model that looks both ways."""
    return (torch.arange(LENGTH, device=x.device)[None, None, :, None] >= 0).expand(2, -1, LENGTH, LENGTH)


def both_true(x: Tensor) -> Tensor:
    places = torch.arange(LENGTH) + 1
    return (places[:, None] > 0) & (places != 0)


def ones(x: Tensor) -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool)


def causal(x: Tensor) -> Tensor:
    places = torch.arange(LENGTH)
    return places[None, :] <= places[:, None]


def of_numbers(x: Tensor) -> Tensor:
    return torch.ones(LENGTH, LENGTH)


def of_an_input(x: Tensor) -> Tensor:
    return x[0, 0, :, :1] == x[0, 0, :, :1]


def changed_in_place(x: Tensor) -> Tensor:
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    mask[:, 0] = False
    return mask


def changed_by_a_view(x: Tensor) -> Tensor:
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    mask.expand(LENGTH, LENGTH).logical_not_()
    return mask | (torch.arange(LENGTH) == 0)


def random(x: Tensor) -> Tensor:
    return torch.rand(LENGTH, LENGTH) > 0.5


def large(x: Tensor) -> Tensor:
    return torch.ones(2048, 2049, dtype=torch.bool)[:LENGTH, :LENGTH]


Mask = Callable[[Tensor], Tensor]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """The graphs that serve, as they are after masks were left out."""
    graphs: list[torch.fx.GraphModule] = []

    def seen(gm: torch.fx.GraphModule) -> None:
        leave_out_masks(gm)
        graphs.append(gm)

    monkeypatch.setattr(eager, "leave_out_masks", seen)
    frame_swap.configure(first="graph", when="manual")
    return graphs


def masked(mask: Mask) -> Callable[[Tensor], Tensor]:
    def attend(x: Tensor) -> Tensor:
        return attention(x, x, x, attn_mask=mask(x), is_causal=False)

    return attend


def masks_of(gm: torch.fx.GraphModule) -> list[bool]:
    calls = gm.graph.find_nodes(op="call_function", target=attention)
    return [call.kwargs.get("attn_mask") is not None for call in calls]


def inputs() -> Tensor:
    return torch.randn(2, 3, LENGTH, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mask", [all_true, both_true, ones])
def test_a_mask_that_is_true_everywhere_is_left_out(served: list[torch.fx.GraphModule], mask: Mask) -> None:
    x = inputs().requires_grad_()
    result = torch.compile(masked(mask), backend="frame_swap")(x)
    plain = masked(mask)(x)
    torch.testing.assert_close(result, plain)
    torch.testing.assert_close(torch.autograd.grad(result.sum(), x), torch.autograd.grad(plain.sum(), x))
    (gm,) = served
    assert masks_of(gm) == [False]
    assert len(gm.graph.nodes) == 3, "what made the mask is still computed"


@pytest.mark.parametrize(
    "mask", [causal, of_numbers, of_an_input, changed_in_place, changed_by_a_view, random, large]
)
def test_any_other_mask_stays(served: list[torch.fx.GraphModule], mask: Mask) -> None:
    torch.manual_seed(0)
    result = torch.compile(masked(mask), backend="frame_swap")(inputs())
    torch.manual_seed(0)
    torch.testing.assert_close(result, masked(mask)(inputs()))
    assert [masks_of(gm) for gm in served] == [[True]]


def test_a_mask_that_is_returned_stays(served: list[torch.fx.GraphModule]) -> None:
    def attend(x: Tensor) -> tuple[Tensor, Tensor]:
        mask = all_true(x)
        return attention(x, x, x, attn_mask=mask), mask

    _, mask = torch.compile(attend, backend="frame_swap")(inputs())
    assert torch.equal(mask, all_true(inputs()))
    assert [masks_of(gm) for gm in served] == [[True]]


def test_a_mask_that_does_not_fit_raises_as_in_eager_code(served: list[torch.fx.GraphModule]) -> None:
    for call in masked(all_true), torch.compile(masked(all_true), backend="frame_swap"):
        with pytest.raises(RuntimeError, match="broadcast"):
            call(inputs()[:1])
    assert [masks_of(gm) for gm in served] == [[True]]


def test_a_mask_of_changing_size_stays(served: list[torch.fx.GraphModule]) -> None:
    def attend(x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool)
        return attention(x, x, x, attn_mask=mask)

    torch.compile(attend, backend="frame_swap", dynamic=True)(inputs())
    assert [masks_of(gm) for gm in served] == [[True]]


def test_compiled_code_has_the_mask() -> None:
    frame_swap.configure(when="ready")
    compiled = torch.compile(masked(all_true), backend="frame_swap")
    before = compiled(inputs())
    frame_swap.wait()
    torch.testing.assert_close(compiled(inputs()), before)
    assert [region.state for region in frame_swap.report().regions] == [frame_swap.State.INSTALLED]
