"""Random numbers and checkpoints that repeat them."""

from __future__ import annotations

from typing import Any

import torch
from helpers import DEVICE
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.utils.checkpoint import checkpoint

from .harness import Cases
from .seen import Call, facts
from .subjects import numbers

case = Cases()


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


test_is_as_with_stock = case.test
