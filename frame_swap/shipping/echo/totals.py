"""Metrics, counters and times of compiles: read, subtracted in the worker, added in the calling process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ...internals import dynamo, inductor
from .message import Totals


def read() -> Totals:
    """The totals of this process."""
    metrics = vars(inductor.metrics())
    numbers = {n: v for n, v in metrics.items() if isinstance(v, (int, float)) and not n.startswith("_")}
    lists = {name: list(value) for name, value in metrics.items() if isinstance(value, list)}
    counts = {
        (category, key): count
        for category, counter in list(dynamo.counters.items())
        for key, count in list(counter.items())
    }
    times = {name: list(seconds) for name, seconds in list(dynamo.compilation_time_metrics.items())}
    return Totals(numbers, counts, lists, times)


def added(before: Totals, after: Totals) -> Totals:
    """What came in between, in values that pickle."""

    def portable(item: Any) -> Any:  # a scheduler's node drags its graph along: its name stands for it
        if isinstance(item, tuple):
            return tuple(map(portable, item))
        return item.get_name() if inductor.is_scheduler_node(item) else item

    def tails(old: dict[str, list[Any]], new: dict[str, list[Any]]) -> dict[str, list[Any]]:
        more = {name: items[len(old.get(name, ())) :] for name, items in new.items()}
        return {name: list(map(portable, items)) for name, items in more.items() if items}

    metrics = {name: number - before.metrics.get(name, 0) for name, number in after.metrics.items()}
    counters = {key: count - before.counters.get(key, 0) for key, count in after.counters.items()}
    return Totals(
        {name: number for name, number in metrics.items() if number},
        {key: count for key, count in counters.items() if count},
        tails(before.metric_lists, after.metric_lists),
        tails(before.times, after.times),
    )


def add(totals: Totals) -> None:
    """Add to the totals of this process. For a caller that holds Dynamo's compile lock."""
    metrics = inductor.metrics()
    for name, number in totals.metrics.items():
        setattr(metrics, name, getattr(metrics, name) + number)
    for name, items in totals.metric_lists.items():
        getattr(metrics, name).extend(items)
    for (category, key), count in totals.counters.items():
        dynamo.counters[category][key] += count
    for name, seconds in totals.times.items():
        dynamo.compilation_time_metrics.setdefault(name, []).extend(seconds)


@contextlib.contextmanager
def graph_not_counted() -> Iterator[None]:
    """AOTAutograd's count of graphs stays as it is: the compile counts this one."""
    counter = dynamo.counters["aot_autograd"]
    counted = {key: counter[key] for key in ("total", "ok")}
    try:
        yield
    finally:
        for key, count in counted.items():
            counter[key] = count
