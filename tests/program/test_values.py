"""Values and gradients are eager's before, during and after the swap.

A case builds its subject with the wrapper it is given, once eager and once compiled; `through_swap` compares.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Make, Subject, Wrap, through_swap
from torch import Tensor, nn

from .subjects import mlp, rand, rand_with_grad, training

pytestmark = pytest.mark.usefixtures("unpadded")

BFLOAT16 = {"rtol": 2e-2, "atol": 2e-2}
"""bfloat16 keeps 8 bits; Inductor leaves out the roundings between the operations that it fuses."""

CASES: list[Make] = []


def case(make: Make) -> Make:
    CASES.append(make)
    return make


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_equals_eager(make: Make, device: str) -> None:
    through_swap(make, device=device)


# How a program runs what it compiled


@case
def inference(compiled: Wrap) -> Subject:
    return Subject(compiled(lambda x, y: (x.sin() + y, x @ y.t())), [lambda: (*rand(), *rand())])


case(training)


@case
def no_grad(compiled: Wrap) -> Subject:
    model = mlp()
    return Subject(torch.no_grad()(compiled(model)), [rand_with_grad], model)


@case
def inference_mode(compiled: Wrap) -> Subject:
    model = mlp()
    return Subject(torch.inference_mode()(compiled(model)), [rand], model)


@case
def grad_and_no_grad_by_turns(compiled: Wrap) -> Subject:
    function = compiled(lambda x: (x * x).sin())

    def call(x: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            before = function(x)
        return before, function(x)

    return Subject(call, [rand_with_grad])


@case
def autocast_around_the_call(compiled: Wrap) -> Subject:
    model = mlp()
    function = compiled(model)

    def call(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return function(x)

    return Subject(call, [rand_with_grad], model, BFLOAT16)


@case
def convolution_whose_layout_depends_on_the_number_of_threads(compiled: Wrap) -> Subject:
    model = nn.Conv3d(3, 3, 1).to(memory_format=torch.channels_last_3d)
    return Subject(compiled(model), [lambda: (torch.randn(6, 3, 8, 8, 8),)], model)


@case
def autocast_inside(compiled: Wrap) -> Subject:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, torch.bfloat16):
            product = x @ y.t()
        return product, x.float() @ y.t()

    return Subject(compiled(function), [lambda: (*rand_with_grad(), *rand())], tolerance=BFLOAT16)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_training_with_an_optimizer_equals_eager(optimizer: type[torch.optim.Optimizer], device: str) -> None:
    def trainer(compiled: Wrap) -> Subject:
        model = mlp()
        function, steps = compiled(model), optimizer(model.parameters(), lr=0.05)

        def three_steps(x: Tensor, y: Tensor) -> list[float]:
            losses = []
            for _ in range(3):
                steps.zero_grad()
                loss = nn.functional.mse_loss(function(x), y)
                loss.backward()
                steps.step()
                losses.append(loss.detach())
            return losses

        return Subject(three_steps, [lambda: (*rand(), torch.rand(6, 3))], model)

    through_swap(trainer, device=device)


# Shapes


@case
def dynamic_shapes(compiled: Wrap) -> Subject:
    function = compiled(lambda x: (x.cumsum(0) * x.shape[0]).relu(), dynamic=True)
    return Subject(function, [lambda n=n: (torch.rand(n, n + 2, requires_grad=True),) for n in (5, 3, 8)])


@case
def automatic_dynamic_shapes(compiled: Wrap) -> Subject:
    function = compiled(lambda x: (x.softmax(0), x.shape[0] * 2))
    return Subject(function, [lambda n=n: (torch.rand(n, 4),) for n in (5, 7, 3)])


@case
def a_scalar_argument_that_changes(compiled: Wrap) -> Subject:
    function = compiled(lambda x, n: x * n, dynamic=True)
    return Subject(function, [lambda n=n: (*rand_with_grad(), n) for n in (2, 5, 3)])


# What a frame does


@case
def graph_breaks(compiled: Wrap) -> Subject:
    def function(x: Tensor) -> Tensor:
        x = x.sin() * 2
        torch._dynamo.graph_break()
        return x.cos() + 1

    return Subject(compiled(function), [rand_with_grad])


@case
def keyword_arguments(compiled: Wrap) -> Subject:
    def function(x: Tensor, *, shift: Tensor, scale: float = 2.0) -> dict[str, Tensor]:
        return {"scaled": x * scale, "shifted": x + shift}

    function = compiled(function)
    return Subject(lambda x, y: function(shift=y, x=x), [lambda: (*rand_with_grad(), *rand())])


@case
def nested_calls(compiled: Wrap) -> Subject:
    inner = compiled(lambda x: x.sin() * 2)

    def function(x: Tensor) -> Tensor:
        x = inner(x) + 1
        torch._dynamo.graph_break()
        return inner(x.cos())

    outer = compiled(function)
    return Subject(lambda x: (inner(x), outer(x)), [rand_with_grad])


@case
def recursion(compiled: Wrap) -> Subject:
    def function(x: Tensor, depth: int) -> Tensor:
        torch._dynamo.graph_break()
        return x if depth == 0 else recursive(x.sin() + depth, depth - 1)

    recursive = compiled(function)
    return Subject(recursive, [lambda: (*rand_with_grad(), 2)])


@case
def several_models_in_one_program(compiled: Wrap) -> Subject:
    models = nn.ModuleList((mlp(), nn.Linear(3, 2)))
    first, second = map(compiled, models)
    return Subject(lambda x: second(first(x).relu()), [rand_with_grad], models)


@case
def checkpointing(compiled: Wrap) -> Subject:
    model = mlp()

    def function(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(model, x.sin(), use_reentrant=False)

    return Subject(compiled(function), [rand_with_grad], model)


# Mutation


@case
def mutated_input(compiled: Wrap) -> Subject:
    return Subject(compiled(lambda x: x.mul_(2).sin()), [rand])


@case
def mutated_view_of_an_input(compiled: Wrap) -> Subject:
    def function(x: Tensor) -> None:
        x[1:].add_(x[0])

    return Subject(compiled(function), [rand])


@case
def mutated_input_with_a_gradient(compiled: Wrap) -> Subject:
    function = compiled(lambda x: x.mul_(2).sum())

    def call(leaf: Tensor) -> tuple[Tensor, Tensor]:
        x = leaf.sin()
        return function(x), x

    return Subject(call, [rand_with_grad])


@case
def batch_norm_by_turns_in_train_and_eval_mode(compiled: Wrap) -> Subject:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.0))
    function = compiled(model)

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        model.train()
        trained = function(x)
        model.eval()
        return trained, function(x)

    return Subject(call, [rand_with_grad], model)


class Counting(nn.Module):
    """Counts calls in buffers: in place in one, by rebinding in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x.sum(0)
        return x * self.calls


@case
def buffers(compiled: Wrap) -> Subject:
    model = Counting()
    return Subject(compiled(model), [rand], model)


# Inputs and outputs


@case
def aliased_outputs(compiled: Wrap) -> Subject:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        y = x.cos()
        return x, x.view(-1), y, y, y[1:], y.t()

    return Subject(compiled(function), [rand, rand_with_grad])


@case
def unused_outputs(compiled: Wrap) -> Subject:
    function = compiled(lambda x, y: (x.sin() * 2, y.cos(), (x * y).sum()))
    return Subject(
        lambda x, y: (function(x, y)[0], function(x, y)[1]),
        [lambda: (*rand_with_grad(), *rand_with_grad())],
    )


@case
def outputs_without_a_gradient(compiled: Wrap) -> Subject:
    def function(x: Tensor) -> tuple[Any, ...]:
        return None, x.argmax(1), x > 0.5, 7, x.shape, x.detach() * 2, x.exp(), {"name": "constant"}

    return Subject(compiled(function), [rand_with_grad])


@case
def transposed_outputs(compiled: Wrap) -> Subject:
    return Subject(compiled(lambda x: (x.t() * 2, x.t().softmax(0))), [rand_with_grad])


@case
def channels_last(compiled: Wrap) -> Subject:
    model = nn.Conv2d(3, 4, 3, padding=1).to(memory_format=torch.channels_last)
    return Subject(
        compiled(model),
        [lambda: (torch.rand(2, 3, 8, 8).to(memory_format=torch.channels_last).requires_grad_(),)],
        model,
    )


@case
def views_as_inputs(compiled: Wrap) -> Subject:
    def call(base: Tensor) -> Tensor:
        return function(base[2:], base.t()[1:])

    function = compiled(lambda x, y: x.sin().sum() + y.mul(2))
    return Subject(call, [rand, rand_with_grad])


@case
def an_input_that_overlaps_itself(compiled: Wrap) -> Subject:
    return Subject(compiled(lambda x: x.exp()), [lambda: (torch.rand(1, 4).expand(6, 4),)])


@case
def the_same_input_twice(compiled: Wrap) -> Subject:
    function = compiled(lambda x, y: x.sin() * y)
    return Subject(lambda x: function(x, x), [rand_with_grad])


@case
def gradients_that_exist_at_capture(compiled: Wrap) -> Subject:
    model = mlp()
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    return Subject(compiled(model), [rand], model)


@case
def half_precision(compiled: Wrap) -> Subject:
    model = mlp().bfloat16()
    return Subject(compiled(model), [lambda: (torch.rand(6, 4, dtype=torch.bfloat16),)], model, tolerance=BFLOAT16)


@case
def double_precision(compiled: Wrap) -> Subject:
    return Subject(
        compiled(lambda x: x.exp()), [lambda: (torch.rand(6, 4, dtype=torch.float64, requires_grad=True),)]
    )


@case
def complex_numbers(compiled: Wrap) -> Subject:
    return Subject(
        compiled(lambda x: (x * x).abs()),
        [lambda: (torch.rand(6, 4, dtype=torch.complex64, requires_grad=True),)],
    )


def test_dropout_draws_eagers_numbers_where_asked_to(device: str) -> None:
    def dropout(compiled: Wrap) -> Subject:
        return Subject(compiled(lambda x: nn.functional.dropout(x, 0.5) + torch.rand_like(x)), [rand_with_grad])

    with torch._inductor.config.patch(fallback_random=True):
        through_swap(dropout, device=device)
