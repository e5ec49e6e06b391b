"""How long a program waits, and how many steps it has done by any moment, beside eager and stock.

    python -m benchmarks.first_call [--model bert-4] [--infer] [--mode M] [--runs 3] [--arms inductor,graph]

The arms run in turn, each in a process of its own with empty compile caches: stock Inductor, eager, Dynamo alone
(`backend="eager"`), and frame_swap with first="graph" and first="pair"; with --all-arms also aot_eager and
upstream's TORCHINDUCTOR_FX_COMPILE_MODE=async+subprocess. Each arm makes its imports, builds the model and makes
one eager step, so that starting the libraries is not measured. Then it starts the clock, compiles, and makes steps
until the time is up: three times stock's first call, or what --stretch says. --mode is `torch.compile`'s, for stock
and frame_swap. Writes a JSON file and a picture; prints the ratios.
"""

from __future__ import annotations

import argparse
import bisect
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Run = dict[str, Any]
"""One arm's run: `ends`, when each step ended; `swap`, when the last region was swapped; `regions`. In seconds."""


class Arm(NamedTuple):
    """A backend of `torch.compile` (None: not compiled), and the variables that it is run with."""

    backend: str | None
    environment: dict[str, str]
    caches: bool = False
    part: float = 1.0
    """How much of the time it runs. Where nothing changes after the first call, a part shows its speed, and later
    steps are counted as if it had gone on."""


ARMS = {
    "inductor": Arm("inductor", {}),
    "eager": Arm(None, {}, part=0.4),
    "dynamo": Arm("eager", {}, part=0.2),
    "graph": Arm("frame_swap", {"FRAME_SWAP_FIRST": "graph"}, caches=True),
    "pair": Arm("frame_swap", {"FRAME_SWAP_FIRST": "pair"}, caches=True),
    "aot_eager": Arm("aot_eager", {}, part=0.4),
    "upstream_async": Arm("inductor", {"TORCHINDUCTOR_FX_COMPILE_MODE": "async+subprocess"}),
}
LABELS = {
    "inductor": "stock torch.compile",
    "dynamo": "Dynamo alone",
    "graph": "frame_swap, first=graph",
    "pair": "frame_swap, first=pair",
}
OURS = ("graph", "pair")
SELDOM = ("aot_eager", "upstream_async")


def run_arm(arm: str, model: str, train: bool, mode: str | None, seconds: float, stretch: float) -> Run:
    """Run one arm in this process; with `seconds` 0, for `stretch` times its first call."""
    import torch

    if ARMS[arm].backend == "frame_swap":
        import frame_swap  # as programs do, with their other imports
    from . import models

    device = output.device()
    step = models.make(model, train, device)
    step.run(step.model)
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    finish()

    backend = ARMS[arm].backend
    start = time.time()
    mode = mode if backend in ("inductor", "frame_swap") else None
    call = step.model if backend is None else torch.compile(step.model, backend=backend, mode=mode)
    ends: list[float] = []
    while not ends or ends[-1] < (seconds or stretch * ends[0]):
        step.run(call)
        finish()
        ends.append(round(time.time() - start, 4))
    result: Run = {"arm": arm, "ends": ends, "swap": None, "regions": []}
    if backend == "frame_swap":
        report = frame_swap.report()
        installed = [r.installed_at for r in report.regions if r.installed_at is not None]
        if installed and not any(r.state == "pending" for r in report.regions):
            result["swap"] = max(installed) - start
        result["regions"] = report.as_dict()["regions"]
    return result


def spawn_arm(arm: str, model: str, infer: bool, mode: str | None, seconds: float, stretch: float) -> Run:
    """Call `run_arm` in a process of its own, with empty caches of Inductor and Triton."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
            "TRITON_CACHE_DIR": f"{cache}/triton",
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "0" if ARMS[arm].caches else "1",
            **ARMS[arm].environment,
        }
        command = [sys.executable, "-m", "benchmarks.first_call", "--arm", arm, "--model", model]
        command += ["--seconds", str(seconds), "--stretch", str(stretch)] + (["--infer"] if infer else [])
        command += ["--mode", mode] if mode else []
        return output.run_arm(arm, command, environment)


# --- The figures ---


def is_steady(run: Run) -> bool:
    """Whether nothing changes after its first call, so that it ran only for a part of the time."""
    return ARMS[run["arm"]].part < 1


def steps_by(run: Run, moment: float) -> int:
    """Steps that a run has done by then; one that ended earlier would have gone on as it was, if it was steady."""
    beyond = moment - run["ends"][-1]
    more = int(beyond / step_time(run)) if beyond > 0 and is_steady(run) and len(run["ends"]) > 1 else 0
    return bisect.bisect_right(run["ends"], moment) + more


def step_time(run: Run, after: float = 0.0, before: float = math.inf, *, mean: bool = False) -> float:
    """Median (or mean) seconds of the steps within the window, without the run's first; NaN if there is none."""
    times = [b - a for a, b in pairwise(run["ends"]) if after <= a and b <= before]
    return (statistics.mean if mean else statistics.median)(times) if times else math.nan


def most_behind(run: Run, rival: Run) -> int:
    """By how many steps `rival` was ahead, at its best moment; 0 if never."""
    until = run["ends"][-1] if is_steady(rival) else min(run["ends"][-1], rival["ends"][-1])
    moments = (t for t in [*rival["ends"], *run["ends"]] if t <= until)
    return max([0, *(steps_by(rival, t) - steps_by(run, t) for t in moments)])


def ratios(runs: dict[str, Run], arm: str) -> dict[str, float]:
    """The figures of one of our arms beside the others that ran in the same round."""
    ours, figures = runs[arm], {}
    first, swap, end = ours["ends"][0], ours["swap"] or math.inf, ours["ends"][-1]
    if (dynamo := runs.get("dynamo")) is not None:
        figures["first call / Dynamo alone's"] = first / dynamo["ends"][0]
    if (aot_eager := runs.get("aot_eager")) is not None:
        figures["first call / aot_eager's"] = first / aot_eager["ends"][0]
    if (eager := runs.get("eager")) is not None:
        figures["step before the swap / eager's"] = step_time(ours, first, swap) / step_time(eager)
        figures["mean step before the swap / eager's"] = step_time(ours, first, swap, mean=True) / step_time(eager)
        figures["steps done at the swap / eager's by then"] = (
            math.nan if ours["swap"] is None else steps_by(ours, swap) / max(1, steps_by(eager, swap))
        )
        figures["step after the swap / eager's"] = step_time(ours, swap) / step_time(eager)
        figures["most steps behind eager"] = most_behind(ours, eager)
        figures["steps done at the end / eager's by then"] = steps_by(ours, end) / max(1, steps_by(eager, end))
    if (stock := runs.get("inductor")) is not None:
        stocks = stock["ends"][0]
        figures["first call / stock's"] = first / stocks
        figures["swap / stock's first call"] = swap / stocks
        figures["steps done when stock ends its first"] = steps_by(ours, stocks)
        figures["most steps behind stock"] = most_behind(ours, stock)
        figures["step after the swap / stock's"] = step_time(ours, swap) / step_time(stock)
    steps = [b - a for a, b in pairwise(ours["ends"])]
    bound = 2 * step_time(ours, first, swap) + 0.005
    figures["worst call after the first / (2 medians before the swap + 5 ms)"] = (
        max(steps, default=math.nan) / bound
    )
    around = [b - a for a, b in pairwise(ours["ends"]) if swap - 2 <= b and a <= swap + 1]
    figures["worst call around the swap / a median step before"] = max(around, default=math.nan) / step_time(
        ours, first, swap
    )
    return figures


def medians(tables: Iterable[dict[str, float]]) -> dict[str, float]:
    """Of each figure, the median of the rounds that have it: without a swap, some do not."""
    tables = list(tables)
    known = {name: [t[name] for t in tables if not math.isnan(t[name])] for name in tables[0]}
    return {name: statistics.median(values) if values else math.nan for name, values in known.items()}


def draw(runs: dict[str, Run], title: str) -> Figure:
    """Steps done over seconds, a curve for each arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for arm, run in runs.items():
        colour = output.COLOURS[arm]
        axes.step(
            [0.0, *run["ends"]],
            range(len(run["ends"]) + 1),
            where="post",
            label=LABELS.get(arm, arm),
            color=colour,
            linewidth=2.2 if arm in OURS else 1.4,
        )
        if run["swap"] is not None:
            steps = steps_by(run, run["swap"])
            axes.plot(run["swap"], steps, "o", color=colour, markersize=5)
            axes.annotate("swap", (run["swap"], steps), textcoords="offset points", xytext=(5, -10), color=colour)
    axes.set_xlim(0, max(run["ends"][-1] for run in runs.values()))
    output.finish(axes, "steps done", title)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bert-4")
    parser.add_argument("--infer", action="store_true", help="inference instead of training")
    parser.add_argument("--mode", choices=("reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"))
    parser.add_argument("--runs", type=int, default=3, help="rounds of all arms; the medians are printed")
    parser.add_argument("--seconds", type=float, default=0.0, help="how long each arm steps")
    parser.add_argument("--stretch", type=float, default=3.0, help="the same, as so many times stock's first call")
    parser.add_argument("--arms", help="of these, with commas: " + ", ".join(ARMS))
    parser.add_argument("--all-arms", action="store_true")
    parser.add_argument("--out", type=Path, default=output.RESULTS)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(run_arm(args.arm, args.model, not args.infer, args.mode, args.seconds, args.stretch)))
        return
    wished = args.arms.split(",") if args.arms else [arm for arm in ARMS if args.all_arms or arm not in SELDOM]
    if not set(wished) <= set(ARMS) or ("inductor" not in wished and not args.seconds):
        parser.error(f"arms are {', '.join(ARMS)}; without inductor, --seconds says how long the others run")
    arms = [arm for arm in ARMS if arm in wished]  # stock comes first: it says how long the others run

    rounds: list[dict[str, Run]] = []
    for number in range(args.runs):
        runs: dict[str, Run] = {}
        seconds = args.seconds
        for arm in arms:
            run = runs[arm] = spawn_arm(
                arm, args.model, args.infer, args.mode, ARMS[arm].part * seconds, args.stretch
            )
            seconds = seconds or run["ends"][-1]
            notes = f"{len(run['ends'])} steps of {1e3 * step_time(run):.0f} ms in {run['ends'][-1]:.0f} s"
            if run["swap"] is not None:
                notes += f", swap after {run['swap']:.1f} s"
            print(f"round {number + 1}: {arm:15s} first result after {run['ends'][0]:6.2f} s; {notes}", flush=True)
        rounds.append(runs)

    figures = {}
    for arm in OURS:
        if arm in arms:
            tables = [ratios(runs, arm) for runs in rounds]
            figures[arm] = medians(tables)
            print(f"{LABELS[arm]}:")
            for name, value in figures[arm].items():
                print(f"  {name:50s} {value:9.3f}   of {', '.join(f'{table[name]:.3f}' for table in tables)}")

    import torch

    program = ("infer" if args.infer else "train") + (f"-{args.mode}" if args.mode else "")
    what = f"{args.model}, {program}, torch {torch.__version__}, {output.device_name()}"
    stem = args.out / f"first_call-{args.model}-{program}-{output.device()}"
    output.write(stem, {"what": what, "figures": figures, "runs": rounds}, draw(rounds[-1], what))


if __name__ == "__main__":
    main()
