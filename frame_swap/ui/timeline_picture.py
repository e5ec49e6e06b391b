"""`python -m frame_swap timeline`: what a timeline says, as text or as a picture."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Event = dict[str, Any]
Track = tuple[int, int]

COLOURS = {
    "capture": "#4c78a8",
    "ship": "#9ecae9",
    "prepare eager code": "#9ecae9",
    "queue": "#d8d8d8",
    "compile": "#f58518",
    "phase": "#ffbf79",
    "load": "#54a24b",
    "install": "#b279a2",
    "first compiled call": "#e45756",
}
"""By kind of work. Those of neighbours differ in lightness, too."""

STEPS = ("ship", "queue", "compile", "load", "install")
SHORTEST = 0.002
"""Of the whole time: a bar that is shorter is drawn as long as this, to be seen."""

LETTER = 0.0066
"""The width of a letter, of the whole picture's."""


def show(trace: Path, png: Path | None) -> None:
    """Print what the timeline in `trace` says, or draw it into `png`.

    Raises:
        SystemExit: the file is no timeline, or there is nothing to draw with.
    """
    try:
        events: list[Event] = json.loads(trace.read_text())["traceEvents"]
        slices = [event for event in events if event["ph"] == "X"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        advice = "frame_swap.timeline(...) writes one"
        raise SystemExit(f"frame-swap: {trace} is no timeline: {type(error).__name__}: {error}; {advice}") from None
    if png is None:
        print(summary(slices))
    else:
        draw(events, slices, png)


def summary(slices: Sequence[Event]) -> str:
    """A row for each graph and tier: seconds of each step, in 80 columns."""
    lines = [f"{'graph':34}{''.join(f'{step:>8}' for step in STEPS)}  seconds"]
    steps = [one for one in slices if one["cat"] in STEPS]
    tiers = dict.fromkeys((one["args"]["region"], one["args"]["tier"]) for one in steps if "tier" in one["args"])
    for region, tier in tiers:
        own = [one for one in steps if one["args"]["region"] == region and one["args"].get("tier", tier) == tier]
        took = {one["cat"]: one["dur"] / 1e6 for one in own}
        about = own[0]["args"]
        name, _, place = about["frame"].rpartition(", ")
        title = f"{about['id']} {name} {place.rpartition('/')[2]}{'' if tier == 'default' else f' ({tier})'}"
        lines.append(
            f"{title[:34]:34}{''.join(f'{took[s]:8.2f}' if s in took else ' ' * 8 for s in STEPS)}".rstrip()
        )
    return "\n".join(lines)


def draw(events: Sequence[Event], slices: Sequence[Event], png: Path) -> None:
    """Draw a lane for each track, with arrows from the queue to the worker and on to the install."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
        from matplotlib.patches import Patch
    except ImportError:
        raise SystemExit("frame-swap: there is nothing to draw with: pip install matplotlib") from None
    lanes = _lanes(events, slices)
    start = min((one["ts"] for one in slices), default=0.0)
    whole = max((one["ts"] + one["dur"] - start for one in slices), default=1.0) / 1e6
    figure, axes = pyplot.subplots(figsize=(16, 1.5 + 0.55 * len(lanes)), dpi=100)
    for one in sorted(slices, key=lambda one: -one["dur"]):
        track = one["pid"], one["tid"]
        deep = one["cat"] == "phase"
        began, took = (one["ts"] - start) / 1e6, max(one["dur"] / 1e6, SHORTEST * whole)
        height = 0.34 if deep else 0.8
        axes.broken_barh(
            [(began, took)],
            (lanes[track] - 0.4, height),
            facecolors=COLOURS.get(one["cat"], "#888888"),
            edgecolors="white",
            linewidth=0.5,
            zorder=3 if deep else 2,
        )
        if not deep and took > 0.012 * len(one["name"]) * whole * 0.55:
            axes.text(
                began + took / 2, lanes[track] + 0.18, one["name"], ha="center", va="center", fontsize=8, zorder=4
            )
    _draw_arrows(axes, events, slices, lanes, start)
    axes.set_yticks([*lanes.values()], [_title(events, track) for track in lanes])
    axes.invert_yaxis()
    axes.set_xlim(-0.01 * whole, 1.01 * whole)
    axes.set_xlabel("seconds")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    kinds = [kind for kind in COLOURS if any(one["cat"] == kind for one in slices)]
    axes.legend(
        [Patch(facecolor=COLOURS[kind]) for kind in kinds], kinds, ncols=len(kinds), loc="lower left",
        bbox_to_anchor=(0, 1), frameon=False,
    )  # fmt: skip
    figure.tight_layout()
    figure.savefig(png)
    pyplot.close(figure)
    print(f"drawn: {png}")


def _lanes(events: Sequence[Event], slices: Sequence[Event]) -> dict[Track, int]:
    """The place of each track that has something: the program's, then what waits, then workers."""
    order = {event["pid"]: event["args"]["sort_index"] for event in events if event["name"] == "process_sort_index"}
    tracks = sorted({(one["pid"], one["tid"]) for one in slices}, key=lambda t: (order.get(t[0], math.inf), t))
    return {track: at for at, track in enumerate(tracks)}


def _title(events: Sequence[Event], track: Track) -> str:
    named = [event for event in events if event["ph"] == "M" and event["pid"] == track[0]]
    process = next((e["args"]["name"] for e in named if e["name"] == "process_name"), str(track[0]))
    thread = next((e["args"]["name"] for e in named if e["name"] == "thread_name" and e["tid"] == track[1]), "")
    return thread if process in ("program", "queue") else process


def _draw_arrows(
    axes: Any, events: Sequence[Event], slices: Sequence[Event], lanes: dict[Track, int], start: float
) -> None:
    """From the end of one step to the begin of the next, as Perfetto draws them."""
    looks = {"arrowstyle": "->", "color": "#333333", "lw": 0.8, "alpha": 0.6}
    steps = [one for one in slices if one["cat"] in STEPS]
    points: dict[int, dict[str, tuple[float, int]]] = {}
    for event in events:
        if event["ph"] not in ("s", "f"):
            continue
        track, at = (event["pid"], event["tid"]), event["ts"]
        around = (one for one in steps if (one["pid"], one["tid"]) == track and 0 <= at - one["ts"] <= one["dur"])
        if event["ph"] == "s" and (step := next(around, None)) is not None:
            at = step["ts"] + step["dur"]
        points.setdefault(event["id"], {})[event["ph"]] = (at - start) / 1e6, lanes[track]
    for flow in points.values():
        axes.annotate("", flow["f"], flow["s"], arrowprops=looks, zorder=5)
