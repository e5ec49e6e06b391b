"""`explain(f)(*args)` says ahead what the report says afterwards, and leaves nothing behind."""

from __future__ import annotations

import gc
import itertools
import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faulty
import pytest
import torch
from helpers import codes_called, live
from torch import nn

import frame_swap
from frame_swap.internals.dynamo import cache_entries


def f(x: torch.Tensor) -> torch.Tensor:
    return (x.sin() @ x).relu()


def broken(x: torch.Tensor) -> torch.Tensor:
    y = f(x)
    torch._dynamo.graph_break()
    return x.cos() + y


def chunks(x: torch.Tensor) -> torch.Tensor:
    return torch.chunk(x, 3)[0] + 1


@pytest.mark.fast
def test_each_graph_is_explained_in_order() -> None:
    frame_swap.configure(first="graph")
    first, second = explained = frame_swap.explain(broken)(torch.randn(4, 4))
    assert "broken" in first.frame
    assert "resume" in second.frame
    assert first.eager == second.eager == "graph"
    assert first.shipped_bytes is not None
    assert "2 graphs; nothing was compiled" in str(explained)
    assert live(frame_swap.report()) == []


@pytest.mark.fast
def test_late_guards_are_those_of_the_compile() -> None:
    frame_swap.configure(first="graph")
    (ahead,) = frame_swap.explain(chunks, dynamic=True)(torch.randn(7, 4))
    torch.compile(chunks, backend="frame_swap", dynamic=True)(torch.randn(7, 4))
    (region,) = live(frame_swap.wait())
    (expected,), (told,) = region.late_guards, ahead.late_guards
    for rows, columns in itertools.product(range(2, 13), (2, 4, 5)):
        assert holds(told, rows, columns) == holds(expected, rows, columns)
    assert holds(told, 7, 4)
    assert not holds(told, 8, 4)


@pytest.mark.fast
def test_with_the_pair_guards_of_its_trace_are_the_frames_own() -> None:
    frame_swap.configure(first="pair")
    (ahead,) = frame_swap.explain(chunks, dynamic=True)(torch.randn(7, 4))
    torch.compile(chunks, backend="frame_swap", dynamic=True)(torch.randn(7, 4))
    (region,) = live(frame_swap.wait())
    assert ahead.late_guards == region.late_guards == ()


def holds(guard: str, rows: int, columns: int) -> bool:
    """Whether a late guard holds; sympy writes the same one in several ways."""
    first, second = sorted(set(re.findall(r"s[0-9]+", guard)), key=guard.index)
    names = {"Eq": operator.eq, "Ne": operator.ne, first: rows, second: columns}
    return bool(eval(guard, names))


def test_what_compiles_in_the_foreground_is_said_with_the_reason() -> None:
    table = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    (ahead,) = frame_swap.explain(lambda x: x * 2)(table)
    torch.compile(lambda x: x * 2, backend="frame_swap")(table)
    (region,) = live(frame_swap.wait())
    assert region.state is frame_swap.State.FOREGROUND
    assert ahead.foreground == region.reason != ""
    assert ahead.shipped_bytes is None


def test_why_the_pair_would_serve_is_said(no_warnings: None) -> None:
    def checkpointed(x: torch.Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False)

    x = torch.randn(4, 4, requires_grad=True)
    (ahead,) = frame_swap.explain(checkpointed)(x)
    torch.compile(checkpointed, backend="frame_swap")(x)
    (region,) = live(frame_swap.wait())
    assert (ahead.eager, ahead.eager_reason) == (region.eager, region.eager_reason)
    assert ahead.eager == "pair"


def test_what_the_store_has_is_said(run_program: Callable[..., Any], tmp_path: Path) -> None:
    program = """
import torch, frame_swap

def g(x):
    return x.sin() * 3

x = torch.randn(3)
(before,) = frame_swap.explain(g)(x)
torch.compile(g, backend="frame_swap")(x)
frame_swap.wait()
(after,) = frame_swap.explain(g)(x)
print(before.store, after.store, sep="; ")
"""
    ended = run_program(program, FRAME_SWAP_STORE=str(tmp_path))
    assert ended.stdout.strip() == "to be kept for the next run; found"


@pytest.mark.fast
def test_no_entry_stays_and_installed_code_does() -> None:
    compiled, x = torch.compile(f, backend="frame_swap"), torch.randn(4, 4)
    frame_swap.explain(f)(x)
    assert cache_entries(f.__code__) == []
    compiled(x)
    frame_swap.wait()
    (code,) = (entry.code for entry in cache_entries(f.__code__))

    def call() -> None:
        compiled(x)

    before = codes_called(call)
    frame_swap.explain(compiled)(x)
    assert next(iter(cache_entries(f.__code__))).code is code  # before one that fits no call
    assert codes_called(call) == before


def test_a_module_is_called_once_and_returns_nothing_of_its_graphs() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x * self.calls

    module = Counting()
    frame_swap.explain(module)(torch.ones(3))
    assert module.calls == 1


def test_an_error_of_the_call_is_the_callers_and_leaves_no_entry() -> None:
    def raises(x: torch.Tensor) -> torch.Tensor:
        return faulty.fragile(x.sin())

    faulty.raising = ValueError("mine")
    try:
        with pytest.raises(ValueError, match="mine"):
            frame_swap.explain(raises)(torch.ones(3))
    finally:
        faulty.raising = None
    gc.collect()
    assert cache_entries(raises.__code__) == []
