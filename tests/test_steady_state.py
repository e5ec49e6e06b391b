"""After the swap all is as with stock `torch.compile`: results, errors, and what autograd shows of them.

A case is a scenario around something compiled. It runs twice with each backend: first to compile all that it
calls, then, frame-swap's code installed, to be observed. What was observed must be equal: bits, strides,
versions, views and aliases, autograd's nodes, hooks called, types and messages of errors.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import accumulate
from typing import Any, NamedTuple

import pytest
import torch
from helpers import DEVICE, assert_same, swap_all, wait_for_all
from torch import Tensor, autograd, nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._library.effects import EffectType
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.library import custom_op
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

import frame_swap

NOTHING_CACHED = functorch_config.patch(enable_autograd_cache=False)
"""A backward from stock's cache was compiled for what another program did with it."""

Call = Callable[..., Any]


class Case(NamedTuple):
    """A scenario, and what it calls.

    Attributes:
        scenario: is given the compiled subject; returns what there is to compare.
        subject: what is compiled: a function, or a module's class.
        within: entered around the whole, compiling included.
        differs: why frame-swap differs, where it does.
        answered: whether calls raise: the pair is asked whether it raises, too, and the log shows that.
        keywords: for `torch.compile`.
    """

    scenario: Callable[[Call], Any]
    subject: Call
    within: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    differs: str = ""
    answered: bool = False
    keywords: dict[str, Any] = {}  # noqa: RUF012 - a default that nobody changes


CASES: list[Case] = []


def case(
    subject: Call,
    within: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    differs: str = "",
    answered: bool = False,
    **keywords: Any,
) -> Callable[[Callable[[Call], Any]], Callable[[Call], Any]]:
    def add(scenario: Callable[[Call], Any]) -> Callable[[Call], Any]:
        CASES.append(Case(scenario, subject, within, differs, answered, keywords))
        return scenario

    return add


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.scenario.__name__)
def test_is_as_with_stock(case: Case, request: pytest.FixtureRequest) -> None:
    if case.differs:
        request.applymarker(pytest.mark.xfail(reason=case.differs, strict=True))
    with case.within():
        expected, actual = observe(case, "inductor"), observe(case, "frame_swap")
    assert_same(actual, expected, case.scenario.__name__)


def observe(case: Case, backend: str) -> Any:
    """What the scenario returns when all that it calls is compiled; and what else it leaves behind."""
    torch._dynamo.reset()
    frame_swap.configure(when="manual")
    torch.manual_seed(0)
    subject = case.subject().to(DEVICE) if isinstance(case.subject, type) else case.subject
    call = torch.compile(subject, backend=backend, **case.keywords)
    with NOTHING_CACHED:
        case.scenario(call)
    regions = []
    if backend == "frame_swap":
        wait_for_all()
        regions = swap_all()
    pair_calls = [region.pair_calls for region in regions]

    case.scenario(call)  # the first call of compiled code looks for operators that alias; not again
    LOG.clear()
    WATCHED.clear()
    torch.manual_seed(1)
    before = ambient()
    seen = case.scenario(call)
    assert frame_swap.report().regions == regions, "it compiled again"
    served = [region.pair_calls for region in regions]
    assert (served != pair_calls) is (case.answered and bool(regions)), "a pair was called, or was to be"
    after, log = ambient(), [] if case.answered else LOG.copy()
    torch.set_grad_enabled(True)  # for the tests that come
    return seen, log, before, after, torch.get_rng_state(), torch.cuda.get_rng_state_all()


# What is to be seen


def facts(*tree: Any) -> Any:
    """`tree` with each tensor replaced by all that can be told of it now."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    memories = [storage(t) for t in tensors]

    def describe(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return {
            "type": type(leaf).__name__,
            "value": leaf.detach().clone(),
            "layout": (leaf.dtype, leaf.shape, leaf.stride(), leaf.storage_offset()),
            "autograd": (leaf.requires_grad, leaf.is_leaf, leaf.retains_grad, names(leaf.grad_fn)),
            "version": None if leaf.is_inference() else leaf._version,
            "is": next(i for i, other in enumerate(tensors) if other is leaf),
            "shares memory with": memories.index(storage(leaf)),
            "is a view of": leaf._is_view() and [i for i, other in enumerate(tensors) if other is leaf._base],
            "attributes": {k: v for k, v in vars(leaf).items() if not isinstance(v, Tensor)},
        }

    return tree_map(describe, tree)


def storage(tensor: Tensor) -> int:
    """Names a tensor's memory while that lives."""
    return (tensor.a if isinstance(tensor, TwoTensor) else tensor).untyped_storage()._cdata


def names(node: Any) -> Any:
    """The names of an autograd node and of those before it."""
    if node is None:
        return None
    return node.name(), type(node).__name__, tuple(n and n.name() for n, _ in node.next_functions)


def error(call: Callable[[], Any]) -> tuple[str, str]:
    """The type and message of what `call` raises; it must raise."""
    try:
        call()
    except Exception as raised:
        return type(raised).__name__, str(raised).partition("\nException raised from")[0]
    pytest.fail("stock raises here")


def outcome(call: Callable[[], Any]) -> Any:
    """What `call` returns, or what it raises."""
    try:
        return facts(call())
    except Exception as raised:
        return type(raised).__name__, str(raised).partition("\nException raised from")[0]


def modes() -> dict[str, bool]:
    """What a program reads of this thread's state."""
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled(DEVICE),
    }


def ambient() -> dict[str, Any]:
    """The state of this thread that wrappers change for a while."""
    return {
        **modes(),
        "view replay": torch._C._is_view_replay_enabled(),
        "hooks disabled": torch._C._autograd._saved_tensors_hooks_get_disabled_error_message(),
    }


LOG: list[Any] = []
"""What operators and hooks note of their calls, in order."""

WATCHED: list[StorageWeakRef] = []
"""Memory whose end is of interest."""


def freed() -> list[bool]:
    return [ref.expired() for ref in WATCHED]


def note(what: str) -> None:
    LOG.append((what, modes(), freed()))


@custom_op("steady::watch", mutates_args=())
def watch(x: Tensor, what: str) -> Tensor:
    """A copy of `x`, whose memory is watched if it is to be "kept". Notes each call; so does its gradient."""
    note(what)
    if FAIL and what == FAIL[0]:
        raise ArithmeticError(f"{what} failed")
    result = x.clone()
    if what == "kept":
        WATCHED.append(StorageWeakRef(result.untyped_storage()))
    return result


FAIL: list[str] = []
"""Which call of `watch` is to fail."""

watch.register_fake(lambda x, what: torch.empty_like(x))


def _watch_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.what = inputs[1]


watch.register_autograd(
    lambda ctx, grad: (watch(grad, f"{ctx.what}'s gradient"), None), setup_context=_watch_context
)


def numbers(*shape: int, grad: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
    """A leaf whose elements all differ."""
    return (torch.rand(shape, device=DEVICE) + 0.5).to(dtype).requires_grad_(grad)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, device=DEVICE)


def product(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sin()


def three(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.sin(), x * y, y.cos()


def matmul(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y).tanh()


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def gradients_taken(module: nn.Module) -> Any:
    """The parameters' gradients, which are None afterwards."""
    seen = facts([parameter.grad for parameter in module.parameters()])
    module.zero_grad()
    return seen


# Gradients


@case(product)
def retain_graph(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    out = call(x, y)
    grads = [autograd.grad(out.sum(), (x, y), retain_graph=retain) for retain in (True, True, False)]
    return facts(out, grads), error(lambda: out.sum().backward())


def saves_results(x: Tensor) -> Tensor:
    return (x.sin() @ x).exp().sum(0)


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


# Tangents


TANGENTS: dict[str, Callable[[], Tensor]] = {
    "as the output": lambda: numbers(4, 6, grad=False),
    "transposed": lambda: numbers(6, 4, grad=False).t(),
    "expanded": lambda: numbers(1, 1, grad=False).expand(4, 6),
    "expanded row": lambda: numbers(6, grad=False).expand(4, 6),
    "every other": lambda: numbers(8, 12, grad=False)[::2, ::2],
    "with an offset": lambda: numbers(5, 6, grad=False)[1:],
    "needs a gradient": lambda: numbers(4, 6),
}


def tangents_of_any_layout(call: Call) -> Any:
    seen = []
    for make in TANGENTS.values():
        x, y, tangent = numbers(4, 5), numbers(5, 6), make()
        out = call(x, y)
        out.backward(tangent)
        seen.append(facts(out, x.grad, y.grad, tangent))
    return seen


case(matmul)(tangents_of_any_layout)


@case(lambda x, y: (x @ y).t())
def tangents_of_a_transposed_output(call: Call) -> Any:
    return tangents_of_any_layout(lambda x, y: call(x, y).t())


@case(lambda x: nn.functional.conv2d(x, ones(3, 3, 3, 3)).relu())
def tangents_in_another_memory_format(call: Call) -> Any:
    seen = []
    for of_input in (torch.contiguous_format, torch.channels_last):
        for of_tangent in (torch.contiguous_format, torch.channels_last):
            x = numbers(2, 3, 6, 6, grad=False).to(memory_format=of_input).requires_grad_()
            out = call(x)
            out.backward(numbers(2, 3, 4, 4, grad=False).to(memory_format=of_tangent))
            seen.append(facts(out, x.grad))
    return seen


@case(lambda x: (x.sum(), x * 2))
def tangent_of_a_scalar(call: Call) -> Any:
    x = numbers(4)
    call(x)[0].backward()
    return facts(x.grad), error(call(x)[1].backward)


class Half(autograd.Function):
    """Passes its first input on; gives the second no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


@case(three)
def tangents_that_are_none(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    first, second, third = call(x, y)
    Half.apply(second, third).sum().backward()
    x2, y2 = numbers(4), numbers(4)
    first, second, third = call(x2, y2)
    Half.apply(numbers(4), third).sum().backward()
    return facts(x.grad, y.grad, x2.grad, y2.grad, first)


@case(product)
def a_tangent_of_the_wrong_shape(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    return error(lambda: call(x, y).backward(ones(3)))


@case(product)
def a_tangent_of_another_dtype(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    call(x, y).backward(ones(4).double())
    return facts(x.grad, y.grad)


@case(product)
def a_tangent_of_a_subclass(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    out = call(x, y)
    return error(lambda: out.backward(TwoTensor(ones(4), ones(4))))


def pairs(x: Tensor) -> TwoTensor:
    return TwoTensor(x.detach(), x.detach() * 2).requires_grad_(x.requires_grad)


@case(product)
def subclass_of_tensors(call: Call) -> Any:
    x, y = pairs(numbers(4)), pairs(numbers(4))
    out = call(x, y)
    out.backward(pairs(ones(4)))
    parts = [(t.a, t.b) for t in (out.detach(), x.grad, y.grad)]
    failed = error(lambda: call(x, y).backward(ones(4)))
    return facts(parts, out), failed[1].partition("The problematic output")[0]


# Views


def views_of_its_input(x: Tensor) -> tuple[Tensor, ...]:
    return x, x.view(-1), x[1:], x.t(), x.detach(), x.view_as(x), x.sin()


def kinds_of_input() -> Iterator[tuple[Tensor, Tensor]]:
    """A tensor to pass, and the leaf that it comes from."""
    for grad in (False, True):
        leaf = numbers(3, 4, grad=grad)
        yield leaf, leaf
        leaf = numbers(3, 4, grad=grad)
        yield leaf * 2, leaf
        leaf = numbers(4, 4, grad=grad)
        yield leaf[1:], leaf


@case(views_of_its_input)
def outputs_that_alias_the_input(call: Call) -> Any:
    seen = []
    for x, leaf in kinds_of_input():
        outs = call(x)
        seen.append(facts(outs, x, leaf))
        if leaf.requires_grad:
            sum(out.sum() for out in outs if out.requires_grad).backward()
            seen.append(facts(leaf.grad))
    with torch.no_grad():
        seen.append(facts(call(leaf)))
    return seen


@case(views_of_its_input)
def changes_in_place_of_outputs_that_alias_the_input(call: Call) -> Any:
    seen = []
    for at in range(6):
        for x, leaf in kinds_of_input():
            outs = call(x)
            seen.append(outcome(lambda: outs[at].mul_(3)))
            seen.append(facts(outs, x, leaf))
            if leaf.requires_grad:
                seen.append(outcome(lambda: autograd.grad(outs[2].sum() + x.sum(), leaf)))
    return seen


def views_of_one_result(x: Tensor) -> tuple[Tensor, ...]:
    y = x.sin()
    return y, y.view(-1), y[1:], y.t(), y


@case(views_of_one_result)
def outputs_that_alias_each_other(call: Call) -> Any:
    seen = []
    for x, leaf in kinds_of_input():
        outs = call(x)
        seen.append(facts(outs, x))
        outs[2].mul_(3)
        seen.append(facts(outs, x))
        outs[3].add_(1)
        if leaf.requires_grad:
            seen.append(facts(autograd.grad(sum(out.sum() for out in outs), leaf)))
    return seen


@case(lambda x: (x.sin().view(-1), x.cos().t(), x.exp()[1:]))
def views_whose_base_is_gone(call: Call) -> Any:
    seen = []
    for x, leaf in kinds_of_input():
        outs = call(x)
        seen.append(facts(outs, x))
        for out in outs:
            out.mul_(2)
        seen.append(facts(outs))
        if leaf.requires_grad:
            seen.append(facts(autograd.grad(sum(out.sum() for out in outs), leaf)))
    return seen


@case(lambda x: (x.unbind(0), x.sin().unbind(0), x.split(2)))
def several_views_of_one_operation(call: Call) -> Any:
    seen = []
    for x, leaf in kinds_of_input():
        outs = call(x)
        seen.append(facts(outs, x))
        seen += [outcome(lambda: views[0].mul_(2)) for views in outs]
        if leaf.requires_grad:
            seen.append(outcome(lambda: autograd.grad(outs[0][1].sum() + outs[1][1].sum(), leaf)))
    return seen


class Flat(autograd.Function):
    """A view, by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view(3, 4) * 2


@case(lambda x: (Flat.apply(x), x.sin()))
def view_of_an_autograd_function(call: Call) -> Any:
    seen = []
    for x, leaf in kinds_of_input():
        outs = call(x)
        seen.append(facts(outs, x))
        if leaf.requires_grad:
            seen.append(facts(autograd.grad(sum(out.sum() for out in outs), leaf)))
            seen.append(outcome(lambda: call(x)[0].mul_(2)))
    return seen


@case(product)
def changes_in_place_of_outputs(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    out = call(x, y)
    out.mul_(2).add_(x)
    out[1:].zero_()
    out.sum().backward()
    return facts(out, x.grad, y.grad)


@case(lambda x: (x.tanh(), x.exp()))
def changes_in_place_of_saved_outputs(call: Call) -> Any:
    x = numbers(4)
    outs = call(x)
    outs[1].mul_(2)
    return facts(outs), error(lambda: (outs[0] + outs[1]).sum().backward())


@case(product)
def changes_in_place_of_saved_inputs(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    out = call(x, y)
    with torch.no_grad():
        y.add_(1)
    return facts(out, y), error(lambda: out.sum().backward())


class Stashing(autograd.Function):
    """Keeps its input without `save_for_backward`: nobody checks whether that changes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.y = y
        ctx.save_for_backward(x)
        return x * y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (x,) = ctx.saved_tensors
        return grad * ctx.y, grad * x


@case(lambda x, y: Stashing.apply(x, y).sin())
def changes_in_place_of_what_is_saved_unchecked(call: Call) -> Any:
    seen = []
    for at in (0, 1):
        args = numbers(4), numbers(4)
        out = call(*args)
        with torch.no_grad():
            args[at].add_(1)
        seen.append(outcome(lambda: autograd.grad(out.sum(), args)))
    return seen


# Inputs that change


def write(x: Tensor, y: Tensor) -> Tensor:
    x.mul_(y)
    return x.sin() + 1


@case(write)
def written_inputs(call: Call) -> Any:
    seen = []
    for x_grad, y_grad in ((False, False), (True, False), (False, True)):
        leaf, y = numbers(3, 4, grad=x_grad), numbers(3, 4, grad=y_grad)
        for x in (leaf * 1, (leaf * 1)[:], (leaf * 1).t().contiguous().t()):
            before = facts(x)
            out = call(x, y)
            seen.append((before, facts(out, x, x._base, y)))
            if out.requires_grad:
                wanted = [t for t in (leaf, y) if t.requires_grad]
                seen.append(outcome(lambda: autograd.grad(out.sum() + x.sum(), wanted)))
    with torch.no_grad():
        seen.append(facts(call(leaf, y), leaf))
    return seen


@case(write)
def written_leaves(call: Call) -> Any:
    x, y = numbers(4, grad=False), numbers(4, grad=False)
    return facts(call(x, y), x), error(lambda: call(numbers(4), y))


@case(lambda x, y: x.add_(y.sin()).sin())
def an_input_written_and_read_through_another(call: Call) -> Any:
    base = numbers(5, grad=False)
    seen = [facts(call(base[1:], base[:4]), base)]
    for grad in (False, True):
        leaf = numbers(5, grad=grad)
        base = leaf * 1
        out = call(base[3:], base[:2])
        seen.append(facts(out, base))
        if grad:
            seen.append(outcome(lambda: autograd.grad(out.sum() + base.sum(), leaf)))
        else:
            seen.append(facts(call(base, base), base))
    return seen


def write_without_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        x.mul_(2)
    x.detach().add_(1)
    return x.sin()


@case(write_without_grad)
def leaves_written_without_grad(call: Call) -> Any:
    x = numbers(4)
    first = call(x)
    second = call(x)
    seen = facts(first, second, x)
    second.sum().backward()
    return seen, facts(x.grad), outcome(lambda: first.sum().backward())


class Counting(nn.Module):
    """Its buffers change with each call."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(()))
        self.weight = nn.Parameter(ones(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.norm(x) * self.calls * self.weight


@case(Counting)
def written_buffers(call: Call) -> Any:
    seen = []
    for grad in (True, False, True):
        with torch.set_grad_enabled(grad):
            outs = [call(numbers(3, 4, grad=False)) for _ in range(2)]
        seen.append(facts(outs, list(call.buffers())))
        if grad:
            seen += [outcome(lambda: out.square().sum().backward()) for out in reversed(outs)]
            seen.append(gradients_taken(call))
    return seen


# Dynamo breaks the graph at `x.t_()` and `x.set_(y)`; operators called by name get into it.


def transpose_in_place(x: Tensor, y: Tensor) -> Tensor:
    torch.ops.aten.t_.default(x)
    torch.ops.aten.t_.default(y)
    y.mul_(2)
    return x @ y.t()


@case(transpose_in_place)
def inputs_whose_shape_changes(call: Call) -> Any:
    seen = []
    for grad in (False, True):
        leaf = numbers(3, 4, grad=grad)
        x, y = leaf * 1, leaf * 2
        out = call(x, y)
        seen.append(facts(out, x, y))
        if grad:
            seen.append(outcome(lambda: autograd.grad(out.sum() + x.sum() + y.sum(), leaf)))
    return seen


def set_to(x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        torch.ops.aten.set_.source_Tensor(x, y)
    return x * 2


@case(set_to)
def inputs_set_to_another(call: Call) -> Any:
    seen = []
    for grad in (False, True):
        x, y = numbers(3, 4, grad=grad), numbers(3, 4, grad=False)
        out = call(x, y)
        seen.append(facts(out, x, y))
        if grad:
            seen.append(facts(autograd.grad(out.sum(), x, allow_unused=True)))
    return seen


@case(lambda x: (x.add_(1), x.view(-1), x))
def outputs_that_are_a_written_input(call: Call) -> Any:
    seen = []
    for grad in (False, True):
        leaf = numbers(3, 4, grad=grad)
        x = leaf * 1
        outs = call(x)
        seen.append(facts(outs, x))
        outs[1].mul_(2)
        seen.append(facts(outs, x))
        if grad:
            seen.append(facts(autograd.grad(sum(out.sum() for out in outs), leaf)))
    return seen


def only_write(x: Tensor) -> None:
    x.add_(1)


@case(only_write)
def nothing_returned(call: Call) -> Any:
    leaf = numbers(4)
    x = leaf * 1
    call(x)
    return facts(x, autograd.grad(x.sum(), leaf))


# Hooks


@case(three)
def hooks_on_saved_tensors(call: Call) -> Any:
    noted: list[Any] = []

    def pack(t: Tensor) -> Any:
        noted.append(("pack", facts(t)))
        return t.detach().clone()

    def unpack(t: Any) -> Tensor:
        noted.append(("unpack", facts(t)))
        return t * 2

    x, y = numbers(4), numbers(4)
    with saved_tensors_hooks(pack, unpack):
        outs = call(x[:], y)
    noted.append("backward")
    total = sum(out.sum() for out in outs)
    total.backward(retain_graph=True)
    noted.append("again")
    total.backward()
    return noted, facts(x.grad, y.grad)


@case(three)
def hooks_on_saved_tensors_around_the_backward(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    outs = call(x, y)
    with saved_tensors_hooks(lambda t: pytest.fail("packed"), lambda t: pytest.fail("unpacked")):
        torch.autograd.backward(outs, [ones(4)] * 3)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        return facts(x.grad, y.grad, call(x, y))


@case(three)
def save_on_cpu(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    with torch.autograd.graph.save_on_cpu():
        outs = call(x, y)
    sum(out.sum() for out in outs).backward()
    return facts(outs, x.grad, y.grad)


@case(three)
def hooks_on_tensors(call: Call) -> Any:
    noted: list[Any] = []

    def noting(name: str, factor: float | None = None) -> Callable[..., Any]:
        def hook(*grads: Any) -> Any:
            noted.append((name, facts(grads)))
            return grads[0] * factor if factor else None

        return hook

    x, y = numbers(4), numbers(4)
    w = x * 1
    w.retain_grad()
    x.register_hook(noting("leaf", 2))
    w.register_hook(noting("input", 3))
    y.register_post_accumulate_grad_hook(lambda t: noted.append(("accumulated", facts(t, t.grad))))
    outs = call(w, y)
    outs[0].retain_grad()
    outs[1].register_hook(noting("output", 5))
    torch.autograd.graph.register_multi_grad_hook(outs, noting("several"))
    outs[0].grad_fn.register_prehook(noting("before the node"))
    outs[0].grad_fn.register_hook(noting("after the node"))
    sum(out.sum() for out in outs).backward()
    return noted, facts(x.grad, w.grad, y.grad, outs[0].grad)


@case(product)
def hook_that_fails(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    out = call(x, y)
    handle = out.register_hook(lambda grad: 1 / 0)
    failed = error(lambda: out.sum().backward())
    handle.remove()
    out.sum().backward()
    return failed, facts(x.grad, y.grad)


@case(Mlp)
def hooks_on_modules(call: Call) -> Any:
    noted: list[Any] = []

    def noting(name: str) -> Callable[..., None]:
        return lambda module, *args: noted.append((name, type(module).__name__, facts(args)))

    handles = [
        call.register_forward_pre_hook(noting("before")),
        call.register_forward_hook(noting("after")),
        call.register_full_backward_pre_hook(noting("before the backward")),
        call.register_full_backward_hook(noting("after the backward")),
    ]
    x = numbers(2, 4)
    call(x).sum().backward()
    for handle in handles:
        handle.remove()
    return noted, facts(x.grad), gradients_taken(call)


@case(lambda x: (x - x).sqrt())
def anomaly_mode(call: Call) -> Any:
    x = numbers(4)
    with warnings.catch_warnings(record=True) as caught, torch.autograd.detect_anomaly():
        warnings.simplefilter("always")
        out = call(x)
        failed = error(lambda: out.mul(0).sum().backward())
    messages = [str(warning.message) for warning in caught]
    return failed, [(message.splitlines()[0], "out = call(x)" in message) for message in messages]


@case(product)
def set_detect_anomaly_where_nothing_is_wrong(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    with torch.autograd.set_detect_anomaly(True):
        call(x, y).sum().backward()
    return facts(x.grad, y.grad)


# Modes


def watched(x: Tensor, y: Tensor) -> Tensor:
    return watch(watch(x * y, "first").sin() @ y, "second") * 2


@case(watched)
def state_that_operators_run_in(call: Call) -> Any:
    seen = []
    for grad in (True, False):
        for around in (contextlib.nullcontext(), torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16)):
            x, y = numbers(4, 4, grad=grad), numbers(4, 4, grad=False)
            with around:
                out = call(x, y)
            seen.append(facts(out))
            if out.requires_grad:
                for around_backward in (around, torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16)):
                    out = call(x, y)
                    with around_backward:
                        out.backward(out.detach())
                seen.append(facts(x.grad))
    return seen


@case(lambda x, w: watch(x.detach() @ w.detach(), "only") + 1)
def inference_on_tensors_that_need_gradients(call: Call) -> Any:
    w = numbers(4, 4)
    return facts(call(numbers(4, 4), w), w)


@case(watched, answered=True)
def failures_leave_the_state_as_it_was(call: Call) -> Any:
    seen = []
    for grad in (True, False):
        x, y = numbers(4, 4, grad=grad), numbers(4, 4, grad=False)
        call(x, y)
        for what in ("first", "second", "second's gradient") if grad else ("first", "second"):
            FAIL.append(what)
            try:
                seen.append((error(lambda: call(x, y).sum().backward()), ambient()))
            finally:
                FAIL.clear()
        seen.append(facts(call(x, y)))
    return seen


def grad_modes_inside(x: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        y = x.sin()
    with torch.enable_grad():
        z = watch(x.cos(), "inside")
    return y, z, y * z


@case(grad_modes_inside)
def grad_mode_by_turns_and_inside(call: Call) -> Any:
    seen = []
    for mode in (torch.enable_grad, torch.no_grad, torch.enable_grad):
        x = numbers(4)
        with mode():
            outs = call(x)
        seen.append(facts(outs))
        sum(out.sum() for out in outs if out.requires_grad).backward()
        seen.append(facts(x.grad))
    return seen


def switch_grad_off(x: Tensor) -> Tensor:
    y = x.sin()
    torch.set_grad_enabled(False)
    return y


@case(switch_grad_off)
def grad_mode_changed_for_good(call: Call) -> Any:
    x = numbers(4)
    out = call(x)
    off = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    out.sum().backward()
    return off, facts(out, x.grad)


def autocast_inside_too(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    first = x @ y
    with torch.autocast(DEVICE, enabled=False):
        second = x @ y
    with torch.autocast(DEVICE, torch.bfloat16):
        third = x @ y
    return first, second, third, watch(x, "cast")


@case(autocast_inside_too)
def autocast_by_turns_and_inside(call: Call) -> Any:
    seen = []
    for around in (contextlib.nullcontext(), torch.autocast(DEVICE, torch.bfloat16), contextlib.nullcontext()):
        for around_backward in (contextlib.nullcontext(), torch.autocast(DEVICE, torch.bfloat16)):
            x, y = numbers(4, 4), numbers(4, 4)
            with around:
                outs = call(x, y)
            with around_backward:
                torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
            seen.append(facts(outs, x.grad, y.grad))
    return seen


@case(three, answered=True)
def inference_mode(call: Call) -> Any:
    x, y = numbers(4), numbers(4, grad=False)
    with torch.inference_mode():
        inside = numbers(4, grad=False)
        outs = [call(x, y), call(inside, y)]
        state = [t.is_inference() for t in tree_leaves(outs)]
        seen = facts(outs)
    return state, seen, outcome(lambda: call(x, inside)), outcome(lambda: call(x, y)[0].backward(inside))


@case(views_of_its_input)
def views_in_inference_mode(call: Call) -> Any:
    x = numbers(3, 4)
    with torch.inference_mode():
        outs = call(x)
        return facts(outs, x), [t.is_inference() for t in outs]


class Noting(TorchDispatchMode):
    """Notes the operators that reach the dispatcher."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        LOG.append(str(func))
        return func(*args, **kwargs or {})


@case(product)
def dispatch_mode_around_the_call(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    call(x, y)
    with Noting():
        out = call(x, y)
        out.sum().backward()
    return facts(out, x.grad, y.grad)


@contextlib.contextmanager
def deterministic(mode: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(mode)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@case(product)
def deterministic_algorithms_asked_for_after_the_forward(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    call(x, y).sum().backward()
    out = call(x, y)
    with deterministic(True):
        failed = error(lambda: out.sum().backward(retain_graph=True))
        call(x, y).sum().backward()
        other = call(x, y)
    other.sum().backward()
    out.sum().backward()
    return failed, facts(x.grad, y.grad)


@case(
    saves_results,
    lambda: functorch_config.patch(donated_buffer=True),
    differs="with stock a backward cannot keep its graph if its first did not; here it can",
)
def donated_buffers(call: Call) -> Any:
    x = numbers(4, 4)
    call(x).sum().backward()
    out = call(x)
    seen = [outcome(lambda: out.sum().backward(retain_graph=retain)) for retain in (True, False)]
    return seen, facts(x.grad)


def test_any_backward_may_keep_its_graph() -> None:
    def gradients(call: Call) -> list[Tensor]:
        torch.manual_seed(0)
        x = numbers(4, 4)
        call(x).sum().backward()
        out = call(x).sum()
        assert x.grad is not None
        return [x.grad, *(autograd.grad(out, x, retain_graph=keep)[0] for keep in (True, True, False))]

    frame_swap.configure(when="manual")
    compiled = torch.compile(saves_results, backend="frame_swap")
    with functorch_config.patch(donated_buffer=True):
        gradients(compiled)
        wait_for_all()
        (region,) = swap_all()
        calls = region.pair_calls
        assert_same(gradients(compiled), gradients(saves_results), "the swap")
    assert region.pair_calls == calls


# Random numbers


def dropped(x: Tensor) -> Tensor:
    return nn.functional.dropout(x.sin(), 0.5) * torch.rand_like(x)


@case(dropped)
def random_numbers(call: Call) -> Any:
    x = numbers(64)
    out = call(x)
    out.sum().backward()
    return facts(out, x.grad, torch.rand(4, device=DEVICE))


@case(dropped, lambda: inductor_config.patch(fallback_random=True))
def random_numbers_of_eager(call: Call) -> Any:
    return random_numbers(call)


@case(dropped)
def checkpoint_around_the_call(call: Call) -> Any:
    seen = []
    for reentrant in (True, False):
        for preserve in (True, False):
            x = numbers(64)
            out = checkpoint(call, x, use_reentrant=reentrant, preserve_rng_state=preserve)
            out.sum().backward()
            seen.append(facts(out, x.grad))
    return seen


@case(lambda x: checkpoint(dropped, x, use_reentrant=False), lambda: inductor_config.patch(fallback_random=True))
def checkpoint_inside(call: Call) -> Any:
    return random_numbers(call)


# Effects


@custom_op("steady::effect", mutates_args=())
def effect(x: Tensor, what: str) -> None:
    LOG.append((what, x.tolist()))


effect.register_fake(lambda x, what: None)
effect.register_effect(EffectType.ORDERED)


def with_effects(x: Tensor) -> Tensor:
    effect(x.detach(), "before")
    y = x.sin()
    effect(y.detach(), "after")
    return y


@case(with_effects)
def effects_in_order(call: Call) -> Any:
    x = numbers(4)
    out = call(x)
    out.sum().backward()
    with torch.no_grad():
        return facts(out, x.grad, call(x))


def printing(x: Tensor) -> Tensor:
    torch._higher_order_ops.print("{} then", 7)
    return x.sin()


def test_prints_as_with_stock(capsys: pytest.CaptureFixture[str]) -> None:
    def scenario(call: Call) -> str:
        x = numbers(4)
        call(x).sum().backward()
        with torch.no_grad():
            call(x)
        return capsys.readouterr().out

    one = Case(scenario, printing)
    expected, actual = observe(one, "inductor"), observe(one, "frame_swap")
    assert expected[0] == "7 then\n" * 2
    assert actual[0] == expected[0]


# Shapes


@case(lambda x: (x * x.shape[0]).cumsum(0)[1:], dynamic=True)
def sizes_that_the_backward_needs(call: Call) -> Any:
    seen = []
    for n in (5, 3, 8):
        x = numbers(n, n + 1)
        out = call(x)
        out.backward(numbers(n + 1, n - 1, grad=False).t())
        seen.append(facts(out, x.grad))
    return seen


@case(lambda x: (x.sin(), x.t(), x.exp().view(-1), x.shape[0] * 2), dynamic=True)
def sizes_that_outputs_pass_on(call: Call) -> Any:
    seen = []
    for n in (5, 3, 8):
        x = numbers(n, 4)
        outs = call(x)
        call(outs[0])[0].sum().backward()
        seen.append(facts(outs, x.grad))
    return seen


@case(product)
def sizes_that_change_by_themselves(call: Call) -> Any:
    seen = []
    for n in (5, 3, 8, 0, 1):
        x, y = numbers(n), numbers(n)
        out = call(x, y)
        out.sum().backward()
        seen.append(facts(out, x.grad, y.grad))
    return seen


# Transforms


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


# Memory


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """What is freed within the block is freed because nothing refers to it any more."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def keeps_three(x: Tensor) -> Tensor:
    for _ in range(3):
        x = watch(x * 2, "kept")
        x = x * x
    return x


@case(keeps_three)
def what_is_saved_is_freed_as_the_backward_goes(call: Call) -> Any:
    seen = []
    for backward in (True, False):
        WATCHED.clear()
        with no_collection():
            out = call(numbers(4))
            seen.append(freed())
            if backward:
                out.sum().backward()
            seen.append(freed())
            del out
            seen.append(freed())
    return seen


@case(lambda x: watch(watch(x.sin(), "first").cos(), "second"))
def what_the_caller_gives_up_is_freed(call: Call) -> Any:
    seen = []
    for grad in (True, False):
        WATCHED.clear()
        with no_collection():
            args = [numbers(4, grad=grad) * 1]
            WATCHED.append(StorageWeakRef(args[0].untyped_storage()))
            out = call(args.pop())
            WATCHED.append(StorageWeakRef(out.untyped_storage()))
            seen.append(freed())
            del out
            seen.append(freed())
    return seen


def in_two_graphs(x: Tensor) -> Tensor:
    x = watch(x.sin(), "kept")
    torch._dynamo.graph_break()
    return watch(watch(x.cos(), "kept").exp(), "last")


@case(in_two_graphs)
def what_the_frame_is_done_with_is_freed(call: Call) -> Any:
    seen = []
    for grad in (True, False):
        WATCHED.clear()
        with no_collection():
            out = call(numbers(4, grad=grad))
            seen.append(freed())
            del out
            seen.append(freed())
    return seen


def peak(call: Callable[[], Any]) -> int:
    """The most bytes that `call` has allocated at one time."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    assert events
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


def deep(x: Tensor) -> tuple[Tensor, ...]:
    outs = []
    for _ in range(4):
        x = (x @ x.t()).tanh() @ x
        outs += [x.exp(), x.detach() + 1]
    return tuple(outs)


@pytest.mark.parametrize("grad", [True, False])
def test_peak_memory_is_no_more_than_with_stock(grad: bool) -> None:
    def scenario(call: Call) -> int:
        x = numbers(64, 64, grad=grad)

        def run() -> None:
            outs = call(x)
            if grad:
                sum(out.square().sum() for out in outs).backward()

        with no_collection():
            return peak(run)

    stocks, ours = (observe(Case(scenario, deep), backend)[0] for backend in ("inductor", "frame_swap"))
    assert ours <= stocks


# Threads, recursion, profiler


@case(product)
def several_threads(call: Call) -> Any:
    x = [torch.linspace(i, i + 1, 64, device=DEVICE).requires_grad_() for i in range(4)]
    y = torch.linspace(0, 1, 64, device=DEVICE).requires_grad_()
    autograd.grad(
        call(x[0], y).sum(), (x[0], y)
    )  # stock compiles a backward when it is first called, and not in threads
    outs: list[Any] = [None] * 4
    barrier = threading.Barrier(4)

    def run(at: int) -> None:
        try:
            for _ in range(50):
                autograd.grad(call(x[at], y).sum(), (x[at], y))
            outs[at] = call(x[at], y)
        except BaseException:
            barrier.abort()
            raise
        barrier.wait()
        outs[at - 1].sum().backward(inputs=[x[at - 1]])  # another thread's graph

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    return facts(outs, [t.grad for t in x])


@case(lambda x: x.sin() * 1.5)
def a_long_chain(call: Call) -> Any:
    x = numbers(4)
    out = x
    for _ in range(2000):
        out = call(out)
    out.sum().backward()
    return facts(out, x.grad)


class Again(autograd.Function):
    """Runs a forward and a backward of `call` in its own backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Call, depth: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.call, ctx.depth = call, depth
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            out = ctx.call(x, x)
            if ctx.depth:
                out = Again.apply(out, ctx.call, ctx.depth - 1)
            out.backward(grad)
        return x.grad, None, None


@case(product)
def backwards_within_backwards(call: Call) -> Any:
    x = numbers(4)
    Again.apply(call(x, x), call, 80).sum().backward()
    return facts(x.grad)


@case(product)
def the_depth_at_which_recursion_ends(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    call(x, y)

    def descend(depth: int) -> Tensor:
        return call(x, y) if depth == 0 else descend(depth - 1)

    return facts(descend(900))


@case(product)
def names_in_a_profile(call: Call) -> Any:
    x, y = numbers(4), numbers(4)
    call(x, y)
    with torch.profiler.profile() as profile:
        call(x, y).sum().backward()
        with torch.no_grad():
            call(x, y)
    wanted = ("Torch-Compiled Region", "CompiledFunction", "autograd::engine::evaluate_function")
    return sorted(event.name for event in profile.events() if event.name.startswith(wanted))
