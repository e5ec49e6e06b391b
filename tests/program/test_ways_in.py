"""Other ways to compile than `torch.compile(f, backend="frame_swap")`, and its modes and options."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import Subject, Wrap, through_swap, with_frame_swap
from torch import Tensor, nn

import frame_swap

from .subjects import mlp, rand_with_grad, training

pytestmark = pytest.mark.usefixtures("unpadded")


def test_dynamo_optimize(device: str) -> None:
    through_swap(training, device=device, wrap=lambda f: torch._dynamo.optimize(frame_swap.frame_swap_backend)(f))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.linear(x).tanh() * scale


def test_opt_in_of_a_class_and_its_subclass(device: str) -> None:
    def blocks(compiled: Wrap) -> Subject:
        @compiled
        class Opted(Block):
            pass

        class Derived(Opted):
            def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
                return super().forward(x, scale=0.5)

        models = nn.ModuleList((Opted(), Derived()))
        return Subject(lambda x: [m(x) for m in models], [rand_with_grad], models)

    assert len(through_swap(blocks, device=device, wrap=frame_swap.opt_in)) == 2


def test_opt_in_of_a_module_leaves_it_what_it_was(device: str) -> None:
    def copies(compiled: Wrap) -> Subject:
        model = Block()
        keys = list(model.state_dict())
        assert compiled(model) is model
        assert list(model.state_dict()) == keys
        models = nn.ModuleList((model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))))
        assert {type(m) for m in models} == {Block}
        return Subject(lambda x: [m(x) for m in models], [rand_with_grad], models)

    through_swap(copies, device=device, wrap=frame_swap.opt_in)


def test_opt_in_of_a_function_with_arguments(device: str) -> None:
    def double(compiled: Wrap) -> Subject:
        return Subject(compiled(lambda x: x * 2), [lambda n=n: (torch.rand(n),) for n in (3, 5)])

    decorator = frame_swap.opt_in(dynamic=True, fullgraph=True, options={"epilogue_fusion": False})
    assert len(through_swap(double, device=device, wrap=decorator)) == 1, "the shape was not dynamic"


@pytest.mark.parametrize(
    "choice", [{"mode": "max-autotune-no-cudagraphs"}, {"options": {"epilogue_fusion": False}}], ids=str
)
def test_mode_and_options_keep_values(choice: dict[str, Any], device: str) -> None:
    through_swap(training, device=device, wrap=lambda f: with_frame_swap(f, **choice))


@pytest.mark.parametrize("fallback", [True, False])
def test_options_reach_the_worker(fallback: bool, device: str) -> None:
    frame_swap.configure(when="wait")
    zeros = torch.zeros(64, device=device)
    draw = with_frame_swap(lambda x: torch.rand_like(x) + 1, options={"fallback_random": fallback})
    draw(zeros)
    torch.manual_seed(1)
    drawn = draw(zeros)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand_like(zeros) + 1) == fallback


@pytest.mark.parametrize(
    ("choice", "nearest"),
    [({"mode": "max-autotun"}, "max-autotune"), ({"options": {"size_assert": False}}, "size_asserts")],
    ids=str,
)
def test_an_unknown_mode_or_option_names_the_nearest(choice: dict[str, Any], nearest: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{nearest}'"):
        frame_swap.opt_in(mlp(), **choice)
