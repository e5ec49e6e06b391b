"""How long a program waits: seconds to the first result and to the swap, and steps done over time.

    python -m benchmarks.first_call [--model bert-4] [--infer] [--runs 3]

Five arms run in turn, each in a process of its own with empty compile caches: eager, aot_eager, stock Inductor,
upstream's TORCHINDUCTOR_FX_COMPILE_MODE=async+subprocess, and frame_swap. Each arm builds the model and makes one
eager step, so that starting the libraries is not measured. Then it starts the clock, compiles, and makes steps
until the time is up. Writes a JSON file and a picture; prints the ratios.
"""

from __future__ import annotations

import argparse
import bisect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS = ("eager", "aot_eager", "inductor", "upstream_async", "frame_swap")
BACKENDS = {
    "aot_eager": "aot_eager",
    "inductor": "inductor",
    "upstream_async": "inductor",
    "frame_swap": "frame_swap",
}


def run_arm(arm: str, model: str, train: bool, seconds: float) -> dict[str, Any]:
    """Run one arm in this process; return the times of the swap and of each step's end, in seconds."""
    import torch

    from . import models

    device = output.device()
    step = models.make(model, train, device)
    step.run(step.model)
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    finish()

    start = time.time()
    call = step.model if arm == "eager" else torch.compile(step.model, backend=BACKENDS[arm])
    ends = []
    while not ends or time.time() - start < seconds:
        step.run(call)
        finish()
        ends.append(time.time() - start)
    result: dict[str, Any] = {"arm": arm, "ends": ends, "swap": None, "regions": []}
    if arm == "frame_swap":
        import frame_swap

        report = frame_swap.report()
        installed = [r.installed_at for r in report.regions if r.installed_at is not None]
        if len(installed) == len(report.regions):
            result["swap"] = max(installed) - start
        result["regions"] = report.as_dict()["regions"]
    return result


def spawn_arm(arm: str, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Call `run_arm` in a process of its own, with empty caches of Inductor and Triton."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
            "TRITON_CACHE_DIR": f"{cache}/triton",
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "0" if arm == "frame_swap" else "1",
        }
        if arm == "upstream_async":
            environment["TORCHINDUCTOR_FX_COMPILE_MODE"] = "async+subprocess"
        command = [sys.executable, "-m", "benchmarks.first_call", "--arm", arm, "--model", args.model]
        command += ["--seconds", str(seconds)] + (["--infer"] if args.infer else [])
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arm} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def durations(run: dict[str, Any], after: float = 0.0, before: float = float("inf")) -> list[float]:
    """Seconds of each step that began and ended within the window, without the first step of the run."""
    ends = run["ends"]
    return [b - a for a, b in pairwise(ends) if after <= a and b <= before]


def ratios(runs: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The figures of one round, from the runs of all arms."""
    ours, stock, pair = runs["frame_swap"], runs["inductor"], runs["aot_eager"]
    swap = ours["swap"] or float("inf")
    around = [b - a for a, b in pairwise(ours["ends"]) if swap - 2 <= b and a <= swap + 1]
    median = statistics.median(durations(ours, ours["ends"][0], swap) or [float("nan")])
    behind = max(
        bisect.bisect_right(stock["ends"], t) - bisect.bisect_right(ours["ends"], t) for t in stock["ends"]
    )
    return {
        "first call / aot_eager's": ours["ends"][0] / pair["ends"][0],
        "first call / stock's": ours["ends"][0] / stock["ends"][0],
        "upstream async's first call / stock's": runs["upstream_async"]["ends"][0] / stock["ends"][0],
        "swap / stock's first call": swap / stock["ends"][0],
        "step while compiling / aot_eager's": median / statistics.median(durations(pair)),
        "mean step while compiling / aot_eager's": statistics.mean(
            durations(ours, ours["ends"][0], swap) or [float("nan")]
        )
        / statistics.mean(durations(pair)),
        "worst call around the swap, ms": 1e3 * max(around, default=float("nan")),
        "allowed: 2 x median + 5 ms": 1e3 * 2 * median + 5,
        "steps done when stock ends its first": float(bisect.bisect_right(ours["ends"], stock["ends"][0])),
        "most steps behind stock": float(behind),
        "step after the swap / stock's": statistics.median(durations(ours, swap + 1) or [float("nan")])
        / statistics.median(durations(stock, stock["ends"][0]) or [float("nan")]),
    }


def draw(runs: dict[str, dict[str, Any]], title: str) -> Figure:
    """Steps done over seconds, a curve for each arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for arm in ARMS:
        ends = runs[arm]["ends"]
        axes.step(
            ends,
            range(1, len(ends) + 1),
            where="post",
            label=arm,
            color=output.COLOURS[arm],
            linewidth=2.2 if arm == "frame_swap" else 1.4,
        )
    swap, colour = runs["frame_swap"]["swap"], output.COLOURS["frame_swap"]
    if swap is not None:
        axes.axvline(swap, color=colour, linestyle=":", linewidth=1)
        axes.annotate("the swap", (swap, 0), textcoords="offset points", xytext=(4, 6), color=colour)
    axes.set_xlabel("seconds since torch.compile")
    axes.set_ylabel("steps done")
    axes.set_title(title, fontsize=11)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bert-4")
    parser.add_argument("--infer", action="store_true", help="inference instead of training")
    parser.add_argument("--runs", type=int, default=3, help="rounds of all arms; the medians are printed")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long each arm steps")
    parser.add_argument("--out", type=Path, default=output.RESULTS)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(run_arm(args.arm, args.model, not args.infer, args.seconds)))
        return

    rounds = []
    for number in range(args.runs):
        runs = {}
        for arm in ARMS:
            runs[arm] = spawn_arm(arm, args, args.seconds)
            print(f"round {number + 1}: {arm:15s} first result after {runs[arm]['ends'][0]:6.2f} s", flush=True)
        rounds.append(runs)
    tables = [ratios(runs) for runs in rounds]
    figures = {name: statistics.median(table[name] for table in tables) for name in tables[0]}
    for name, value in figures.items():
        print(f"{name:42s} {value:9.3f}   of {', '.join(f'{table[name]:.3f}' for table in tables)}")

    import torch

    program = "infer" if args.infer else "train"
    what = f"{args.model}, {program}, torch {torch.__version__}, {output.device_name()}"
    results = {"what": what, "figures": figures, "rounds": tables, "runs": rounds}
    stem = args.out / f"first_call-{args.model}-{program}-{output.device()}"
    output.write(stem, results, draw(rounds[-1], what))


if __name__ == "__main__":
    main()
