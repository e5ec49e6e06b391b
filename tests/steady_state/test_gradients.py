"""Gradients of outputs, of every shape, kind and order."""

from __future__ import annotations

from typing import Any

import torch
from helpers import DEVICE
from torch import Tensor, autograd

from .harness import Cases
from .seen import Call, error, facts, outcome
from .subjects import Mlp, gradients_taken, numbers, ones, product, three

case = Cases()


@case(product)
def retain_graph(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    out = call(x, y)
    grads = [autograd.grad(out.sum(), (x, y), retain_graph=retain) for retain in (True, True, False)]
    return facts(out, grads), error(lambda: out.sum().backward())


@case(product)
def backward_twice(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    out = call(x, y)
    out.sum().backward()
    return facts(out, x.grad, y.grad), error(lambda: out.sum().backward())


@case(product)
def gradients_add_up(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    call(x, y).sum().backward()
    call(y, y).sum().backward()
    (call(x, y) + call(x, x)).sum().backward()
    return facts(x.grad, y.grad)


@case(product)
def second_derivative(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    grads = autograd.grad(call(x, y).sum(), (x, y), create_graph=True)
    return facts(grads), error(lambda: grads[0].sum().backward()), error(lambda: autograd.grad(grads[1].sum(), x))


@case(product)
def gradient_of_the_tangent(call: Call) -> Any:
    x, y, tangent = numbers(4), numbers(4, grad=False), numbers(4)
    (grad,) = autograd.grad(call(x, y), x, tangent, create_graph=True)
    return facts(grad), error(lambda: autograd.grad(grad.sum(), tangent))


@case(three)
def one_output_of_three_used(call: Call) -> Any:
    seen = []
    for used in range(3):
        x, y = numbers(4), numbers(4)
        outs = call(x, y)
        seen.append(facts(outs, autograd.grad(outs[used].sum(), (x, y), allow_unused=True)))
    return seen


@case(three)
def outputs_dropped_at_once(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    kept = call(x, y)[1]
    call(x, y)
    kept.sum().backward()
    return facts(kept, x.grad, y.grad)


@case(three)
def gradient_of_one_input(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    torch.autograd.backward([out.sum() for out in call(x, y)], inputs=[y])
    return facts(x.grad, y.grad)


@case(three)
def inputs_that_need_no_gradient(call: Call) -> Any:
    seen = []
    for x_grad, y_grad in ((True, False), (False, True), (False, False)):
        x, y = numbers(4, grad=x_grad), numbers(4, grad=y_grad)
        outs = call(x, y)
        if x_grad or y_grad:
            sum(out.sum() for out in outs).backward()
        seen.append(facts(outs, x.grad, y.grad))
    return seen


@case(lambda x, y, index: (x[index] * y.detach(), y > 1))
def inputs_that_get_no_gradient(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    outs = call(x, y * 2, torch.tensor([3, 0, 1, 1], device=DEVICE))
    outs[0].sum().backward()
    return facts(outs, x.grad, y.grad)


def undifferentiable(x: Tensor) -> tuple[Any, ...]:
    return x.argmax(), None, x > 1, 7, x.shape, x.detach() * 2, x.exp(), {"name": x.long()}, x.sum().detach()


@case(undifferentiable)
def outputs_without_a_gradient(call: Call) -> Any:
    x = numbers(4)
    outs = call(x)
    outs[6].sum().backward()
    failures = [error(out.float().sum().backward) for out in (outs[0], outs[5], outs[7]["name"])]
    return facts(outs, x.grad), failures


@case(undifferentiable)
def outputs_without_a_gradient_in_later_graphs(call: Call) -> Any:
    x, w = numbers(4), numbers(4)
    outs = call(x)
    (outs[5] * w + outs[6] * outs[8]).sum().backward()
    return facts(outs, x.grad, w.grad)


@case(lambda x, y: (x + y, y * 1))
def gradients_that_are_the_tangent(call: Call) -> Any:
    x, y, tangent = numbers(4), numbers(4), numbers(4, grad=False)
    out, _ = call(x, y)
    out.backward(tangent)
    before = facts(x.grad, y.grad, tangent)
    x.grad.mul_(2)
    return before, facts(x.grad, y.grad, tangent)


@case(product)
def the_same_argument_twice(call: Call) -> Any:
    x = numbers(4)
    out = call(x, x)
    out.sum().backward()
    return facts(out, x.grad)


@case(product)
def views_of_one_tensor_as_inputs(call: Call) -> Any:
    base = numbers(5, 4)
    left, right = base[1:], base[:4]
    out = call(left, right)
    return facts(out, autograd.grad(out.sum(), (left, right, base), allow_unused=True, retain_graph=True)), facts(
        autograd.grad(out.sum(), base)
    )


@case(Mlp)
def parameters_frozen_by_turns(call: Call) -> Any:
    seen = []
    for frozen in (None, call.first, call.second):
        call.requires_grad_(True)
        if frozen is not None:
            frozen.requires_grad_(False)
        out = call(numbers(2, 4, grad=False))
        out.sum().backward()
        seen.append((facts(out), gradients_taken(call)))
    return seen


@case(lambda x: (x * x).sum(0) * 2)
def jacobian(call: Call) -> Any:
    x = numbers(3, 2)
    return facts(
        torch.autograd.functional.jacobian(call, x),
        torch.autograd.functional.vjp(call, x, ones(2)),
    ), outcome(lambda: torch.autograd.functional.hessian(lambda x: call(x).sum(), x))


@case(product)
def gradcheck(call: Call) -> Any:
    return torch.autograd.gradcheck(call, (numbers(3, dtype=torch.float64), numbers(3, dtype=torch.float64)))


@case(product)
def batched_gradients(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    out = call(x, y)
    return outcome(lambda: autograd.grad(out, (x, y), torch.eye(4, device=DEVICE), is_grads_batched=True))


test_is_as_with_stock = case.test
