"""What a farm of compiling machines brings: many programs at once, simulated; and a swap by way of Dask, measured.

    python -m benchmarks.farm [--programs 64] [--graphs 30] [--workers 16]
    python -m benchmarks.farm --dask [--model bert-4] [--runs 3]

The simulation has a clock of its own, and frame-swap's own protocol: each program's `SingleFlight` claims, waits
and takes over in a store on the disk, and a farm takes compiles in the order in which they come. Only the compile
is replaced, by a length of time: 15 s in the middle, two thirds between 7 and 32. Programs start within 5 s, and
capture a graph each half second. Three kinds of programs: all alike; in families of eight; all different.

With --dask a program steps until its graph is swapped, with frame-swap's own workers and with a Dask cluster of one
process on the same machine, in turn, with empty caches. The cluster is up, and has compiled another graph before,
as one that outlives programs. Writes a JSON file; prints a table.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from frame_swap.artifacts.store.disk import Disk
from frame_swap.farm.protocol import Outcome
from frame_swap.farm.reuse import Place
from frame_swap.farm.single_flight import SingleFlight, Wanted

from . import output

LOOK = 0.5
"""Seconds of the simulation's clock between two looks whether another program is done. Ours is a tenth."""


class Clock:
    """Time that goes from event to event."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, len(self._events) + random.getrandbits(40), event))

    def run(self) -> None:
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()


class Farm:
    """Workers that take compiles in the order in which they come."""

    def __init__(self, clock: Clock, workers: int) -> None:
        self._clock = clock
        self._idle = workers
        self._queue: deque[tuple[float, Future[Outcome]]] = deque()
        self.work = 0.0
        self.compiled: Counter[str] = Counter()

    def submit(self, key: str, seconds: float) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        self.compiled[key] += 1
        self.work += seconds
        self._queue.append((seconds, future))
        self._begin()
        return future

    def _begin(self) -> None:
        while self._idle and self._queue:
            self._idle -= 1
            seconds, future = self._queue.popleft()
            self._clock.after(seconds, lambda future=future: self._end(future))  # type: ignore[misc]

    def _end(self, future: Future[Outcome]) -> None:
        self._idle += 1
        future.set_result(Outcome(b"artifact", b"", "", "", 0.0, 0.0, 0.0, 1))
        self._begin()


class Program:
    """One that wants graphs, and shares a store with the others."""

    def __init__(self, clock: Clock, farm: Farm, store: Disk) -> None:
        self._clock, self._farm, self._store = clock, farm, store
        self._flight = SingleFlight()
        self._flight._thread = self  # type: ignore[assignment]  # the clock has it look, no thread does
        self._wanted = 0
        self.last_swap = 0.0

    def wants(self, key: str, seconds: float) -> None:
        def start() -> Future[Outcome]:
            return self._farm.submit(key, seconds)

        self._wanted += 1
        wanted = Wanted(Place(self._store, key), lambda: b"", start, lambda: True, 1e9)  # type: ignore[arg-type]
        self._flight.begin(wanted).add_done_callback(self._swapped)
        if self._wanted == 1:
            self._look()

    def _swapped(self, future: Future[Outcome]) -> None:
        assert future.result().artifact is not None
        self._wanted -= 1
        self.last_swap = self._clock.now

    def _look(self) -> None:
        self._flight.look()
        if self._wanted:
            self._clock.after(LOOK, self._look)


def simulate(kind: str, programs: int, graphs: int, workers: int) -> dict[str, float]:
    """The figures of one kind of programs; see the head of this module."""
    random.seed(0)
    family = {"all alike": programs, "families of eight": 8, "all different": 1}[kind]
    lengths: dict[str, float] = {}
    clock = Clock()
    farm = Farm(clock, workers)
    with tempfile.TemporaryDirectory() as folder:
        everyone = []
        for number in range(programs):
            program = Program(clock, farm, Disk(folder, 1e9))
            everyone.append(program)
            start = random.uniform(0, 5)
            for index in range(graphs):
                key = f"{number // family:032x}{index:032x}"
                seconds = lengths.setdefault(key, min(90.0, random.lognormvariate(2.7, 0.75)))
                clock.after(start + index / 2, lambda p=program, k=key, s=seconds: p.wants(k, s))  # type: ignore[misc]
        clock.run()
    last = [program.last_swap for program in everyone]
    even = sum(lengths.values()) / workers
    return {
        "graphs": len(lengths),
        "compiles / graphs": sum(farm.compiled.values()) / len(lengths),
        "work without a store / work done": sum(lengths[key] for key in lengths) * family / farm.work,
        "last swap, s": max(last),
        "last swap / (work / workers)": max(last) / even,
        "last swap / the least that can be": max(last) / max(even, max(lengths.values())),
        "slowest program's last swap / the fastest's": max(last) / min(last),
    }


# --- Dask ---


def run_program(arm: str, model: str, address: str) -> dict[str, Any]:
    """Step until the swap, in this process."""
    import frame_swap

    from . import models

    step = models.make(model, True, output.device())
    step.run(step.model)
    import torch

    if arm == "dask":
        from distributed import Client

        client = Client(address, timeout=60)
        frame_swap.configure(executor=client.get_executor())
    start = time.time()
    compiled = torch.compile(step.model, backend="frame_swap")
    steps = 0
    while not steps or any(region.state != "installed" for region in frame_swap.report().regions):
        step.run(compiled)
        steps += 1
    regions = frame_swap.report().regions
    return {"swap": max(region.installed_at or 0 for region in regions) - start, "steps": steps}


def warm_up(address: str) -> None:
    """Have the cluster compile another graph."""
    import torch
    from distributed import Client

    import frame_swap

    with Client(address, timeout=60) as client:
        frame_swap.configure(executor=client.get_executor(), store="off")
        torch.compile(lambda x: x.sin() + 1, backend="frame_swap")(torch.ones(3))
        frame_swap.wait()
        frame_swap.configure(executor=None)


def measure_dask(model: str, runs: int) -> dict[str, Any]:
    """Seconds to the swap in each round, by arm, and the ratio of their medians."""
    from distributed import LocalCluster

    rounds: dict[str, list[float]] = {"own": [], "dask": []}
    for number in range(runs):
        for arm in rounds:
            with tempfile.TemporaryDirectory() as cache:
                folders = {"TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor", "TRITON_CACHE_DIR": f"{cache}/triton"}
                environment = {**os.environ, **folders, "FRAME_SWAP_STORE": "off"}
                command = [sys.executable, "-m", "benchmarks.farm", "--arm", arm, "--model", model]
                if arm == "own":
                    run = output.run_arm(arm, command, environment)
                else:
                    os.environ.update(folders)  # the cluster's processes inherit them
                    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster:
                        warm_up(cluster.scheduler_address)
                        run = output.run_arm(arm, [*command, "--address", cluster.scheduler_address], environment)
            rounds[arm].append(run["swap"])
            print(f"round {number + 1}: {arm:5s} swap after {run['swap']:6.2f} s, {run['steps']} steps", flush=True)
    ratio = statistics.median(rounds["dask"]) / statistics.median(rounds["own"])
    print(f"swap by way of Dask / our own workers: {ratio:.3f}")
    return {"rounds": rounds, "swap by way of Dask / our own workers": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=64)
    parser.add_argument("--graphs", type=int, default=30, help="of each program")
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--dask", action="store_true", help="measure a swap by way of a Dask cluster")
    parser.add_argument("--model", default="bert-4")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=output.RESULTS)
    parser.add_argument("--arm", choices=("own", "dask"), help=argparse.SUPPRESS)
    parser.add_argument("--address", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(run_program(args.arm, args.model, args.address)), flush=True)
        os._exit(0)  # without waiting for Dask's threads
    if args.dask:
        stem, results = args.out / f"farm-dask-{args.model}-{output.device()}", measure_dask(args.model, args.runs)
    else:
        kinds = ("all alike", "families of eight", "all different")
        results = {kind: simulate(kind, args.programs, args.graphs, args.workers) for kind in kinds}
        title = f"{args.programs} programs × {args.graphs} graphs, {args.workers} workers, simulated"
        table = Table("", *kinds, title=title)
        for figure in results[kinds[0]]:
            table.add_row(figure, *(f"{results[kind][figure]:.2f}" for kind in kinds))
        Console().print(table)
        stem = args.out / "farm-simulated"
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1))
    print(f"wrote {stem}.json")


if __name__ == "__main__":
    main()
