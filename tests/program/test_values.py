"""Values and gradients are eager's before, during and after the swap.

A case builds its subject with the wrapper it is given, once eager and once compiled; `through_swap` compares.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers import (
    Make,
    Subject,
    Twins,
    Wrap,
    assert_same,
    swap_all,
    through_swap,
    wait_for_all,
    with_frame_swap,
)
from torch import Tensor, nn

import frame_swap

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


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def rand() -> tuple[Tensor]:
    return (torch.rand(6, 4),)


def rand_with_grad() -> tuple[Tensor]:
    return (torch.rand(6, 4, requires_grad=True),)


# How a program runs what it compiled


@case
def inference(compiled: Wrap) -> Subject:
    return Subject(compiled(lambda x, y: (x.sin() + y, x @ y.t())), [lambda: (*rand(), *rand())])


@case
def training(compiled: Wrap) -> Subject:
    model = mlp()
    return Subject(compiled(model), [rand_with_grad], model)


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


def chunks(n: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.rand(n, requires_grad=True),)


@pytest.mark.parametrize("sizes", [(9, 10, 4, 12), (4, 9, 5, 10)], ids=str)
def test_sizes_that_specialise_in_any_order(sizes: tuple[int, ...], device: str) -> None:
    def chunked(compiled: Wrap) -> Subject:
        function = compiled(lambda x: ([c * 2 for c in x.chunk(3)], x[::2].sin()), dynamic=True)
        return Subject(function, [chunks(n) for n in sizes + sizes[::-1]])

    through_swap(chunked, device=device)


@pytest.mark.parametrize("training", [True, False])
def test_a_change_in_place_counts_once(training: bool, device: str) -> None:
    frame_swap.configure(when="manual")
    buffer = torch.zeros(4, device=device)

    def accumulate(x: Tensor) -> Tensor:
        buffer.add_(x.detach())
        return x * buffer.sum()

    function = with_frame_swap(accumulate)
    x = torch.rand(4, device=device, requires_grad=training)
    versions = []
    for call in (accumulate, function, function, lambda x: (frame_swap.wait(), frame_swap.swap(), function(x))):
        before = buffer._version
        call(x)
        versions.append(buffer._version - before)
    assert versions == [1, 1, 1, 1]


# The moment of the swap


def test_backward_of_the_pair_after_the_swap(device: str) -> None:
    frame_swap.configure(when="manual")
    x = torch.rand(6, 4, device=device)
    eager = mlp().to(device)
    model = copy.deepcopy(eager)
    function = with_frame_swap(model)
    on_pair = function(x)
    wait_for_all()
    swap_all()
    on_compiled = function(x * 2)
    on_pair.square().sum().backward()
    on_compiled.sum().backward()
    (eager(x).square().sum() + eager(x * 2).sum()).backward()
    for parameter, expected in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)


def test_several_models_at_once(device: str) -> None:
    def linear(width: int) -> Make:
        def make(compiled: Wrap) -> Subject:
            model = nn.Linear(4, width)
            return Subject(compiled(model), [rand_with_grad], model)

        return make

    assert len(through_swap(*map(linear, (2, 3, 5)), device=device)) == 3


def in_threads(*calls: Callable[[], Any], capturing: bool = False) -> None:
    """Make all calls at once, each in its own thread.

    Not those that capture on torch 2.11, where Dynamo in a second thread crashes the process, with stock
    backends ("aot_eager"), too, even if one thread ends before the next begins.
    """
    if capturing and torch.__version__ < (2, 13):
        for call in calls:
            call()
        return
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> None:
        barrier.wait()
        call()

    with ThreadPoolExecutor(len(calls)) as pool:
        list(pool.map(run, calls))


def test_threads_with_a_model_each(device: str) -> None:
    def linear(width: int) -> Make:
        def make(compiled: Wrap) -> Subject:
            model = nn.Linear(4, width)
            return Subject(compiled(model), [lambda: (torch.linspace(0, 1, 24).view(6, 4),)], model)

        return make

    frame_swap.configure(when="manual")
    twins = [Twins(linear(width), device) for width in (2, 3, 5)]
    in_threads(*(lambda each=each: each.check("before") for each in twins), capturing=True)
    wait_for_all()
    in_threads(*(lambda each=each: each.check("during") for each in twins))
    assert len(swap_all()) == 3
    in_threads(*(lambda each=each: each.check("after") for each in twins))


def test_threads_that_share_a_function(device: str) -> None:
    frame_swap.configure(when="manual")
    x = torch.linspace(0, 1, 24, device=device)
    function = with_frame_swap(lambda x: (x * x).sin())

    def check() -> None:
        assert_same(function(x), (x * x).sin(), "in a thread")

    in_threads(*[check] * 4, capturing=True)  # threads that come at the same moment may each capture it
    wait_for_all()
    regions = swap_all()
    in_threads(*[check] * 4)
    assert frame_swap.report().regions == regions


# Other ways in


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
