"""The first call of a program's second process, beside Dynamo alone and stock with its caches filled.

    python -m benchmarks.warm_start [--model bert-4] [--infer] [--runs 5] [--processes 8]

For each arm that keeps something one process fills its caches; then the arms' second processes run in turn, each
with the caches of its arm. Each builds the model and makes one eager step, so that starting the libraries is not
measured. Then it starts the clock, calls `torch.compile`, and makes a first step. The arms "imported" import what
loading compiled code needs before the clock starts; the arms "frames" set `keep_frames`, and "packages" sets
`artifact="aoti"`, which is for inference. At last so many processes
start at once with an empty store; their compiles are counted. Writes a JSON file and a picture; prints the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Run = dict[str, Any]
"""One process: seconds of the `first` call and of the `second`; of ours also `states`, `stores` and `workers`."""


class Arm(NamedTuple):
    """A backend of `torch.compile`, whether its caches are filled, and the variables that it is run with."""

    backend: str
    filled: bool
    environment: dict[str, str] = {}  # noqa: RUF012 - nobody changes it
    imported: bool = False


_FRAMES = {"FRAME_SWAP_KEEP_FRAMES": "1"}

ARMS = {
    "dynamo": Arm("eager", filled=False),
    "inductor": Arm("inductor", filled=True),
    "precompile": Arm("inductor", filled=True, environment={"TORCH_CACHING_PRECOMPILE": "1"}),
    "frame_swap": Arm("frame_swap", filled=True),
    "frame_swap_imported": Arm("frame_swap", filled=True, imported=True),
    "frame_swap_packages": Arm("frame_swap", filled=True, environment={"FRAME_SWAP_ARTIFACT": "aoti"}),
    "frame_swap_frames": Arm("frame_swap", filled=True, environment=_FRAMES),
    "frame_swap_frames_imported": Arm("frame_swap", filled=True, environment=_FRAMES, imported=True),
}
LABELS = {
    "dynamo": "Dynamo alone",
    "inductor": "stock, caches filled",
    "precompile": "stock, caching_precompile",
    "frame_swap": "frame_swap",
    "frame_swap_imported": "frame_swap, Inductor imported before",
    "frame_swap_packages": "frame_swap, packages of AOTInductor's",
    "frame_swap_frames": "frame_swap, frames kept",
    "frame_swap_frames_imported": "frame_swap, frames kept, Inductor imported before",
}
OURS = tuple(arm for arm, about in ARMS.items() if about.backend == "frame_swap")


def run_arm(arm: str, model: str, train: bool) -> Run:
    """Make the first two steps in this process."""
    import torch

    from . import models

    device = output.device()
    step = models.make(model, train, device)
    step.run(step.model)
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    if ARMS[arm].imported:
        from frame_swap.artifacts import load

        load.prepare()
    finish()
    ends = [time.perf_counter()]
    call = torch.compile(step.model, backend=ARMS[arm].backend)
    for _ in range(2):
        step.run(call)
        finish()
        ends.append(time.perf_counter())
    result: Run = {"arm": arm, "first": ends[1] - ends[0], "second": ends[2] - ends[1]}
    if arm in OURS:
        import frame_swap
        from frame_swap.farm.workers import workers

        result["workers"] = len(workers.pids())
        rows = frame_swap.report().regions
        result["states"], result["loads"] = [row.state for row in rows], [row.load_s for row in rows]
        frame_swap.wait()
        result["stores"] = [row.store for row in frame_swap.report().regions]
    return result


def command_of(arm: str, args: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.warm_start", "--arm", arm, "--model", args.model]
    return command + (["--infer"] if args.infer else [])


def environment_of(arm: str, folder: str) -> dict[str, str]:
    places = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
    return {**os.environ, **places, "FRAME_SWAP_STORE": "on", **ARMS[arm].environment}


def spawn_arm(arm: str, folder: str, args: argparse.Namespace) -> Run:
    """Call `run_arm` in a process of its own, with its caches in `folder`."""
    return output.run_arm(arm, command_of(arm, args), environment_of(arm, folder))


def at_once(processes: int, args: argparse.Namespace) -> list[Run]:
    """Processes that start at the same time, with an empty store."""
    with tempfile.TemporaryDirectory() as folder:
        environment = environment_of("frame_swap", folder)
        arm = "frame_swap", command_of("frame_swap", args), environment
        with ThreadPoolExecutor(processes) as threads:
            return [run.result() for run in [threads.submit(output.run_arm, *arm) for _ in range(processes)]]


def draw(figures: dict[str, list[float]], title: str) -> Figure:
    """A bar for each arm: the seconds of the first call."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.55 * len(figures) + 1.3), layout="constrained")
    axes = figure.subplots()
    names = list(figures)[::-1]
    colours = [output.COLOURS["frame_swap" if name in OURS else name] for name in names]
    axes.barh([LABELS[name] for name in names], [statistics.median(figures[name]) for name in names], color=colours)
    for name in names:
        axes.plot(figures[name], [LABELS[name]] * len(figures[name]), ".", color="black", markersize=3)
    axes.set_xlabel("seconds from torch.compile to the end of the first step, second process")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bert-4", help="of benchmarks.models")
    parser.add_argument("--infer", action="store_true", help="inference instead of training")
    parser.add_argument("--runs", type=int, default=5, help="second processes of each arm; medians are printed")
    parser.add_argument("--processes", type=int, default=8, help="how many start at once; 0 leaves that out")
    parser.add_argument("--arms", default=",".join(ARMS), help="of these, with commas; dynamo is always among them")
    parser.add_argument("--out", type=Path, default=output.RESULTS)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(run_arm(args.arm, args.model, not args.infer)))
        return
    arms = list(dict.fromkeys(["dynamo", *args.arms.split(",")]))

    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as folder:
        for arm in (arm for arm in arms if ARMS[arm].filled):
            cold = spawn_arm(arm, f"{folder}/{arm}", args)
            print(f"{arm:20s} first process: {cold['first']:.2f} s", flush=True)
        for number in range(args.runs):
            for arm in arms:
                runs.append(run := spawn_arm(arm, f"{folder}/{arm}", args))
                notes = {name: run[name] for name in ("states", "stores", "workers") if name in run}
                print(
                    f"round {number + 1}: {arm:20s} {run['first']:.2f} s, then {run['second']:.3f} {notes or ''}",
                    flush=True,
                )

    first = {arm: [run["first"] for run in runs if run["arm"] == arm] for arm in arms}
    figures: dict[str, float] = {}
    for arm in (arm for arm in arms if arm in OURS):
        for rival in (arm for arm in arms if arm not in OURS):
            pairs = zip(first[arm], first[rival], strict=True)
            figures[f"{LABELS[arm]} / {LABELS[rival]}"] = statistics.median(ours / theirs for ours, theirs in pairs)
    crowd = at_once(args.processes, args) if args.processes else []
    if crowd:
        stores = [store for run in crowd for store in run["stores"]]
        graphs = len(crowd[0]["stores"])
        figures[f"compiles of each graph, {args.processes} processes at once"] = stores.count("kept") / graphs
    for name, value in figures.items():
        print(f"{name:70s} {value:7.3f}")

    import torch

    kind = "inference" if args.infer else "training"
    what = f"{args.model}, {kind}, torch {torch.__version__}, {output.device_name()}"
    stem = args.out / f"warm_start-{args.model}-{kind}-{output.device()}"
    output.write(stem, {"what": what, "figures": figures, "runs": runs, "at_once": crowd}, draw(first, what))


if __name__ == "__main__":
    main()
