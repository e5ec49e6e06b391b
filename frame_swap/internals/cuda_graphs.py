"""CUDA graphs that are recorded when the program can afford it, not in the first calls after a swap.

Inductor records a graph in the second call of compiled code, which then takes as long as several. While other
graphs of the program are still being compiled, more such calls lie ahead, and what is recorded among eager code is
recorded anew when that is swapped: a recording belongs to the graphs that ran before it in the same step. So
compiled code runs without CUDA graphs until no other is awaited.

Guarantees:
- Without CUDA graphs compiled code computes the same, and its outputs are not overwritten by later calls.
- A backward runs in CUDA graphs only when a forward of the same compile has begun to.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

MOST_CALLS_WITHOUT = 500
"""After so many calls a graph is recorded, whatever else is awaited: a program may go on making new graphs."""

_CALLS_THAT_RECORD = 2  # the first warms up, the second records

Boxed = Callable[[list[Any]], Any]


class Recording:
    """When the CUDA graphs of one compile are recorded, and how long that took.

    Args:
        can_afford: whether the program can afford it now.

    Attributes:
        planned: whether there is anything to record.
        calls_without: calls of the forward that ran without CUDA graphs.
        begun: whether recording has begun.
        seconds: what the calls took that warmed up and recorded.
    """

    def __init__(self, can_afford: Callable[[], bool]) -> None:
        self._can_afford = can_afford
        self.planned = False
        self.calls_without = 0
        self.begun = False
        self.seconds = 0.0

    def __str__(self) -> str:
        if not self.planned:
            return ""
        if not self.begun and not self.calls_without:
            return "not yet recorded"
        if not self.begun:
            return f"not yet recorded, since other graphs are awaited: {self._calls()} without"
        return f"recorded after {self._calls()} without, within calls of {1e3 * self.seconds:.0f} ms in all"

    def _calls(self) -> str:
        return f"{self.calls_without} call{'s' * (self.calls_without != 1)}"

    def begins(self) -> bool:
        """Whether a call of the forward that comes now is to run in CUDA graphs."""
        if not self.begun:
            self.begun = self.calls_without >= MOST_CALLS_WITHOUT or self._can_afford()
            self.calls_without += not self.begun
        return self.begun

    def put_off(self, recorded: Boxed, plain: Boxed, *, is_backward: bool) -> Boxed:
        """A function that calls `plain` until recording begins, and then `recorded`."""
        self.planned = True
        calls = 0
        call: Boxed

        def first(inputs: list[Any]) -> Any:
            nonlocal call, calls
            if not (self.begun if is_backward else self.begins()):
                return plain(inputs)
            calls += 1
            if calls >= _CALLS_THAT_RECORD:
                call = recorded
            start = time.perf_counter()
            try:
                return recorded(inputs)
            finally:
                self.seconds += time.perf_counter() - start

        call = first

        def run(inputs: list[Any]) -> Any:
            return call(inputs)

        return run


@contextlib.contextmanager
def put_off(recording: Recording | None) -> Iterator[None]:
    """Within the block, what Inductor loads is recorded when `recording` says so; None stands for at once.

    Process-wide: the compile lock is held meanwhile.
    """
    if recording is None:
        yield
        return
    compile_fx: Any = importlib.import_module("torch._inductor.compile_fx")
    usual = compile_fx.cudagraphify

    def cudagraphify(model: Boxed, static_input_idxs: Any = (), **keywords: Any) -> Boxed:
        recorded = usual(model, static_input_idxs, **keywords)
        is_backward = bool(keywords.get("is_backward"))
        plain = _plain(
            model, keywords.get("mutated_input_idxs", ()), keywords["device_index"] if is_backward else None
        )
        return recording.put_off(recorded, plain, is_backward=is_backward)

    compile_fx.cudagraphify = cudagraphify
    try:
        yield
    finally:
        compile_fx.cudagraphify = usual


def _plain(model: Boxed, mutated: Any, backward_on: int | None) -> Boxed:
    """`model` without CUDA graphs: with inputs as aligned as its kernels may take them to be.

    Args:
        mutated: indices of the inputs that it changes.
        backward_on: the index of its GPU, if it is a backward.
    """
    aligned: Boxed | None = None

    def run(inputs: list[Any]) -> Any:
        nonlocal aligned
        if aligned is None:
            from torch._inductor.utils import align_inputs_from_check_idxs
            from torch.utils._ordered_set import OrderedSet

            on_gpu = [i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor) and x.device.type != "cpu"]
            aligned = align_inputs_from_check_idxs(model, on_gpu, OrderedSet(mutated))
        if backward_on is not None:
            _tell_of_backward(backward_on)
        return aligned(inputs)

    return run


def _tell_of_backward(device: int) -> None:
    """Tell the manager of this thread's CUDA graphs, if there is one, that the step has come to a backward."""
    from torch._inductor.cudagraph_trees import get_manager

    manager = get_manager(device, create_if_none_exists=False)
    if manager is not None:
        manager.set_to_running_backward()
