"""How long the calls of a server take while shapes arrive for the first time, beside eager and stock.

    python -m benchmarks.serving [--model bert-tiny] [--shapes 16] [--seconds 60] [--runs 3] [--arms background]

Sentences of 16 lengths come in random order, the same for all arms; shapes are static, so each length is compiled.
A call begins when the one before has ended. The arms run in turn, each in a process of its own with empty compile
caches: eager, stock Inductor, frame_swap, and frame_swap with capture="background". Each arm makes one eager call,
so that starting the libraries is not measured. Writes a JSON file and a picture; prints the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ARMS = {
    "eager": {},
    "inductor": {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
    "frame_swap": {},
    "background": {"FRAME_SWAP_CAPTURE": "background"},
}
"""The arms, and the variables that each is run with."""

OURS = ("frame_swap", "background")
LABELS = {
    "inductor": "stock torch.compile",
    "frame_swap": "frame_swap, capture in the call",
    "background": "frame_swap, capture in the background",
}
Run = dict[str, Any]
"""One arm's run: `calls`, the seconds of each; `states`, how many regions are in each state at the end."""


def run_arm(arm: str, model: str, shapes: int, seconds: float) -> Run:
    """Serve in this process."""
    import torch

    from . import models

    device = output.device()
    step = models.make(model, False, device)
    step.run(step.model)
    # One entry for each length; Dynamo would give up at the eighth.
    torch._dynamo.config.recompile_limit = 4 * shapes
    sentences = [torch.randint(1000, (1, 8 * (1 + n)), device=device) for n in range(shapes)]
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    backend = "inductor" if arm == "inductor" else "frame_swap"
    arrivals = random.Random(0)
    calls = []
    with torch.no_grad():
        finish()
        start = time.perf_counter()
        call = step.model if arm == "eager" else torch.compile(step.model, backend=backend, dynamic=False)
        while (begin := time.perf_counter()) - start < seconds:
            call(arrivals.choice(sentences))
            finish()
            calls.append(round(time.perf_counter() - begin, 6))
    states: dict[str, int] = {}
    if arm in OURS:
        import frame_swap

        for region in frame_swap.report().regions:
            states[region.state] = states.get(region.state, 0) + 1
    return {"arm": arm, "calls": calls, "states": states}


def spawn_arm(arm: str, args: argparse.Namespace) -> Run:
    """Call `run_arm` in a process of its own, with empty caches of Inductor and Triton."""
    with tempfile.TemporaryDirectory() as cache:
        caches = {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton"}
        command = [sys.executable, "-m", "benchmarks.serving", "--arm", arm, "--model", args.model]
        command += ["--shapes", str(args.shapes), "--seconds", str(args.seconds)]
        environment = {**os.environ, **caches, **ARMS[arm]}
        return output.run_arm(arm, command, environment)


# --- The figures ---


def ratios(runs: dict[str, Run]) -> dict[str, dict[str, float]]:
    """The figures of each arm, from the runs of one round."""
    eager = runs["eager"]["calls"]
    usual = statistics.median(eager)

    def of(calls: list[float]) -> dict[str, float]:
        return {
            "first call / eager's": calls[0] / eager[0],
            "worst call / eager's worst": max(calls) / max(eager),
            "worst call / eager's median": max(calls) / usual,
            "calls over 5 x eager's median": sum(call > 5 * usual for call in calls),
            "calls done / eager's": len(calls) / len(eager),
            "median of the last tenth / eager's": statistics.median(calls[-max(1, len(calls) // 10) :]) / usual,
        }

    return {arm: of(run["calls"]) for arm, run in runs.items()}


def by_half_second(run: Run) -> Run:
    """A run for the JSON file: of each half second, how many calls ended in it, and the longest of them, in ms."""
    slots: dict[float, list[float]] = {}
    for end, seconds in zip(accumulate(run["calls"]), run["calls"], strict=True):
        slots.setdefault(end // 0.5 / 2, []).append(round(1e3 * seconds, 2))
    ended = {slot: [len(calls), max(calls)] for slot, calls in slots.items()}
    return {**run, "calls": len(run["calls"]), "first_ms": round(1e3 * run["calls"][0], 2), "ended": ended}


def draw(runs: dict[str, Run], title: str) -> Figure:
    """The longest call of each half second over time, and calls done over time; a curve for each arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    worst, done = figure.subplots(1, 2)
    for arm, run in runs.items():
        ends = list(accumulate(run["calls"]))
        style = {"label": LABELS.get(arm, arm), "color": output.COLOURS[arm]}
        style["linewidth"] = 2.0 if arm in OURS else 1.3
        longest = {slot: milliseconds for slot, (_, milliseconds) in by_half_second(run)["ended"].items()}
        worst.step(list(longest), list(longest.values()), where="post", **style)
        done.plot(ends, range(1, len(ends) + 1), **style)
    worst.set_yscale("log")
    worst.set_ylabel("longest call of half a second, ms")
    done.set_ylabel("calls done")
    done.legend(frameon=False)
    for axes in (worst, done):
        axes.set_xlabel("seconds since torch.compile")
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bert-tiny", help="a model of sentences, in inference")
    parser.add_argument("--shapes", type=int, default=16, help="how many lengths: 8, 16, and so on")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long each arm serves")
    parser.add_argument("--runs", type=int, default=3, help="rounds of all arms; the medians are printed")
    parser.add_argument("--arms", default=",".join(ARMS), help="of these, with commas; eager is always among them")
    parser.add_argument("--out", type=Path, default=output.RESULTS)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(run_arm(args.arm, args.model, args.shapes, args.seconds)))
        return
    arms = list(dict.fromkeys(["eager", *args.arms.split(",")]))

    rounds: list[dict[str, Run]] = []
    for number in range(args.runs):
        runs: dict[str, Run] = {}
        for arm in arms:
            run = runs[arm] = spawn_arm(arm, args)
            calls = run["calls"]
            notes = f"{len(calls)} calls, first {1e3 * calls[0]:.0f} ms, worst {1e3 * max(calls):.0f} ms"
            notes += f", median {1e3 * statistics.median(calls):.1f} ms {run['states'] or ''}"
            print(f"round {number + 1}: {arm:10s} {notes}", flush=True)
        rounds.append(runs)

    tables = [ratios(runs) for runs in rounds]
    figures: dict[str, dict[str, float]] = {}
    for arm in arms:
        print(f"{LABELS.get(arm, arm)}:")
        figures[arm] = {}
        for name in tables[0][arm]:
            values = [table[arm][name] for table in tables]
            figures[arm][name] = statistics.median(values)
            print(f"  {name:40s} {figures[arm][name]:9.3f}   of {', '.join(f'{value:.3f}' for value in values)}")

    import torch

    what = f"{args.model}, {args.shapes} lengths, torch {torch.__version__}, {output.device_name()}"
    stem = args.out / f"serving-{args.model}-{output.device()}"
    kept = [{arm: by_half_second(run) for arm, run in runs.items()} for runs in rounds]
    output.write(stem, {"what": what, "figures": figures, "runs": kept}, draw(rounds[-1], what))


if __name__ == "__main__":
    main()
