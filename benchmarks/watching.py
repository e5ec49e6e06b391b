"""What it costs a training step of the 4-layer BERT that somebody watches its compile.

    python -m benchmarks.watching [--steps 20] [--rounds 15]

One process; its graph waits for a worker that never comes, so that the machine is as quiet as it gets. In each
round a block of steps runs with nobody watching, one with `frame_swap.watch()` drawing on a terminal, and one with
`verbose=1`, in random order. Prints the median of the rounds' ratios to nobody watching, and writes them as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any

from . import models, output

ARMS = ("nobody", "watch", "verbose")


class Never(Executor):
    """Takes jobs, and begins none."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """A future that never ends."""
        return Future()


class Screen(io.StringIO):
    """A terminal that nobody sees."""

    def isatty(self) -> bool:
        """It says that it is one."""
        return True


@contextlib.contextmanager
def watched(arm: str) -> Iterator[None]:
    """Within the block somebody watches, as `arm` says."""
    import frame_swap

    stderr, sys.stderr = sys.stderr, Screen()
    try:
        frame_swap.configure(verbose=int(arm == "verbose"))
        with frame_swap.watch() if arm == "watch" else contextlib.nullcontext():
            if arm == "watch":
                time.sleep(3.0)  # until the bar is there
            yield
    finally:
        sys.stderr = stderr


def main() -> None:
    """Measure, print and write."""
    import frame_swap

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=15)
    chosen = parser.parse_args()
    frame_swap.configure(executor=Never(), store="off")
    step = models.make("bert-4", True, output.device())
    import torch

    compiled = torch.compile(step.model, backend="frame_swap")
    step.run(compiled)
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for _ in range(chosen.rounds):
        for arm in random.sample(ARMS, len(ARMS)):
            with watched(arm):
                step.run(compiled)
                began = time.perf_counter()
                for _ in range(chosen.steps):
                    step.run(compiled)
                seconds[arm].append((time.perf_counter() - began) / chosen.steps)
    ratios = {
        arm: statistics.median(one / plain for one, plain in zip(seconds[arm], seconds["nobody"], strict=True))
        for arm in ARMS
    }
    print(f"a step takes {1e3 * statistics.median(seconds['nobody']):.1f} ms with nobody watching")
    for arm in ARMS[1:]:
        print(f"{arm}: {ratios[arm]:.3f} of that")
    path = output.RESULTS / f"watching-{output.device()}.json"
    path.write_text(json.dumps({"seconds": seconds, "ratios": ratios, "device": output.device_name()}))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
