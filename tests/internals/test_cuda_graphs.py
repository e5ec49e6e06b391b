"""When CUDA graphs are recorded, as far as it goes without a GPU; the rest is in program/test_gpu.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from frame_swap import region
from frame_swap.internals import cuda_graphs
from frame_swap.internals.cuda_graphs import Boxed, Recording
from frame_swap.region import Event, Purpose, record

pytestmark = pytest.mark.quick


def loaded(
    recording: Recording | None, monkeypatch: pytest.MonkeyPatch, *, is_backward: bool = False
) -> tuple[Callable[[], Any], list[str]]:
    """A call of compiled code that Inductor loads for CUDA graphs, and which of both it has run."""
    from torch._inductor import compile_fx

    ran: list[str] = []

    def in_graphs(model: Boxed, static_input_idxs: Any = (), **keywords: Any) -> Boxed:
        return lambda inputs: ran.append("in graphs")

    monkeypatch.setattr(compile_fx, "cudagraphify", in_graphs)
    monkeypatch.setattr(cuda_graphs, "_tell_of_backward", lambda device: ran.append(f"tells {device}"))
    with cuda_graphs.put_off(recording):
        call = compile_fx.cudagraphify(
            lambda inputs: ran.append("plain"),
            device_index=1,
            stack_traces=[],
            is_backward=is_backward,
            is_inference=False,
        )
    assert compile_fx.cudagraphify is in_graphs
    return lambda: call([torch.ones(2), 3]), ran


def test_while_others_are_awaited_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    awaited = True
    recording = Recording(lambda: not awaited)
    assert str(recording) == ""
    call, ran = loaded(recording, monkeypatch)
    assert str(recording) == "not yet recorded"
    call()
    call()
    assert ran == ["plain"] * 2
    assert str(recording) == "not yet recorded, since other graphs are awaited: 2 calls without"
    awaited = False
    call()
    awaited = True  # a graph that comes later does not end it
    call()
    assert ran == ["plain"] * 2 + ["in graphs"] * 2
    assert str(recording).startswith("recorded after 2 calls without, within calls of ")
    took = recording.seconds
    call()
    assert recording.seconds == took
    assert ran.count("plain") == 2


def test_a_backward_begins_with_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = Recording(lambda: True)
    backward, ran = loaded(recording, monkeypatch, is_backward=True)
    backward()
    assert ran == ["tells 1", "plain"]
    assert recording.calls_without == 0  # of the forward
    forward, _ = loaded(recording, monkeypatch)
    forward()
    backward()
    assert ran == ["tells 1", "plain", "in graphs"]


def test_a_program_that_never_comes_to_rest_has_its_graphs_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MOST_CALLS_WITHOUT", 3)
    call, ran = loaded(Recording(lambda: False), monkeypatch)
    for _ in range(4):
        call()
    assert ran == ["plain"] * 3 + ["in graphs"]


def test_with_no_recording_to_ask_the_first_call_records(monkeypatch: pytest.MonkeyPatch) -> None:
    call, ran = loaded(None, monkeypatch)
    call()
    assert ran == ["in graphs"]


def test_better_code_is_not_waited_for() -> None:
    one = record.Record(None, "0/0")
    with one.captured():
        pass
    assert not region.is_quiet()
    one.attempts[0].move(Event.LOADED)
    assert region.is_quiet()
    one.begin(region.Attempt(one, Purpose.BETTER))
    assert region.is_quiet()
    one.begin(region.Attempt(one, Purpose.SIZES))
    assert not region.is_quiet()
