"""Where results go and what they say of the machine: what all benchmarks share."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"

COLOURS = {
    "eager": "#9a9a9a",
    "aot_eager": "#c9a227",
    "inductor": "#3b6fb6",
    "upstream_async": "#7fb2e5",
    "frame_swap": "#c8102e",
    "opt_in": "#e8743b",
    "static": "#f0b27a",
    "function": "#a3c4a3",
    "call": "#5a8f5a",
}


def device() -> str:
    """Where benchmarks run: "cuda" where there is one, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    """The machine in a picture's title: the GPU, or how many CPU cores this process may use."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{len(os.sched_getaffinity(0))} CPU cores"


def write(stem: Path, results: dict[str, Any], figure: Figure) -> None:
    """Write `stem`.json and `stem`.png, and say so."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(results))
    figure.savefig(stem.with_suffix(".png"), dpi=130)
    print(f"wrote {stem}.json and {stem}.png")
