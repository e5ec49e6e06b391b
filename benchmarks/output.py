"""Parts that all benchmarks share: the device, its name, colours, and writing of results."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"

COLOURS = {
    "eager": "#9a9a9a",
    "dynamo": "#5c5c5c",
    "aot_eager": "#c9a227",
    "inductor": "#3b6fb6",
    "upstream_async": "#7fb2e5",
    "precompile": "#7fb2e5",
    "frame_swap": "#c8102e",
    "graph": "#c8102e",
    "pair": "#e8743b",
    "background": "#6a2fb5",
    "opt_in": "#e8743b",
    "static": "#f0b27a",
    "function": "#a3c4a3",
    "call": "#5a8f5a",
}


def device() -> str:
    """The device of the benchmarks: "cuda" if there is one, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    """The device, for the title of a picture: the GPU's name, or the number of CPU cores for this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{len(os.sched_getaffinity(0))} CPU cores"


def run_arm(name: str, command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """What an arm's process prints last, as JSON.

    Raises:
        SystemExit: it failed; with the end of what it wrote to its standard error.
    """
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def without_folders(text: str) -> str:
    """`text` with the names of files in place of their paths, which are of the machine that measured."""
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+(?=[\w.+-]+)", "", text)


def finish(axes: Axes, what: str, title: str) -> None:
    """Label a picture of `what`, from 0 on, over the seconds since `torch.compile`, once all is drawn."""
    axes.set_xlabel("seconds since torch.compile")
    axes.set_ylabel(what)
    axes.set_ylim(0)
    axes.set_title(title, fontsize=11)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def write(stem: Path, results: dict[str, Any], figure: Figure) -> None:
    """Write `stem`.json and `stem`.png, and print their names."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(without_folders(json.dumps(results)))
    figure.savefig(stem.with_suffix(".png"), dpi=130)
    print(f"wrote {stem}.json and {stem}.png")
