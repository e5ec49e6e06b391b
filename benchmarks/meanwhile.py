"""What a program's steps cost while its graphs compile, and after the swap, beside others' of the same moments.

    python -m benchmarks.meanwhile [--model bert-4] [--infer] [--seconds 90] [--rounds 60] [--undisturbed]

One process makes a step of each arm in turn. Whatever else the machine does slows all alike, so that the ratios
hold where those of arms that run one after the other do not: a shared host may be half as fast a minute later.

- Before the swap: eager, Dynamo alone (`backend="eager"`), and frame_swap. In every other third of a second the
  workers are stopped: steps of both kinds of moments, side by side, say what the workers' work costs the program.
  With `--undisturbed` they are not: a stop may come while one times a kernel on a GPU, and another kernel wins.
- After it: eager, stock, and frame_swap, for so many rounds.

A ratio is the median of the rounds' ratios. Writes a JSON file and a picture; prints the ratios. Linux and macOS.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import frame_swap
from frame_swap.farm.workers import workers

from . import models, output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PERIOD = 0.33
"""Seconds that the workers run, and then are stopped."""

LABELS = {"eager": "eager", "dynamo": "Dynamo alone", "inductor": "stock torch.compile", "frame_swap": "frame_swap"}


class Round(NamedTuple):
    """A step of each arm.

    Attributes:
        at: seconds since `torch.compile`.
        workers: whether they run, or are stopped; None where they began or stopped meanwhile.
        seconds: that the step of each arm took, by its name.
    """

    at: float
    workers: str | None
    seconds: dict[str, float]


class Stops:
    """Stops the workers now and then.

    Attributes:
        changes: how many times they were stopped, or went on.
    """

    def __init__(self) -> None:
        self.changes = 0
        self._end = threading.Event()

    @property
    def state(self) -> str:
        """Whether the workers run, or are stopped."""
        return "stopped" if self.changes % 2 else "run"

    @contextlib.contextmanager
    def every_other_period(self) -> Iterator[None]:
        """Within the block, a thread stops them every other `PERIOD`."""
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._end.set()
            thread.join()

    def _run(self) -> None:
        try:
            while not self._end.wait(PERIOD):
                _signal(signal.SIGSTOP if self.state == "run" else signal.SIGCONT)
                self.changes += 1
        finally:
            _signal(signal.SIGCONT)


def _signal(number: signal.Signals) -> None:
    for pid in workers.pids():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, number)  # a worker's group has its compilers, too


def rounds_of(
    calls: dict[str, Callable[[], None]], stops: Stops, start: float, go_on: Callable[[int], bool]
) -> list[Round]:
    """Rounds of steps, as long as `go_on` says so of the number of rounds."""
    rounds: list[Round] = []
    while go_on(len(rounds)):
        began, changes, seconds = time.time() - start, stops.changes, {}
        for arm, call in calls.items():
            before = time.perf_counter()
            call()
            seconds[arm] = time.perf_counter() - before
        state = stops.state if stops.changes == changes else None
        rounds.append(Round(round(began, 3), state, seconds))
    return rounds


# --- The figures ---


def ratio(rounds: Sequence[Round], arm: str, to: str) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(one.seconds[arm] / one.seconds[to] for one in rounds)


def mean_ratio(rounds: Sequence[Round], arm: str, to: str) -> float:
    """The ratio of the mean steps."""
    return sum(one.seconds[arm] for one in rounds) / sum(one.seconds[to] for one in rounds)


def cost_of_workers(rounds: Sequence[Round]) -> float:
    """The median ratio of rounds beside workers at work to those just before or after, with the workers stopped."""
    windows: list[tuple[str, list[float]]] = []
    for one in rounds:
        if one.workers is None:
            continue
        if not windows or windows[-1][0] != one.workers:
            windows.append((one.workers, []))
        windows[-1][1].append(sum(one.seconds.values()))
    medians = [(state, statistics.median(times)) for state, times in windows]
    ratios = [a / b if state == "run" else b / a for (state, a), (_, b) in pairwise(medians)]
    return statistics.median(ratios) if ratios else float("nan")


def long_calls(rounds: Sequence[Round], arm: str) -> tuple[int, float]:
    """How many steps took more than 2 medians + 5 ms, and the longest in parts of that."""
    times = [one.seconds[arm] for one in rounds]
    bound = 2 * statistics.median(times) + 0.005
    return sum(time > bound for time in times), max(times) / bound


def figures_of(before: Sequence[Round], after: Sequence[Round]) -> dict[str, float]:
    """The figures, by name."""
    figures: dict[str, float] = {}
    if before:
        figures["step before the swap / eager's"] = ratio(before, "frame_swap", "eager")
        figures["mean step before the swap / eager's"] = mean_ratio(before, "frame_swap", "eager")
        figures["step before the swap / Dynamo alone's"] = ratio(before, "frame_swap", "dynamo")
        figures["Dynamo alone's step / eager's"] = ratio(before, "dynamo", "eager")
        if any(one.workers == "stopped" for one in before):
            figures["steps while workers run / while they are stopped"] = cost_of_workers(before)
        for arm in ("frame_swap", "eager"):
            number, worst = long_calls(before, arm)
            figures[f"{LABELS[arm]}: part of the calls that take over 2 medians + 5 ms"] = number / len(before)
            figures[f"{LABELS[arm]}: worst call / (2 medians + 5 ms)"] = worst
    if after:
        figures["step after the swap / stock's"] = ratio(after, "frame_swap", "inductor")
        figures["step after the swap / eager's"] = ratio(after, "frame_swap", "eager")
    return figures


def draw(before: Sequence[Round], after: Sequence[Round], title: str) -> Figure:
    """Each step's milliseconds over seconds, a dot for each; light where the workers were stopped."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for arm, label in LABELS.items():
        rounds = [one for one in (*before, *after) if arm in one.seconds]
        axes.scatter(
            [one.at for one in rounds],
            [1e3 * one.seconds[arm] for one in rounds],
            s=5,
            label=label,
            color=output.COLOURS[arm],
            alpha=[0.35 if one.workers == "stopped" else 1.0 for one in rounds],
        )
    output.finish(axes, "ms a step", title)
    return figure


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bert-4", choices=models.NAMES)
    parser.add_argument("--infer", action="store_true", help="inference instead of training")
    parser.add_argument("--seconds", type=float, default=90.0, help="how long to wait for the swap at most")
    parser.add_argument("--rounds", type=int, default=60, help="of steps after the swap")
    parser.add_argument("--undisturbed", action="store_true", help="stop no workers")
    parser.add_argument("--out", type=Path, default=output.RESULTS)
    chosen = parser.parse_args()

    device = output.device()
    step = models.make(chosen.model, not chosen.infer, device)
    finish: Any = torch.cuda.synchronize if device == "cuda" else lambda: None

    def stepper(backend: str | None) -> Callable[[], None]:
        call = step.model if backend is None else torch.compile(step.model, backend=backend)

        def run() -> None:
            step.run(call)
            finish()

        run()
        return run

    frame_swap.configure(store="off")
    calls = {"eager": stepper(None), "dynamo": stepper("eager")}
    start = time.time()
    calls["frame_swap"] = stepper("frame_swap")
    stops = Stops()

    def is_awaited(number: int) -> bool:
        late = time.time() - start > chosen.seconds
        return not late and any(region.state == "pending" for region in frame_swap.report().regions)

    with contextlib.nullcontext() if chosen.undisturbed else stops.every_other_period():
        before = rounds_of(calls, stops, start, is_awaited)
    frame_swap.wait()
    after: list[Round] = []
    if chosen.rounds:
        calls = {"eager": calls["eager"], "inductor": stepper("inductor"), "frame_swap": calls["frame_swap"]}
        for call in calls.values():
            call()
        after = rounds_of(calls, stops, start, lambda number: number < chosen.rounds)

    kind = "infer" if chosen.infer else "train"
    what = f"{chosen.model}, {kind}, torch {torch.__version__}, {output.device_name()}"
    figures = figures_of(before, after)
    print(f"{what}: {len(before)} rounds before the swap, {len(after)} after it")
    for name, value in figures.items():
        print(f"  {name:64s} {value:7.3f}")
    stem = chosen.out / f"meanwhile-{chosen.model}-{kind}-{device}"
    output.write(
        stem, {"what": what, "figures": figures, "before": before, "after": after}, draw(before, after, what)
    )


if __name__ == "__main__":
    main()
