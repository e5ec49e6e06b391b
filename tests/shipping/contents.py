"""A program that prints the SHA-256 of the content of each parcel that its functions make, as JSON.

    python contents.py [other]

With the argument, the process has compiled other things before, and its thread-local settings were changed and
changed back: the digests are the same.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from frame_swap.shipping import parcel

digests: dict[str, list[str]] = {}

# What the functions and definitions below read; `changed` changes one at a time.
READ: dict[str, Any] = {"function": torch.tanh, "number": 2, "table": [1.0, 2.0, 3.0]}
FACTOR = 1.0
RATE = 2
STRICT = True


def capture(name: str, function: Callable[..., Any], *calls: tuple[Any, ...], **keywords: Any) -> None:
    """Compile `function`, call it with each of `calls`, and keep the digests under `name`."""
    options = keywords.pop("options", {})

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        compile_id = str(gm.meta.get("dynamo_compile_id"))
        content = parcel.pack(gm, inputs, options, compile_id).content
        digests.setdefault(name, []).append(hashlib.sha256(content).hexdigest())
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, **keywords)
    for arguments in calls:
        compiled(*arguments)


def static(x: Tensor, y: Tensor) -> Tensor:
    z: Tensor = x.sin() + y * READ["number"] + torch.tensor(READ["table"])
    return READ["function"](z)


def dynamic(x: Tensor, y: Tensor) -> Tensor:
    n = x.shape[0] + y.shape[1]
    if x.shape[0] % 2 == 0 and y.shape[0] > 3:
        return x.reshape(2, -1).sum(1).repeat(n)[: y.shape[1]] + y.sum(0)
    return torch.cat([x.flatten(), y.flatten()]).view(n, -1)


def unbacked(x: Tensor) -> Tensor:
    k = x.sum().to(torch.int64).item()
    torch._check(k >= 2)
    torch._check(k <= 100)
    return torch.zeros(k, 3).sum(0) + x[:3]


def higher_order(x: Tensor) -> Tensor:
    def inner(t: Tensor) -> Tensor:
        return t.sin() @ t

    y: Tensor = torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False)
    return torch.cond(y.sum() > 0, lambda t: t + 1, lambda t: t - 1, (y,))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))
        self.norm = nn.BatchNorm1d(8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x.flatten(0, 1)).sum()


@torch.library.custom_op("contents::scaled", mutates_args=())
def scaled(x: Tensor, how: str) -> Tensor:
    return x * 2


@torch.library.custom_op("contents::copied", mutates_args=())
def copied(x: Tensor) -> Tensor:
    return x.clone()


class Rule:
    """An object of a class that travels by value, with sets in it."""

    allowed = frozenset(("half", "double", "triple", "quadruple"))
    seen: set[str] = {"half", "double", "triple", "quadruple"}  # noqa: RUF012 - a set is what is to be pickled

    def __call__(self, grad: Tensor, how: str) -> Tensor:
        self.seen.add(how)
        return grad * RATE


RULE = Rule()


@scaled.register_fake
def _(x: Tensor, how: str) -> Tensor:
    if STRICT and how not in {"half", "double", "triple", "quadruple"}:
        raise ValueError(how)
    return torch.empty_like(x)


@copied.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.how = inputs[1]


def scaled_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return copied(RULE(grad, ctx.how) / FACTOR), None


scaled.register_autograd(scaled_backward, setup_context=remember)


@contextmanager
def changed(where: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    usual, where[name] = where[name], value
    yield
    where[name] = usual


def compile_other_things() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 5))
    for size in (3, 4, 9):
        torch.compile(model, backend="aot_eager")(torch.randn(size, 5)).sum().backward()
    torch.compile(lambda x: x[::2].exp() * x.shape[0], backend="aot_eager", dynamic=True)(torch.randn(8, 3))
    torch.compile(dynamic, backend="eager", dynamic=True)(torch.randn(6, 4), torch.randn(4, 5))
    with torch._inductor.config.patch(max_autotune=True), torch._dynamo.config.patch(recompile_limit=3):
        pass
    for name in dir(torch._inductor.config):  # PyTorch counts some settings as changed once they are read
        getattr(torch._inductor.config, name)


def changes() -> None:
    """One function and one operator, each time with one thing changed."""
    x, y = torch.randn(4, 3), torch.randn(3)
    capture("as it is", static, (x, y))
    capture("an option", static, (x, y), options={"size_asserts": False})
    capture("another option", static, (x, y), options={"size_asserts": True})
    capture("a dtype", static, (x.double(), y))
    capture("a size", static, (torch.randn(5, 3), y))
    capture("a stride", static, (torch.randn(3, 4).T, y))
    capture("a gradient", static, (x.clone().requires_grad_(), y))
    for name, value in (("function", torch.cos), ("number", 3), ("table", [1.0, 2.0, 3.5])):
        with changed(READ, name, value):
            capture(f"a {name}", static, (x, y))
    with torch._inductor.config.patch(epilogue_fusion=False):
        capture("a config", static, (x, y))
    with torch._functorch.config.patch(activation_memory_budget=0.5):
        capture("a config of functorch", static, (x, y))
    with torch.no_grad():
        capture("grad mode", static, (x, y))
    torch.set_float32_matmul_precision("high")
    capture("matmul precision", static, (x, y))
    torch.set_float32_matmul_precision("highest")
    for backend in (torch.backends.cuda, torch.backends.mkldnn):
        backend.matmul.fp32_precision = "none"  # as it was: "highest" has made it "ieee"
    capture("back again", static, (x, y))

    def call(x: Tensor) -> Any:
        return torch.ops.contents.scaled(x, "half") * 2

    capture("an operator", call, (x,))
    for name, value in (("FACTOR", 3.0), ("RATE", 3), ("STRICT", False)):
        with changed(globals(), name, value):
            capture(f"an operator that reads another {name}", call, (x,))


def main() -> None:
    if "other" in sys.argv:
        compile_other_things()
    torch._dynamo.config.reorderable_logging_functions = {"one", "two", "three", "four", "five", "six"}  # a set
    changes()
    capture("dynamic", dynamic, *((torch.randn(n, 4), torch.randn(4, n - 1)) for n in (6, 7)), dynamic=True)
    capture("in time dynamic", dynamic, *((torch.randn(n, 4), torch.randn(4, n - 2)) for n in (6, 8)))
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        capture("unbacked", unbacked, (torch.ones(3),))
    capture("higher order", higher_order, (torch.randn(4, 4, requires_grad=True),))
    capture("autograd function", lambda x: Square.apply(x).sum(), (torch.randn(4, requires_grad=True),))
    capture("a view", lambda x: x + 1, (torch.randn(4, 4)[1:],))
    capture("numpy", lambda x: torch.from_numpy(x.numpy() * 2), (torch.randn(4),))
    model, tokens = Model(), torch.arange(12).reshape(3, 4)
    capture("training", model, (tokens,))
    capture("training, dynamic", model, (tokens,), dynamic=True)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        capture("autocast", model, (tokens,))
    print(json.dumps(digests))


if __name__ == "__main__":
    main()
