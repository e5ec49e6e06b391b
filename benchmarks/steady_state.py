"""The cost of a call once everything is compiled, in microseconds and instructions; mostly wrappers in tiny graphs.

    python -m benchmarks.steady_state [--case "tiny inference" ...] [--rounds 15] [--milliseconds 40]

Cases:
- Tiny graphs on 8 floats: `(x + y).relu()` as inference (`no_grad`), and `(x * y).sin().sum()` as training (forward
  and backward, no optimizer).
- A 2-layer BERT, as inference and as training.
- Whole steps of small models: BERT, GPT-2, ViT, an LSTM, a block of a ResNet. A training step zeroes gradients,
  then runs forward, loss, backward and SGD.

Arms:
- "eager".
- "inductor": stock `torch.compile`.
- "frame_swap", "opt_in", "static": frame_swap after the swap, through `torch.compile`, `frame_swap.opt_in` and, for
  BERT, `opt_in(static_module=True)` if that exists.
- "call", not for whole steps: only Inductor's generated functions for forward and backward, called by hand with the
  inputs that stock gave them. It checks no guards and reads no parameters. No wrapper around the same code can be
  faster; but on a GPU frame_swap's code launches kernels in a shorter way. "Over call" is the time that an arm
  takes beyond it.
- "function", with gradients: an `autograd.Function` written by hand around the same two functions. Nothing that
  autograd can differentiate can be faster.

All arms run in one process, on one thread, so that they differ only in overhead. In each round each arm runs
once, in random order. A figure is the median over the rounds, a ratio the median of the ratios of the rounds.
Instructions are counted in a process of their own, for tiny cases, and for BERT with `--instructions bert`.
Writes a JSON file and a picture; prints a table of figures and a table of targets.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import inspect
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
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

from . import instructions, models, output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS = ("eager", "inductor", "frame_swap", "opt_in", "static", "function", "call")
"""All arms; a case has some of them."""

Call = Callable[..., Tensor]
Runs = dict[str, Callable[[], object]]
"""A function for each arm that runs it once."""
Rounds = dict[str, list[float]]
"""Microseconds per call in each round, by arm."""


class Program(NamedTuple):
    """A callable to compile, `target`, and a function that runs it once, compiled or not."""

    target: Call
    run: Callable[[Call], object]
    tangent: Tensor | None = None  # the tangent of the only output, if `run` differentiates


class Case(NamedTuple):
    """One graph.

    Attributes:
        make: builds the program; each call builds the same one.
        trains: whether it runs with gradients enabled.
        bare: whether it has the arms "call" and "function".
        module: whether its target is a module.
    """

    make: Callable[[], Program]
    trains: bool
    bare: bool = True
    module: bool = True

    @property
    def arms(self) -> tuple[str, ...]:
        static = "static_module" in inspect.signature(frame_swap.opt_in).parameters
        left_out = {
            "static": not (static and self.bare and self.module),
            "function": not (self.bare and self.trains),
            "call": not self.bare,
        }
        return tuple(arm for arm in ARMS if not left_out.get(arm))


COUNTED: dict[str, Callable[[Case], bool]] = {
    "none": lambda case: False,
    "tiny": lambda case: case.bare and not case.module,
    "bert": lambda case: case.bare,
}
"""The cases whose instructions are counted. Compiling BERT under Callgrind takes a quarter of an hour."""

SMALL_MODELS = ("bert-tiny", "gpt2-tiny", "vit-tiny", "lstm-tiny", "resnet-block")


def cases(device: str) -> dict[str, Case]:
    """The graphs by name."""

    def tiny(function: Call, trains: bool) -> Program:
        torch.manual_seed(0)
        args = tuple(torch.randn(8, device=device, requires_grad=trains) for _ in range(2))
        if not trains:
            return Program(function, lambda call: call(*args))
        tangent = torch.ones((), device=device)
        return Program(function, lambda call: torch.autograd.grad(call(*args), args, tangent), tangent)

    def bert(trains: bool) -> Program:
        model = models.make("bert-tiny", trains, device).model
        ids = torch.randint(1000, (2, 32), device=device)
        if not trains:
            return Program(model, lambda call: call(ids))
        tangent, weights = torch.ones_like(model(ids)), tuple(model.parameters())
        return Program(
            model, lambda call: torch.autograd.grad(call(ids), weights, tangent, allow_unused=True), tangent
        )

    def step(name: str, trains: bool) -> Program:
        made = models.make(name, trains, device)
        return Program(made.model, made.run)

    def inference(x: Tensor, y: Tensor) -> Tensor:
        return (x + y).relu()

    def training(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sin().sum()

    partial = functools.partial
    return {
        "tiny inference": Case(partial(tiny, inference, False), False, module=False),
        "tiny training": Case(partial(tiny, training, True), True, module=False),
        "bert-tiny inference": Case(partial(bert, False), False),
        "bert-tiny training": Case(partial(bert, True), True),
    } | {
        f"{name} {kind} step": Case(partial(step, name, trains), trains, bare=False)
        for name in SMALL_MODELS
        for kind, trains in (("inference", False), ("training", True))
    }


# --- The arms ---


class Calls:
    """Inductor's generated functions of one case, with the inputs of their first run, in order."""

    def __init__(self) -> None:
        self.seen: list[tuple[Callable[[list[Any]], Any], list[Any]]] = []

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Within the block, record the functions that compiled graphs run."""
        from torch._inductor.output_code import CompiledFxGraph

        run_graph = CompiledFxGraph.__call__

        def run_noted(graph: CompiledFxGraph, inputs: list[Any]) -> Any:
            if graph.current_callable is not None:
                self.seen.append((graph.current_callable, list(inputs)))
            return run_graph(graph, inputs)

        with mock.patch.object(CompiledFxGraph, "__call__", run_noted):
            yield

    def run(self, tangent: Tensor | None) -> Callable[[], object]:
        """A function that runs the arm once. As in AOTAutograd, the backward gets what its forward saved."""
        if tangent is None:
            [(call, inputs)] = self.seen
            return lambda: call(list(inputs))
        (forward, inputs), (backward, backward_inputs) = self.seen
        inputs = [value.detach() if isinstance(value, Tensor) else value for value in inputs]
        if len(forward(list(inputs))) != len(backward_inputs):  # the saved values, and the output or its tangent
            raise RuntimeError("give a case whose graph has one output: more are not told apart here")

        def run_both() -> object:
            _output, *saved = forward(list(inputs))
            return backward([*saved, tangent])

        return run_both

    def function(self) -> Call:
        """The graph in a minimal `autograd.Function`, called with the inputs of its first run."""
        (forward, inputs), (backward, _) = self.seen

        class Graph(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                output, *saved = forward(list(args))
                ctx.save_for_backward(*saved)
                return output

            @staticmethod
            def backward(ctx: Any, tangent: Tensor) -> Any:  # type: ignore[override]
                saved = ctx.saved_tensors
                ctx.maybe_clear_saved_tensors()
                return tuple(backward([*saved, tangent]))

        return lambda *_: Graph.apply(*inputs)


def compiled(arm: str, target: Call) -> Call:
    """`target`, compiled as the arm compiles it."""
    wrappers: dict[str, Callable[[Call], Call]] = {
        "eager": lambda target: target,
        "inductor": torch.compile,
        "frame_swap": functools.partial(torch.compile, backend="frame_swap"),
        "opt_in": frame_swap.opt_in,
        "static": lambda target: frame_swap.opt_in(static_module=True)(target),
    }
    return wrappers[arm](target)


def arms(case: Case) -> Runs:
    """A function for each arm that runs it once; all is compiled and swapped, and the values are equal."""
    calls = Calls()
    before = set(frame_swap.report().regions)
    programs = {arm: case.make() for arm in case.arms if arm not in ("function", "call")}
    runs: Runs = {}
    for arm, program in programs.items():
        runs[arm] = functools.partial(program.run, compiled(arm, program.target))
        with calls.recorded() if arm == "inductor" else contextlib.nullcontext():
            runs[arm]()
    if "function" in case.arms:
        runs["function"] = functools.partial(programs["inductor"].run, calls.function())
    if "call" in case.arms:
        runs["call"] = calls.run(programs["inductor"].tangent)
    frame_swap.wait()
    results = {arm: tensors(run()) for arm, run in runs.items() if arm != "call"}
    regions = [region for region in frame_swap.report().regions if region not in before]
    if not regions or any(region.state is not State.INSTALLED or region.reason for region in regions):
        raise RuntimeError(f"not everything is swapped in:\n{frame_swap.report()}")
    for actual in results.values():
        torch.testing.assert_close(actual, results["eager"], rtol=2e-2, atol=2e-3)
    return runs


def tensors(value: Any) -> list[Tensor]:
    """The tensors that an arm returned."""
    return [value] if isinstance(value, Tensor) else [t for t in value if t is not None]


# --- The clock ---


def microseconds(run: Callable[[], object], number: int, finish: Callable[[], None]) -> float:
    """The mean time of `number` calls, including the work of the device, without garbage collection."""
    gc.collect()
    gc.disable()
    try:
        run()  # the first call may search more of the list of cache entries
        finish()
        start = time.perf_counter_ns()
        for _ in repeat(None, number):
            run()
        finish()
        return (time.perf_counter_ns() - start) / 1e3 / number
    finally:
        gc.enable()


def keep_freed_memory() -> None:
    """Make the C library keep freed memory.

    Otherwise some tensors lie in pages that the kernel has yet to clear, which costs as much as all wrappers of a
    BERT; and it is chance which arm they belong to.
    """
    with contextlib.suppress(AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_MMAP_THRESHOLD, 2**25)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def measure(case: Case, rounds: int, milliseconds: float, device: str) -> Rounds:
    """Measure all arms of a case, in turn."""
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    with torch.set_grad_enabled(case.trains):
        runs = arms(case)
        numbers = {arm: max(1, int(1e3 * milliseconds / microseconds(run, 5, finish))) for arm, run in runs.items()}
        times: Rounds = {arm: [] for arm in runs}
        for _ in range(rounds):
            for arm in random.sample(list(runs), len(runs)):
                times[arm].append(microseconds(runs[arm], numbers[arm], finish))
    torch._dynamo.reset()
    return times


def count(chosen: Mapping[str, Case]) -> dict[str, dict[str, float]]:
    """Instructions per call, by case and arm; for a process that runs under Callgrind."""
    instructions.prepare()
    runs = {}
    for name, case in chosen.items():
        with torch.set_grad_enabled(case.trains):
            runs[name] = arms(case)
    instructions.begin()
    counts: dict[str, dict[str, float]] = {}
    for name, case in chosen.items():
        with torch.set_grad_enabled(case.trains):
            counts[name] = {arm: instructions.count(run) for arm, run in runs[name].items()}
    return counts


# --- Results ---

Figures = dict[str, dict[str, Any]]
"""By case: rounds by arm ("us"), and instructions by arm if they were counted."""


def ratio(figures: dict[str, Any], arm: str, other: str, over: str = "") -> tuple[float, float | None]:
    """The cost of `arm` divided by that of `other`, in time and in instructions; both less the cost of `over`."""

    def part(costs: dict[str, float]) -> float:
        least = costs[over] if over else 0.0
        if costs[other] <= least:  # noise: nan reaches no target
            return math.nan
        return (costs[arm] - least) / (costs[other] - least)

    us, counts = figures["us"], figures["instructions"]
    if over:  # a small difference of large figures is mostly noise in a single round
        time_part = part({name: statistics.median(times) for name, times in us.items()})
    else:
        time_part = statistics.median(a / b for a, b in zip(us[arm], us[other], strict=True))
    return time_part, part(counts) if counts else None


class Target(NamedTuple):
    """The largest ratio of the costs of `arm` and `other`; each less the cost of `over`, if given."""

    case: str
    arm: str
    other: str
    limit: float
    over: str = ""


TARGETS = (
    Target("tiny inference", "frame_swap", "inductor", 0.60),
    Target("tiny inference", "opt_in", "inductor", 0.30),
    Target("tiny training", "frame_swap", "inductor", 0.50),
    Target("tiny training", "opt_in", "inductor", 0.40),
    Target("tiny training", "opt_in", "eager", 1.25),
    *(
        Target(f"bert-tiny {kind}", arm, "inductor", limit, over="call")
        for kind in ("inference", "training")
        for arm, limit in (("frame_swap", 0.50), ("opt_in", 0.25), ("static", 0.25))
    ),
    *(
        Target(f"{name} {kind} step", arm, "inductor", 1.0)
        for name in SMALL_MODELS
        for kind in ("inference", "training")
        for arm in ("frame_swap", "opt_in")
    ),
)


def targets(figures: Figures) -> list[dict[str, Any]]:
    """Each target whose arms were run, and whether it was reached when rounded to two decimals."""
    rows = []
    for target in TARGETS:
        if target.arm in figures.get(target.case, {"us": {}})["us"]:
            in_time, in_instructions = ratio(figures[target.case], target.arm, target.other, target.over)
            reached = round(in_time, 2) <= target.limit
            rows.append(target._asdict() | {"us": in_time, "instructions": in_instructions, "reached": reached})
    return rows


def table(figures: Figures, title: str, uncounted: str) -> Table:
    """A table with a row for each case."""
    caption = "µs a call, medians over rounds; below, thousands of instructions"
    if uncounted:
        caption += f" (not counted: {uncounted})"
    shown = Table(box=box.SIMPLE_HEAD, title=title, caption=caption, title_justify="left")
    shown.add_column("case", no_wrap=True)
    for arm in ARMS:
        shown.add_column(arm, justify="right")
    for name, of_case in figures.items():
        shown.add_row(name, *(cell(of_case, arm) for arm in ARMS))
    return shown


def cell(of_case: dict[str, Any], arm: str) -> str:
    if arm not in of_case["us"]:
        return ""
    us = f"{statistics.median(of_case['us'][arm]):.1f}"
    return f"{us}\n{of_case['instructions'][arm] / 1e3:.1f}k" if of_case["instructions"] else us


def target_table(rows: list[dict[str, Any]]) -> Table:
    """A table with a row for each target."""
    shown = Table(box=box.SIMPLE_HEAD, title="targets", title_justify="left")
    shown.add_column("case", no_wrap=True)
    shown.add_column("ratio", no_wrap=True)
    for column in ("at most", "µs", "instructions", "reached"):
        shown.add_column(column, justify="right")
    for row in rows:
        what = f"{row['arm']} / {row['other']}" + (f", over {row['over']}" if row["over"] else "")
        counted = "" if row["instructions"] is None else f"{row['instructions']:.2f}"
        verdict = "[green]yes" if row["reached"] else "[red]no"
        shown.add_row(row["case"], what, f"{row['limit']:.2f}", f"{row['us']:.2f}", counted, verdict)
    return shown


def draw(figures: Figures, title: str) -> Figure:
    """A group of bars for each case that has the arm "call"; for whole steps, the ratio to stock."""
    from matplotlib.figure import Figure

    groups = {name: of_case["us"] for name, of_case in figures.items() if "call" in of_case["us"]}
    steps = {name: of_case for name, of_case in figures.items() if name not in groups}
    figure = Figure(figsize=(max(6, 3.2 * len(groups)), 7.2 if steps and groups else 3.6), layout="constrained")
    rows = figure.subfigures(bool(groups) + bool(steps), 1, squeeze=False)[:, 0]
    if groups:
        panels = rows[0].subplots(1, len(groups), squeeze=False)[0]
        for axes, (name, us) in zip(panels, groups.items(), strict=True):
            medians = {arm: statistics.median(times) for arm, times in us.items()}
            bars = axes.bar(list(medians), list(medians.values()), color=[output.COLOURS[arm] for arm in medians])
            axes.bar_label(bars, fmt="{:.4g}", fontsize=9)
            axes.set_title(name, fontsize=10)
        panels[0].set_ylabel("µs a call")
    if steps:
        axes = rows[-1].subplots()
        for at, arm in enumerate(("eager", "frame_swap", "opt_in")):
            parts = [ratio(of_case, arm, "inductor")[0] for of_case in steps.values()]
            places = [place + 0.27 * (at - 1) for place in range(len(steps))]
            axes.bar(places, parts, 0.25, label=arm, color=output.COLOURS[arm])
        axes.axhline(1, color=output.COLOURS["inductor"])
        axes.set_xticks(range(len(steps)), [name.removesuffix(" step") for name in steps])
        axes.set_ylabel("whole step / stock's")
        axes.legend()
    for axes in figure.axes:
        for label in axes.get_xticklabels():
            label.set(rotation=30, ha="right", rotation_mode="anchor")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    return figure


def main() -> None:
    device = output.device()
    every = cases(device)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=list(every), help="may be given again; default: all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--milliseconds", type=float, default=40.0, help="how long an arm runs in a round")
    parser.add_argument("--instructions", choices=list(COUNTED), default="tiny", help="count those of these cases")
    parser.add_argument("--only-count", action="store_true", help=argparse.SUPPRESS)  # the process that counts
    parser.add_argument("--out", type=Path, default=output.RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    random.seed(0)

    chosen = {name: every[name] for name in args.case or every}
    counted = {name: case for name, case in chosen.items() if COUNTED[args.instructions](case)}
    if args.only_count:
        print(json.dumps(count(counted)))
        return
    figures: Figures = {}
    for name, case in chosen.items():
        print(f"{name} ...", flush=True)
        figures[name] = {"us": measure(case, args.rounds, args.milliseconds, device), "instructions": {}}
    uncounted = instructions.unavailable()
    if counted and not uncounted:
        print("counting instructions ...", flush=True)
        options = [option for name in counted for option in ("--case", name)]
        last_line = instructions.run_counting(
            __spec__.name, ["--only-count", "--instructions", args.instructions, *options]
        ).splitlines()[-1]
        for name, counts in json.loads(last_line).items():
            figures[name]["instructions"] = counts
    what = f"steady state, one thread, torch {torch.__version__}, {output.device_name()}"
    rows = targets(figures)
    console = Console(width=110)
    console.print(table(figures, what, uncounted))
    console.print(target_table(rows))
    output.write(
        args.out / f"steady_state-{device}",
        {"what": what, "figures": figures, "targets": rows, "uncounted": uncounted},
        draw(figures, what),
    )


if __name__ == "__main__":
    main()
