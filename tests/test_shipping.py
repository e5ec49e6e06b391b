"""What is shipped to a worker and what stays, each with one example; what stays is compiled by stock Inductor."""

from __future__ import annotations

import importlib
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Make, Subject, Twins, Wrap, swap_all, through_swap, wait_for_all
from torch import Tensor, nn
from torch.library import Library, custom_op
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint

import frame_swap
from frame_swap import Region, State

SHIPPED: list[Make] = []


def shipped(make: Make) -> Make:
    SHIPPED.append(make)
    return make


@pytest.mark.parametrize("make", SHIPPED, ids=lambda make: make.__name__)
def test_is_shipped(make: Make, device: str) -> None:
    through_swap(make, device=device)


def rand() -> tuple[Tensor]:
    return (torch.rand(6, 4),)


def rand_with_grad() -> tuple[Tensor]:
    return (torch.rand(6, 4, requires_grad=True),)


# Custom operators: kernels that no compiler looks into, here ordinary PyTorch


@custom_op("shipping::scale", mutates_args=())
def scale(x: Tensor, by: float) -> Tensor:
    return x * by


@scale.register_fake
def _(x: Tensor, by: float) -> Tensor:
    return torch.empty_like(x)


@custom_op("shipping::square", mutates_args=())
def square(x: Tensor) -> Tensor:
    return x * x


@square.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _save_input(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0])


def _square_backward(ctx: Any, grad: Tensor) -> Tensor:
    return torch.ops.shipping.scale(ctx.saved_tensors[0], 2.0) * grad


square.register_autograd(_square_backward, setup_context=_save_input)


@shipped
def custom_operator_whose_gradient_calls_another(compiled: Wrap) -> Subject:
    return Subject(compiled(lambda x: square(x.sin()) + 1), [rand_with_grad])


@custom_op("shipping::power", mutates_args=())
def power(x: Tensor, exponent: int) -> Tensor:
    return x**exponent


@power.register_fake
def _(x: Tensor, exponent: int) -> Tensor:
    return torch.empty_like(x)


def _power_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad * ctx.exponent * power(ctx.saved_tensors[0], ctx.exponent - 1), None


def _power_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.exponent = inputs
    ctx.save_for_backward(x)


power.register_autograd(_power_backward, setup_context=_power_context)


@shipped
def custom_operator_in_its_own_gradient(compiled: Wrap) -> Subject:
    return Subject(compiled(lambda x: power(x.sin(), 3) + 1), [rand_with_grad])


@custom_op("shipping::add_into", mutates_args={"out"})
def add_into(out: Tensor, x: Tensor) -> None:
    out += x


@shipped
def custom_operator_that_writes_to_an_argument(compiled: Wrap) -> Subject:
    def function(x: Tensor) -> Tensor:
        y = x.sin()
        add_into(y, x)
        add_into(x, y)
        return y * 2

    return Subject(compiled(function), [rand])


@custom_op("shipping::halves", mutates_args=())
def halves(x: Tensor) -> list[Tensor]:
    return [part.clone() for part in x.chunk(2)]


@halves.register_fake
def _(x: Tensor) -> list[Tensor]:
    return [torch.empty_like(part) for part in x.chunk(2)]


halves.register_autograd(lambda ctx, grads: torch.cat(grads))


@shipped
def custom_operator_that_returns_a_list(compiled: Wrap) -> Subject:
    def function(x: Tensor) -> Tensor:
        upper, lower = halves(x.cos())
        return upper + lower

    return Subject(compiled(function), [rand_with_grad])


@custom_op("shipping::extremes", mutates_args=())
def extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.amin(0), x.amax(0)


@extremes.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[1]), x.new_empty(x.shape[1])


@shipped
def custom_operator_that_returns_a_tuple(compiled: Wrap) -> Subject:
    return Subject(compiled(lambda x: extremes(x * 2)), [rand])


@custom_op("shipping::positive", mutates_args=())
def positive(x: Tensor) -> Tensor:
    return x[x > 0].clone()


@positive.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(torch.library.get_ctx().new_dynamic_size())


@shipped
def custom_operator_whose_size_depends_on_data(compiled: Wrap) -> Subject:
    function = compiled(lambda x: positive(x.sin()) * 2)
    call = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)(function)
    return Subject(call, [lambda: (torch.randn(20),)])


@shipped
def custom_operator_that_a_function_defines(compiled: Wrap) -> Subject:
    factor = 3.0

    @custom_op("shipping::local", mutates_args=())
    def local(x: Tensor) -> Tensor:
        return x * factor

    local.register_fake(torch.empty_like)
    local.register_autograd(lambda ctx, grad: grad * factor)
    return Subject(compiled(lambda x: local(x.sin()) + 1), [rand_with_grad])


@custom_op("shipping::cast", mutates_args=())
def cast(x: Tensor) -> Tensor:
    return x * 2


cast.register_fake(torch.empty_like)
cast.register_autocast("cpu", torch.bfloat16)


@shipped
def custom_operator_under_autocast(compiled: Wrap) -> Subject:
    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return cast(x.sin())

    return Subject(compiled(function), [rand], tolerance={"rtol": 2e-2, "atol": 2e-2})


@cast.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], x: Tensor) -> tuple[Tensor, int | None]:
    return cast(x), in_dims[0]


@shipped
def custom_operator_under_vmap(compiled: Wrap) -> Subject:
    return Subject(compiled(lambda x: torch.vmap(cast)(x).sum()), [rand])


@torch.library.triton_op("shipping::decomposed", mutates_args=())
def decomposed(x: Tensor) -> Tensor:
    return x.sin() * 2


@shipped
def triton_op_that_a_compiler_looks_into(compiled: Wrap) -> Subject:
    return Subject(compiled(lambda x: decomposed(x) + 1), [rand])


_library = Library("shipping_library", "DEF")
_library.define("plus(Tensor x, Tensor y) -> Tensor")
_library.impl("plus", lambda x, y: x + y, "CompositeExplicitAutograd")
torch.library.register_fake("shipping_library::plus", lambda x, y: torch.empty_like(x), lib=_library)
torch.library.define("shipping_library::minus", "(Tensor x, Tensor y) -> Tensor")
torch.library.impl("shipping_library::minus", ["cpu", "cuda"], lambda x, y: x - y)
torch.library.register_fake("shipping_library::minus", lambda x, y: torch.empty_like(x))


@shipped
def operators_of_torch_library(compiled: Wrap) -> Subject:
    operators = torch.ops.shipping_library
    return Subject(compiled(lambda x: operators.minus(operators.plus(x, x.sin()), x.cos())), [rand])


# Higher-order operators


@shipped
def checkpointed(compiled: Wrap) -> Subject:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    return Subject(compiled(lambda x: checkpoint(model, x, use_reentrant=False)), [rand_with_grad], model)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * grad


@shipped
def autograd_function(compiled: Wrap) -> Subject:
    return Subject(compiled(lambda x: Cube.apply(x).sin()), [rand_with_grad])


@shipped
def cond(compiled: Wrap) -> Subject:
    def function(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))

    return Subject(compiled(function), [rand_with_grad, lambda: (-torch.rand(6, 4).requires_grad_(),)])


@shipped
def while_loop(compiled: Wrap) -> Subject:
    from torch._higher_order_ops import while_loop

    def function(x: Tensor) -> Any:
        return while_loop(lambda n, x: n < 3, lambda n, x: (n + 1, x.sin()), (torch.zeros((), dtype=torch.int), x))

    return Subject(compiled(function), [rand])


@shipped
def scan(compiled: Wrap) -> Subject:
    from torch._higher_order_ops import scan

    def function(x: Tensor) -> Any:
        return scan(lambda total, row: (total + row, total * row), torch.zeros_like(x[0]), x)

    return Subject(compiled(function), [rand])


@shipped
def flex_attention(compiled: Wrap) -> Subject:
    from torch.nn.attention.flex_attention import flex_attention

    def function(q: Tensor, k: Tensor) -> Tensor:
        return flex_attention(q, k, k, score_mod=lambda score, b, h, i, j: score + 0.1 * (i - j))

    with torch.no_grad():
        return Subject(
            torch.no_grad()(compiled(function)), [lambda: (torch.rand(1, 2, 128, 16), torch.rand(1, 2, 128, 16))]
        )


@shipped
def nested_compile_regions(compiled: Wrap) -> Subject:
    @torch.compiler.nested_compile_region
    def layer(x: Tensor) -> Tensor:
        return x.sin() + 1

    return Subject(compiled(lambda x: layer(layer(x))), [rand_with_grad])


# Inputs


@shipped
def complex_inputs(compiled: Wrap) -> Subject:
    return Subject(compiled(lambda x: (x * x.conj()).real.sum(0)), [lambda: (torch.rand(6, 4) + 1j,)])


@shipped
def views_as_inputs(compiled: Wrap) -> Subject:
    def inputs() -> tuple[Tensor, ...]:
        base = torch.rand(8, 8, requires_grad=True).clone()
        return base[1:5].t(), base[:, ::2], base.unbind()[0]

    return Subject(compiled(lambda x, y, z: (x.sin() @ y[:4], z + 1)), [inputs])


@shipped
def subclass_of_tensors(compiled: Wrap) -> Subject:
    return Subject(compiled(lambda x: x.sin() * 2), [lambda: (TwoTensor(torch.rand(3, 4), torch.rand(3, 4)),)])


@shipped
def subclass_of_tensors_with_a_gradient(compiled: Wrap) -> Subject:
    def inputs() -> tuple[Tensor, ...]:
        return (TwoTensor(torch.rand(3, 4), torch.rand(3, 4)).requires_grad_(), *rand_with_grad())

    return Subject(compiled(lambda x, y: x.sin() @ y.t()), [inputs])


class Weight(nn.Parameter):
    """A parameter that is no more than that."""


@shipped
def subclass_of_parameter_and_buffer(compiled: Wrap) -> Subject:
    model = nn.Linear(4, 4)
    model.weight = Weight(model.weight.detach())
    model.shift = nn.Buffer(torch.ones(4))
    return Subject(compiled(lambda x: model(x) + model.shift), [rand_with_grad], model)


@shipped
def constants_made_in_the_graph(compiled: Wrap) -> Subject:
    return Subject(compiled(lambda x: x * torch.tensor([1.0, 2.0, 3.0, 4.0])), [rand_with_grad])


# Random numbers


@shipped
def random_numbers_of_eager(compiled: Wrap) -> Subject:
    def function(x: Tensor) -> Tensor:
        return nn.functional.dropout(x) + torch.rand_like(x) * torch.randn(4, device=x.device)

    return Subject(compiled(function, options={"fallback_random": True}), [rand_with_grad])
