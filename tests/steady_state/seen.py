"""Observations: facts about tensors, errors, the thread's state, and a log of operator calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import DEVICE
from torch import Tensor
from torch.library import custom_op
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_leaves, tree_map

Call = Callable[..., Any]


def facts(*tree: Any) -> Any:
    """`tree` with each tensor replaced by a dictionary of its observable properties."""
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
    """An identifier of a tensor's memory, valid as long as the memory is."""
    return (tensor.a if isinstance(tensor, TwoTensor) else tensor).untyped_storage()._cdata


def names(node: Any) -> Any:
    """Names of an autograd node and of the next nodes of its backward."""
    if node is None:
        return None
    return node.name(), type(node).__name__, tuple(n and n.name() for n, _ in node.next_functions)


def error(call: Callable[[], Any]) -> tuple[str, str]:
    """Type and message of the error that `call` raises; fail if it raises none."""
    try:
        call()
    except Exception as raised:
        return type(raised).__name__, str(raised).partition("\nException raised from")[0]
    pytest.fail("stock raises here")


def outcome(call: Callable[[], Any]) -> Any:
    """Facts about the result of `call`, or type and message of its error."""
    try:
        return facts(call())
    except Exception as raised:
        return type(raised).__name__, str(raised).partition("\nException raised from")[0]


def modes() -> dict[str, bool]:
    """This thread's modes, as public functions of torch tell them."""
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled(DEVICE),
    }


def ambient() -> dict[str, Any]:
    """This thread's state that wrappers change during a call."""
    return {
        **modes(),
        "view replay": torch._C._is_view_replay_enabled(),
        "hooks disabled": torch._C._autograd._saved_tensors_hooks_get_disabled_error_message(),
    }


LOG: list[Any] = []
"""Calls of operators and hooks, in order."""

WATCHED: list[StorageWeakRef] = []
"""References to memory; `freed` tells which of it is gone."""


def freed() -> list[bool]:
    return [ref.expired() for ref in WATCHED]


def note(what: str) -> None:
    LOG.append((what, modes(), freed()))


@custom_op("steady::watch", mutates_args=())
def watch(x: Tensor, what: str) -> Tensor:
    """A copy of `x`; if `what` is "kept", its memory is watched. Logs its calls and those of its gradient."""
    note(what)
    if FAIL and what == FAIL[0]:
        raise ArithmeticError(f"{what} failed")
    result = x.clone()
    if what == "kept":
        WATCHED.append(StorageWeakRef(result.untyped_storage()))
    return result


FAIL: list[str] = []
"""Empty, or the `what` of the call of `watch` that shall fail."""

watch.register_fake(lambda x, what: torch.empty_like(x))


def _watch_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
    ctx.what = inputs[1]


watch.register_autograd(
    lambda ctx, grad: (watch(grad, f"{ctx.what}'s gradient"), None), setup_context=_watch_context
)
