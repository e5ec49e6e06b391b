"""Wrappers around compiled code: none of AOTAutograd's is called, unless the report names it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers import DEVICE, assert_same, codes_called, live, observe
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import frame_swap
from frame_swap import State
from frame_swap.internals import dynamo

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("unpadded")]

WRAPPERS = re.compile(r"torch/_functorch/_aot_autograd/(runtime_wrappers\.py|.*:codegen\()")


class Case(NamedTuple):
    """A function, a maker of its arguments, grad mode at its calls, and the wrappers that the report names."""

    function: Callable[..., Any]
    make: Callable[[], tuple[Any, ...]]
    grad: bool = True
    wrappers: tuple[str, ...] = ()


def rand() -> tuple[Tensor, ...]:
    return torch.rand(4, 4, device=DEVICE), torch.rand(4, 4, device=DEVICE)


def rand_with_grad() -> tuple[Tensor, ...]:
    x, y = rand()
    return x.requires_grad_(), y.requires_grad_()


def no_leaves() -> tuple[Tensor, ...]:
    return tuple(x * 1 for x in rand_with_grad())


def two_tensors() -> tuple[Tensor, ...]:
    return TwoTensor(*rand()).requires_grad_(), rand()[0]


def overlapping() -> tuple[Tensor, ...]:
    x = torch.rand(6, device=DEVICE)
    return x[:4], x[2:]


def autocast(x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast(DEVICE, torch.bfloat16):
        return x @ y


def leaves_grad_off(x: Tensor, y: Tensor) -> Tensor:
    out = x * y
    torch.set_grad_enabled(False)
    return out


CASES = {
    "inference": Case(lambda x, y: (x + y).relu(), rand, grad=False),
    "inference with grad mode on": Case(lambda x, y: (x + y).relu(), rand),
    "training": Case(lambda x, y: (x @ y).sin(), rand_with_grad),
    "training where grad mode is off": Case(torch.enable_grad()(lambda x, y: x * y), rand_with_grad, grad=False),
    "constant and whole outputs": Case(lambda x, y: (x * y, x > y, x.detach() + 1, x.shape[0]), rand_with_grad),
    "changed inputs": Case(lambda x, y: x.mul_(2).add_(y), rand, grad=False),
    "changed inputs that need gradients": Case(lambda x, y: x.mul_(2).add_(y).sin(), no_leaves),
    "inputs of another shape afterwards": Case(lambda x, y: x.t_().add_(1) * y, rand, grad=False),
    "views of inputs": Case(lambda x, y: (x[1:], (x * y)[0], y), rand_with_grad),
    "views of what is computed": Case(lambda x, y: ((z := x * y), z[1:], z.t(), z.view(16)), rand_with_grad),
    "autocast": Case(autocast, rand_with_grad),
    "grad mode changed": Case(leaves_grad_off, rand_with_grad),
    "subclasses": Case(lambda x, y: x.sin() @ y, two_tensors, wrappers=("subclasses",)),
    "inputs that overlap": Case(lambda x, y: (x.mul_(2), y + 1)[1], overlapping, False, ("overlapping inputs",)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_only_wrappers_that_the_report_names_are_called(case: Case) -> None:
    frame_swap.configure(when="manual")
    compiled = torch.compile(case.function, backend="frame_swap")
    with torch.set_grad_enabled(case.grad):
        compiled(*case.make())
    frame_swap.wait()
    (region,) = live(frame_swap.swap())
    assert (region.state, region.reason, region.wrappers) == (State.INSTALLED, "", case.wrappers)
    torch.manual_seed(0)
    args = case.make()
    actual: dict[str, Any] = {}
    with torch.set_grad_enabled(case.grad):
        files = {code.co_filename for code in codes_called(lambda: actual.update(observe(compiled, args)))}
    torch.manual_seed(0)
    args = case.make()
    with torch.set_grad_enabled(case.grad):
        expected = observe(case.function, args)
    assert_same(actual, expected, "after the swap")
    assert live(frame_swap.report()) == [region], "it was compiled again"
    wrappers = {file for file in files if WRAPPERS.search(file)}
    assert bool(wrappers) == bool(case.wrappers), files
    assert frame_swap.report().as_dict()["regions"][0]["wrappers"] == list(case.wrappers)
    text = " ".join(str(frame_swap.report()).split())  # which breaks lines
    assert all(name in text for name in case.wrappers)


def test_inference_is_called_from_the_frames_own_code() -> None:
    frame_swap.configure(when="manual")

    def function(x: Tensor) -> Tensor:
        return x.sin() + 1

    with torch.no_grad():
        compiled = torch.compile(function, backend="frame_swap")
        compiled(torch.rand(4))
        frame_swap.wait()
        frame_swap.swap()
        (entry,) = dynamo.cache_entries(function.__code__)
        (callee, *for_errors) = (constant for constant in entry.code.co_consts if callable(constant))
        assert for_errors == [Exception, live(frame_swap.report())[0].server.recover]
        assert callee.__qualname__ == "Runner.call", "the function that Inductor has generated"
        assert not [name for name in entry.code.co_names if name.startswith("record_pregraph")]
        torch.testing.assert_close(compiled(torch.ones(4)), torch.ones(4).sin() + 1)


def test_modules_run_with_no_wrapper_left() -> None:
    frame_swap.configure(when="manual")
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.LazyLinear(2)
    ).to(DEVICE)
    x = torch.rand(2, 3, 6, 6, device=DEVICE)
    model(x)
    compiled = torch.compile(model, backend="frame_swap")
    compiled(x).sum().backward()
    frame_swap.wait()
    (region,) = live(frame_swap.swap())
    compiled(x).sum().backward()
    assert (region.state, region.wrappers) == (State.INSTALLED, ())
