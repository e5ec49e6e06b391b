"""A program that tests run twice with one store: `python program.py NAME`.

It calls what NAME says until all compiled code is in, and prints as JSON what has happened and a digest of each
result and gradient.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from program import test_models

import frame_swap
from frame_swap.farm.workers import workers
from frame_swap.ui import demo
from store import operator_of_a_module

traces = 0
"""How many times AOTAutograd has traced in this process."""


def count_traces() -> None:
    import torch._functorch.aot_autograd as aot

    usual = aot.create_aot_state

    def counted(*args: Any, **kwargs: Any) -> Any:
        global traces
        traces += 1
        return usual(*args, **kwargs)

    aot.create_aot_state = counted


Call = Callable[[], Any]


def compiled(target: Any, **keywords: Any) -> Any:
    return torch.compile(target, backend="frame_swap", **keywords)


def model(build: test_models.Build, train: bool) -> Callable[[], list[Call]]:
    def make() -> list[Call]:
        module, inputs = build()
        module.train(train)
        step = compiled(module)

        def call() -> Any:
            torch.manual_seed(1)
            if not train:
                with torch.no_grad():
                    return tree_leaves(step(**inputs()))
            module.zero_grad()
            loss = tree_leaves(step(**inputs()))[0]
            loss.backward()
            return [loss, *(p.grad for p in module.parameters() if p.grad is not None)]

        return [call]

    return make


def function(target: Callable[..., Any], *inputs: tuple[Any, ...], **keywords: Any) -> Callable[[], list[Call]]:
    """Calls with each of `inputs`, all of which take gradients."""

    def make() -> list[Call]:
        run = compiled(target, **keywords)

        def call_with(given: tuple[Any, ...]) -> Call:
            def call() -> Any:
                arguments = [x.clone().requires_grad_() if isinstance(x, Tensor) else x for x in given]
                out = run(*arguments)
                leaves = [x for x in arguments if isinstance(x, Tensor)]
                return [out, *torch.autograd.grad(out.sum(), leaves)]

            return call

        return [call_with(given) for given in inputs]

    return make


def breaks(x: Tensor) -> Tensor:
    y = x.sin() * 2
    torch._dynamo.graph_break()
    z = y.exp()
    torch._dynamo.graph_break()
    return z + x


def late(x: Tensor) -> Tensor:
    """AOTAutograd's trace adds a guard on the size."""
    return torch.cat([chunk.sum().reshape(1) for chunk in x.chunk(4)]) * x.shape[0]


@torch.library.custom_op("store::of_main", mutates_args=())
def of_main(x: Tensor, by: float) -> Tensor:
    return x * by


@of_main.register_fake
def _(x: Tensor, by: float) -> Tensor:
    return torch.empty_like(x)


of_main.register_autograd(lambda ctx, grad: (grad * 3, None), setup_context=lambda ctx, inputs, output: None)


def takes_operators(x: Tensor) -> Tensor:
    return cast(Tensor, of_main(operator_of_a_module.of_a_module(x, 2.0).sin(), 3.0))


def condition(x: Tensor) -> Tensor:
    """A graph that the pair serves better."""
    return cast(Tensor, torch.cond(x.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (x,)))


def demos() -> list[Call]:
    module = demo.CharTransformer(length=16)
    step = compiled(module)

    def call() -> Any:
        module.zero_grad()
        torch.manual_seed(1)
        tokens = torch.randint(demo.UNKNOWN, (2, 16))
        loss = nn.functional.cross_entropy(step(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        return [loss, *(p.grad for p in module.parameters())]

    return [call]


def opted_in() -> list[Call]:
    torch.manual_seed(0)
    module = frame_swap.opt_in(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 2)))

    def call() -> Any:
        module.zero_grad()
        out = module(torch.ones(4, 8))
        out.sum().backward()
        return [out, *(p.grad for p in module.parameters())]

    return [call]


x = torch.linspace(-1, 1, 24)
PROGRAMS: dict[str, Callable[[], list[Call]]] = {
    **{
        f"{build.__name__}, {'training' if train else 'inference'}": model(build, train)
        for build in (test_models.bert, test_models.gpt2, test_models.vit, test_models.our_own)
        for train in (False, True)
    },
    "the demo": demos,
    "opt_in": opted_in,
    "graph breaks": function(breaks, (x,)),
    "dynamic shapes and late guards": function(late, (x[:8],), (x[:12],), (x[:7],), dynamic=True),
    "operators": function(takes_operators, (x,)),
    "floats that change": function(lambda x, by: x * by, (x, 2.5), (x, 3.5), dynamic=True),
    "a conditional": function(condition, (x,)),
}


def digest(values: Any) -> str:
    parts = [value.detach().contiguous().numpy().tobytes() for value in tree_leaves(values)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def main() -> None:
    warnings.simplefilter("error", frame_swap.FrameSwapWarning)
    count_traces()
    torch.manual_seed(0)
    calls = PROGRAMS[sys.argv[1]]()
    results = [[digest(call()) for call in calls]]
    first = frame_swap.report().as_dict()["regions"]
    started, traced, captured = len(workers.pids()), traces, counters["stats"]["unique_graphs"]
    frame_swap.wait()
    results.append([digest(call()) for call in calls])
    frame_swap.wait()
    last = frame_swap.report().as_dict()["regions"]
    told = {"first": first, "workers": started, "traces": traced, "captures": captured}
    print(json.dumps({**told, "results": results, "last": last}))


if __name__ == "__main__":
    main()
