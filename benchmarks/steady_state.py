"""What a call costs once everything is compiled: microseconds, most of them wrappers where graphs are tiny.

    python -m benchmarks.steady_state [--rounds 21] [--milliseconds 40]

Four cases. Tiny: `(x + y).relu()` as inference (`no_grad`) and `(x * y).sin().sum()` as training (forward and
backward, no optimizer), on 8 floats; and a 2-layer BERT as either. Five arms: eager, stock `torch.compile`,
`torch.compile` with frame_swap after its swap, the same by `frame_swap.opt_in` (for modules with
`static_module=True`), and Inductor's `call` alone: the generated functions for forward and backward, called by
hand with the inputs that stock gave them. That is the least that any wrapper around the same code can reach; it
checks no guards and reads no parameters.

All in one process, on one thread, so that the arms differ in overhead alone. In each round the arms take
turns, in random order; a figure is the median over the rounds, a ratio the median of the rounds' own ratios.
Writes a JSON file and a picture; prints a table.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import frame_swap
from frame_swap import State

from . import models, output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS = ("eager", "inductor", "frame_swap", "opt_in", "call")
RATIOS = (("frame_swap", "inductor"), ("opt_in", "inductor"), ("opt_in", "eager"), ("opt_in", "call"))
"""Which arms are compared with which."""

Call = Callable[..., Tensor]
Rounds = dict[str, list[float]]
"""Microseconds a call in each round, by arm."""


class Case(NamedTuple):
    """One graph: what is compiled, what it is called with, and with respect to what it is differentiated."""

    function: Call
    args: tuple[Tensor, ...]
    wrt: tuple[Tensor, ...] = ()

    @property
    def trains(self) -> bool:
        return bool(self.wrt)


def cases(device: str) -> dict[str, Case]:
    """The graphs by name."""

    def vector(trains: bool) -> Tensor:
        return torch.randn(8, device=device, requires_grad=trains)

    def bert(trains: bool) -> torch.nn.Module:
        return models.make("bert-tiny", trains, device).model

    ids = torch.randint(1000, (2, 32), device=device)
    a, b, trained = vector(True), vector(True), bert(True)
    return {
        "tiny inference": Case(lambda x, y: (x + y).relu(), (vector(False), vector(False))),
        "tiny training": Case(lambda x, y: (x * y).sin().sum(), (a, b), (a, b)),
        "bert-tiny inference": Case(bert(False), (ids,)),
        "bert-tiny training": Case(trained, (ids,), tuple(trained.parameters())),
    }


# --- The arms ---


def through(call: Call, case: Case, tangent: Tensor | None) -> Callable[[], object]:
    """What an arm runs once: `call`, and its backward where the case trains."""
    if tangent is None:
        return lambda: call(*case.args)
    return lambda: torch.autograd.grad(call(*case.args), case.wrt, tangent, allow_unused=True)


class Calls:
    """Inductor's generated functions for one case, with the inputs of their first run, in that order."""

    def __init__(self) -> None:
        self.seen: list[tuple[Callable[[list[Any]], Any], list[Any]]] = []

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Note what compiled graphs run within the block."""
        from torch._inductor.output_code import CompiledFxGraph

        run_graph = CompiledFxGraph.__call__

        def run_noted(graph: CompiledFxGraph, inputs: list[Any]) -> Any:
            if graph.current_callable is not None:
                bare = [value.detach() if isinstance(value, Tensor) else value for value in inputs]
                self.seen.append((graph.current_callable, bare))
            return run_graph(graph, inputs)

        with mock.patch.object(CompiledFxGraph, "__call__", run_noted):
            yield

    def run(self, tangent: Tensor | None) -> Callable[[], object]:
        """What the arm runs once; the backward gets what its forward saved, as in AOTAutograd."""
        if tangent is None:
            [(call, inputs)] = self.seen
            return lambda: call(list(inputs))
        (forward, inputs), (backward, backward_inputs) = self.seen
        if len(forward(list(inputs))) != len(backward_inputs):  # what is saved, and the output or its tangent
            raise RuntimeError("give a case whose graph has one output: more are not told apart here")

        def run_both() -> object:
            _output, *saved = forward(list(inputs))
            return backward([*saved, tangent])

        return run_both


def arms(case: Case) -> dict[str, Callable[[], object]]:
    """What each arm runs once, compiled and swapped in, and giving the same values."""
    tangent = torch.ones_like(case.function(*case.args)) if case.trains else None
    calls = Calls()
    before = set(frame_swap.report().regions)
    runs = {
        "eager": through(case.function, case, tangent),
        "inductor": through(torch.compile(case.function), case, tangent),
        "frame_swap": through(torch.compile(case.function, backend="frame_swap"), case, tangent),
        "opt_in": through(opted_in(case.function), case, tangent),
    }
    with calls.recorded():
        runs["inductor"]()
    for arm in ("frame_swap", "opt_in"):
        runs[arm]()
    frame_swap.wait()
    for arm in ("frame_swap", "opt_in"):
        runs[arm]()
    regions = [region for region in frame_swap.report().regions if region not in before]
    if not regions or any(region.state is not State.INSTALLED or region.reason for region in regions):
        raise RuntimeError(f"not everything is swapped in:\n{frame_swap.report()}")
    runs["call"] = calls.run(tangent)

    expected = tensors(runs["eager"]())
    for arm in ("inductor", "frame_swap", "opt_in"):
        torch.testing.assert_close(tensors(runs[arm]()), expected, rtol=2e-2, atol=2e-3)
    return runs


def opted_in(function: Call) -> Call:
    """The case's function opted in; for a module, which would change in place, another with the same submodules."""
    if isinstance(function, torch.nn.Module):
        opted: Call = frame_swap.opt_in(static_module=True)(copy.copy(function))
        return opted
    return frame_swap.opt_in(function)


def tensors(value: Any) -> list[Tensor]:
    """The tensors in what an arm returned."""
    return [value] if isinstance(value, Tensor) else [t for t in value if t is not None]


# --- The clock ---


def microseconds(run: Callable[[], object], number: int, finish: Callable[[], None]) -> float:
    """What one of `number` calls takes, the device's work included, garbage collection left out."""
    gc.collect()
    gc.disable()
    try:
        run()  # the first may look further down the list of cache entries
        finish()
        start = time.perf_counter_ns()
        for _ in repeat(None, number):
            run()
        finish()
        return (time.perf_counter_ns() - start) / 1e3 / number
    finally:
        gc.enable()


def measure(case: Case, rounds: int, milliseconds: float) -> Rounds:
    """All arms of a case, interleaved."""
    finish = torch.cuda.synchronize if case.args[0].is_cuda else lambda: None
    with torch.set_grad_enabled(case.trains):
        runs = arms(case)
        numbers = {
            arm: max(1, int(1e3 * milliseconds / microseconds(run, 20, finish))) for arm, run in runs.items()
        }
        times: Rounds = {arm: [] for arm in ARMS}
        for _ in range(rounds):
            for arm in random.sample(ARMS, len(ARMS)):
                times[arm].append(microseconds(runs[arm], numbers[arm], finish))
    return times


# --- What comes out ---


def summary(times: Rounds) -> dict[str, dict[str, float]]:
    """Medians over the rounds, and ratios within them."""
    return {
        "us": {arm: statistics.median(times[arm]) for arm in ARMS},
        "ratios": {
            f"{arm} / {other}": statistics.median(a / b for a, b in zip(times[arm], times[other], strict=True))
            for arm, other in RATIOS
        },
    }


def table(summaries: dict[str, dict[str, dict[str, float]]], title: str) -> Table:
    """One row a case."""
    caption = "µs a call, medians over rounds; and ratios, medians of those within rounds"
    shown = Table(box=box.SIMPLE_HEAD, title=title, caption=caption, title_justify="left")
    shown.add_column("case", no_wrap=True)
    for column in (*ARMS, *(f"{arm} / {other}" for arm, other in RATIOS)):
        shown.add_column(column, justify="right")
    for name, figures in summaries.items():
        us, ratios = figures["us"].values(), figures["ratios"].values()
        shown.add_row(name, *(f"{v:.1f}" for v in us), *(f"{v:.2f}" for v in ratios))
    return shown


def draw(summaries: dict[str, dict[str, dict[str, float]]], title: str) -> Figure:
    """A group of bars for each case."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = figure.subplots(1, len(summaries))
    for axes, (name, figures) in zip(panels, summaries.items(), strict=True):
        us = figures["us"]
        bars = axes.bar(ARMS, us.values(), color=[output.COLOURS[arm] for arm in ARMS])
        axes.bar_label(bars, fmt="{:.4g}", fontsize=9)
        axes.set_title(name, fontsize=10)
        axes.tick_params(axis="x", rotation=30)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("µs a call")
    figure.suptitle(title, fontsize=10)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--milliseconds", type=float, default=40.0, help="how long an arm runs in a round")
    parser.add_argument("--out", type=Path, default=output.RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)

    device = output.device()
    rounds = {}
    for name, case in cases(device).items():
        print(f"{name} ...", flush=True)
        rounds[name] = measure(case, args.rounds, args.milliseconds)
        torch._dynamo.reset()
    summaries = {name: summary(times) for name, times in rounds.items()}
    what = f"steady state, one thread, torch {torch.__version__}, {output.device_name()}"
    Console(width=100).print(table(summaries, what))
    output.write(
        args.out / f"steady_state-{device}",
        {"what": what, "figures": summaries, "rounds_us": rounds},
        draw(summaries, what),
    )


if __name__ == "__main__":
    main()
