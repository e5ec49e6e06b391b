"""Functorch's transforms, forward mode, tracing and compiled autograd."""

from __future__ import annotations

from typing import Any

import torch
from helpers import DEVICE
from torch import Tensor, autograd, nn
from torch.autograd import forward_ad

from .harness import Cases
from .seen import Call, error, facts, outcome
from .subjects import Mlp, numbers, ones, product

case = Cases()


@case(product)
def functorch_transforms(call: Call) -> Any:
    x, y = numbers(3, grad=False), numbers(3, grad=False)
    call(x, y)
    return [
        outcome(lambda: torch.func.vmap(call)(x, y)),
        outcome(lambda: torch.func.grad(lambda x: call(x, y).sum())(x)),
        outcome(lambda: torch.func.vjp(call, x, y)[1](ones(3))),
        outcome(lambda: torch.func.jvp(call, (x, y), (y, x))),
        outcome(lambda: torch.func.jacrev(call)(x, y)),
        outcome(lambda: torch.func.functionalize(call)(x, y)),
    ]


@case(product)
def a_backward_within_a_transform(call: Call) -> Any:
    x, y = numbers(3), numbers(3)
    out = call(x, y)
    tangents = torch.eye(3, device=DEVICE)
    return error(lambda: torch.func.vmap(lambda g: autograd.grad(out, x, g, retain_graph=True)[0])(tangents))


@case(Mlp)
def functional_call(call: Call) -> Any:
    parameters = {name: p.detach() * 2 for name, p in call.named_parameters()}
    x = numbers(2, 4)
    call(x)
    return [
        facts(torch.func.functional_call(call, parameters, (x,))),
        outcome(lambda: torch.func.grad(lambda p: torch.func.functional_call(call, p, x).sum())(parameters)),
    ]


@case(product)
def forward_mode(call: Call) -> Any:
    x, y = numbers(3, grad=False), numbers(3, grad=False)
    call(x, y)
    with forward_ad.dual_level():
        return outcome(lambda: forward_ad.unpack_dual(call(forward_ad.make_dual(x, y), y)))


@case(product)
def tracing(call: Call) -> Any:
    x, y = numbers(3), numbers(3)
    call(x, y)

    class Calling(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return call(x, y)

    from torch.fx.experimental.proxy_tensor import make_fx

    return [
        outcome(lambda: make_fx(call)(x.detach(), y.detach()).code),
        outcome(lambda: torch.export.export(Calling(), (x, y)).module().code),
        outcome(lambda: torch.fx.symbolic_trace(call).code),
        outcome(lambda: torch.jit.trace(call, (x, y), check_trace=False)(x, y)),
    ]


@case(product)
def compiled_autograd(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    out = call(x, y)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        (out * out).sum().backward()
    return facts(out, x.grad, y.grad)


test_is_as_with_stock = case.test
