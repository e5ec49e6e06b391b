"""`profit=True`: time the first calls on eager code and on compiled code, and reject compiled code that is slower.

Of each two calls eager code serves one and compiled code the other, in random order; so neither gets all the larger
inputs if sizes alternate. Measured are the graph's call and the backward of that call, if it has run by the time of
the verdict: from the moment autograd's engine enters its first node until it leaves its last. On an accelerator
both ends wait for the device. Calls made while workers compile are not measured, since workers then take
CPUs from both sides.

Gradients of leaves are accumulated between the nodes of Dynamo's graph, and after the one node of compiled code. It
costs nothing where `.grad` is None. Where there is something to add to, or a hook, it counts against eager code.

Medians are compared. The noise of a median is the half-width of a box plot's notch, 1.57 × interquartile range /
√n (McGill, Tukey and Larsen, "Variations of Box Plots", The American Statistician 32(1), 1978): if two notches do
not overlap, the medians differ at about the 95% level. Compiled code is rejected if it is slower and the notches do
not overlap. Autotuned code, which is to replace compiled code, is rejected unless it is faster and they do not.
"""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..internals import dynamo, eager, eval_frame
from .trial import Findings, Sides, Trial

WARM_UP = 3
"""The first calls of each side are not measured: they allocate, load kernels and fill caches."""

CALLS = 20
"""Measured calls of each side."""


@dataclasses.dataclass
class _Sample:
    """Seconds of one call; `backward` is None until the backward has run."""

    forward: float = 0.0
    backward: float | None = None


@dataclasses.dataclass(frozen=True)
class Figure:
    """A median with its noise, both in seconds."""

    median: float
    noise: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Figure:
        """The figure of at least two measurements."""
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(statistics.median(seconds), 1.57 * (high - low) / math.sqrt(len(seconds)))

    def slower_than(self, other: Figure) -> bool:
        """Whether this median is larger by more than both noises together."""
        return self.median - self.noise > other.median + other.noise

    def __str__(self) -> str:
        return f"{self.median * 1e3:.3g} ± {self.noise * 1e3:.2g} ms"


class Measurement(Trial):
    """The trial that rejects compiled code if it is slower than what serves now.

    Args:
        undisturbed: tells whether a time measured now is meaningful: no worker compiles.
        must_gain: reject it also where it is not faster.
        clock: returns seconds; a test gives its own.
    """

    def __init__(
        self,
        undisturbed: Callable[[], bool],
        clock: Callable[[], float] = time.perf_counter,
        *,
        must_gain: bool = False,
    ) -> None:
        super().__init__()
        self._must_gain = must_gain
        self._undisturbed = undisturbed
        self._clock = clock
        self._random = random.Random(0)
        self._turns: list[str] = []
        self._samples: dict[str, list[_Sample]] = {"current": [], "compiled": []}

    def call(self, sides: Sides, args: Sequence[Any]) -> Any:
        if not self._undisturbed() or eval_frame.watched_by_mode():
            return sides.compiled(*args)
        if not self._turns:
            self._turns = self._random.sample(["current", "compiled"], 2)
        side = self._turns.pop()
        sample = _Sample()
        outputs = self._timed(sides.current if side == "current" else sides.compiled, args, sample)
        self._samples[side].append(sample)
        if all(len(samples) >= WARM_UP + CALLS for samples in self._samples.values()):
            self._decide()
        return outputs

    def _timed(self, call: Callable[..., Any], args: Sequence[Any], sample: _Sample) -> Any:
        devices = {x.device for x in args if isinstance(x, Tensor) and x.device.type != "cpu"}
        before = [node for x in args if (node := _node(x)) is not None]
        _synchronise(devices)
        start = self._clock()
        outputs = call(*args)
        _synchronise(devices)
        sample.forward = self._clock() - start
        if (nodes := _Nodes.of([*outputs, *args], before)) is not None:
            self._time_backward(nodes, devices, sample)
        return outputs

    def _time_backward(self, nodes: _Nodes, devices: Iterable[torch.device], sample: _Sample) -> None:
        start: dict[int, float] = {}  # by the number of the backward: a graph may have several, and parts of one

        def enter(gradients: Any) -> None:
            if (backward := eager.number_of_backward()) not in start:
                _synchronise(devices)
                start[backward] = self._clock()

        def leave(inputs: Any, outputs: Any) -> None:
            _synchronise(devices)
            if sample.backward is None and (began := start.get(eager.number_of_backward())) is not None:
                sample.backward = self._clock() - began

        for function in (enter, leave):
            dynamo.skip_frames(function.__code__)
        for node in nodes.first:
            node.register_prehook(enter)
        nodes.last.register_hook(leave)

    def _decide(self) -> None:
        counted = {side: samples[WARM_UP:] for side, samples in self._samples.items()}
        whole = {side: [s for s in samples if s.backward is not None] for side, samples in counted.items()}
        backward = all(len(samples) >= CALLS // 2 for samples in whole.values())
        chosen = whole if backward else counted
        seconds = {side: [s.forward + (s.backward or 0.0) * backward for s in chosen[side]] for side in chosen}
        current, compiled = Figure.of(seconds["current"]), Figure.of(seconds["compiled"])
        what = "forward and backward" if backward else "forward"
        figures = f"{compiled} a call, {current} before ({what}, medians of {len(seconds['compiled'])} calls)"
        self.findings = Findings(profit=figures)
        self.expected = self._must_gain  # autotuning that gains nothing is no fault
        if compiled.slower_than(current):
            self.verdict = f"it is slower than what serves now: {figures}"
        elif self._must_gain and not current.slower_than(compiled):
            self.verdict = f"it is not faster than what serves now: {figures}"
        else:
            self.verdict = ""


def _synchronise(devices: Iterable[torch.device]) -> None:
    for device in devices:
        torch.accelerator.synchronize(device)


class _Nodes(NamedTuple):
    """Autograd's nodes of one call.

    Attributes:
        first: those of its outputs: one of them is the first to run in a backward.
        last: of those that lead out of the call, the one made first. Autograd's engine takes, of all nodes that are
            ready, the one made last: so this one runs last.
    """

    first: list[Any]
    last: Any

    @classmethod
    def of(cls, outputs: Iterable[Any], before: Iterable[Any]) -> _Nodes | None:
        """The nodes of a call; None if nothing of it has a backward.

        Args:
            outputs: of the call, and the arguments, which it may have changed.
            before: the nodes of the arguments before the call.
        """
        outside = set(before)
        first = list({node: None for x in outputs if (node := _node(x)) is not None and node not in outside})
        seen, to_visit, leading_out = set(first), list(first), []
        while to_visit:
            node = to_visit.pop()
            following = [n for n, _ in node.next_functions if n is not None]
            inside = [n for n in following if n not in outside and not eager.accumulates(n)]
            if len(inside) < len(following):
                leading_out.append(node)
            to_visit += (new := [n for n in dict.fromkeys(inside) if n not in seen])
            seen.update(new)
        return cls(first, min(leading_out, key=eager.sequence_number)) if leading_out else None


def _node(value: Any) -> Any | None:
    return value.grad_fn if isinstance(value, Tensor) else None
