"""The timeline: every step is there, slices nest, arrows lead from slice to slice, and Perfetto reads it."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import live
from torch._inductor.utils import fresh_cache

import frame_swap
from frame_swap import FrameSwapWarning, State
from frame_swap.region import Event, records
from frame_swap.ui import timeline_picture
from frame_swap.ui.timeline import events

Trace = list[dict[str, Any]]


def f(x: torch.Tensor) -> torch.Tensor:
    return (x.sin() @ x).relu()


STEPS = ("queue", "compile", "load", "install")


def slices(trace: Trace) -> Trace:
    return [event for event in trace if event["ph"] == "X"]


def overlaps(trace: Trace) -> Trace:
    """Slices that stick out of the one around them, on their track; Perfetto would drop these."""
    found: Trace = []
    tracks: dict[tuple[int, int], Trace] = defaultdict(list)
    for event in slices(trace):
        tracks[event["pid"], event["tid"]].append(event)
    for track in tracks.values():
        open_ones: list[float] = []
        for event in sorted(track, key=lambda event: (event["ts"], -event["dur"])):
            while open_ones and event["ts"] >= open_ones[-1]:
                open_ones.pop()
            end = event["ts"] + event["dur"]
            if open_ones and end > open_ones[-1] + 0.5:  # half a microsecond: floats
                found.append(event)
            open_ones.append(end)
    return found


def loose_arrows(trace: Trace) -> list[int]:
    """Ids of arrows that are not two events in time's order, each in a step: Perfetto takes the innermost slice."""
    arrows: dict[int, Trace] = defaultdict(list)
    for event in trace:
        if event["ph"] in ("s", "f"):
            arrows[event["id"]].append(event)

    def is_held(event: dict[str, Any]) -> bool:
        own = [s for s in slices(trace) if (s["pid"], s["tid"]) == (event["pid"], event["tid"])]
        around = [s for s in own if s["ts"] <= event["ts"] <= s["ts"] + s["dur"]]
        return min(around, key=lambda s: s["dur"], default={"cat": ""})["cat"] in STEPS

    def is_right(ends: Trace) -> bool:
        return [e["ph"] for e in sorted(ends, key=lambda e: e["ts"])] == ["s", "f"] and all(map(is_held, ends))

    return [number for number, ends in arrows.items() if not is_right(ends)]


@pytest.fixture(scope="module")
def swapped(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """The timeline of a program with three graphs, which two workers compile and calls install."""
    program = """
import sys, torch, frame_swap

def f(x):
    return (x.sin() @ x).relu()

def g(x):
    y = f(x)
    torch._dynamo.graph_break()
    return x.cos() + y

frame_swap.configure(workers=2, store="off")
x = torch.randn(4, 4, requires_grad=True)
steps = [torch.compile(f, backend="frame_swap"), torch.compile(g, backend="frame_swap")]
while True:
    for step in steps:
        step(x).sum().backward()
    if all(region.state == "installed" for region in frame_swap.report().regions):
        break
frame_swap.timeline(sys.argv[1])
"""
    path = tmp_path_factory.mktemp("timeline") / "trace.json"
    subprocess.run([sys.executable, "-c", program, str(path)], check=True, timeout=240)
    trace: Trace = json.loads(path.read_text())["traceEvents"]
    return trace


@pytest.mark.fast
def test_each_step_of_each_graph_is_there(swapped: Trace) -> None:
    steps = ["capture", "ship", "prepare eager code", "queue", "compile", "load", "install", "first compiled call"]
    for region in range(3):
        found = [s["cat"] for s in slices(swapped) if s["args"].get("region") == region]
        assert sorted(found) == sorted(steps)
    assert {"GraphLowering.run", "code_gen", "load once, to try it out"} <= {
        s["name"] for s in slices(swapped) if s["cat"] == "phase"
    }


def test_tracks_are_named(swapped: Trace) -> None:
    names = {(e["pid"], e["tid"], e["name"]): e["args"].get("name") for e in swapped if e["ph"] == "M"}
    for one in slices(swapped):
        assert names[one["pid"], one["tid"], "thread_name"]
        assert names[one["pid"], 0, "process_name"]
    workers = {one["pid"] for one in slices(swapped) if one["cat"] == "compile"}
    assert len(workers) in (1, 2)
    assert {names[pid, 0, "process_name"] for pid in workers} == {f"worker {pid}" for pid in workers}


@pytest.mark.fast
def test_slices_nest(swapped: Trace) -> None:
    assert overlaps(swapped) == []
    broken = copy.deepcopy(swapped)
    victim = next(s for s in slices(broken) if s["cat"] == "phase")
    victim["dur"] += 1e9
    assert overlaps(broken) != []


@pytest.mark.fast
def test_arrows_lead_from_the_queue_to_the_install(swapped: Trace) -> None:
    assert loose_arrows(swapped) == []
    assert sum(e["ph"] == "s" for e in swapped) == 9  # to the worker, to the loader, to the call; of three graphs
    broken = copy.deepcopy(swapped)
    next(e for e in broken if e["ph"] == "f")["ts"] += 1e9
    assert loose_arrows(broken) != []


def test_perfetto_reads_it(swapped: Trace, tmp_path: Path) -> None:
    processor = pytest.importorskip("perfetto.trace_processor", reason="needs the package perfetto")
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": swapped}))
    try:
        trace = processor.TraceProcessor(trace=str(path))
    except (subprocess.CalledProcessError, OSError) as error:
        pytest.skip(f"the package perfetto cannot get its trace processor: {error}")
    with trace:
        query = """
            select source.name as source, target.name as target from flow
            join slice source on slice_out = source.id join slice target on slice_in = target.id
        """
        arrows = [(row.source.split()[0], row.target.split()[0]) for row in trace.query(query)]
        errors = list(trace.query("select name from stats where severity = 'error' and value > 0"))
        count = next(iter(trace.query("select count(*) as n from slice where dur >= 0"))).n
    assert sorted(arrows) == [("compile", "load")] * 3 + [("load", "install")] * 3 + [("queue", "compile")] * 3
    assert errors == []
    assert count == len(slices(swapped)) + sum(e["ph"] == "i" for e in swapped)


def test_what_is_not_over_ends_now_and_says_so() -> None:
    frame_swap.configure(delay=3600)
    torch.compile(f, backend="frame_swap")(torch.randn(4, 4))
    now = time.time()
    trace = events(records(), now)
    last = max(slices(trace), key=lambda s: s["ts"] + s["dur"])
    assert last["cat"] in ("queue", "compile")
    assert last["args"]["unfinished"]
    assert last["ts"] + last["dur"] == pytest.approx(now * 1e6, abs=1)
    assert overlaps(trace) == []
    assert loose_arrows(trace) == []


def test_compiles_at_the_same_time_are_on_tracks_of_their_own() -> None:
    frame_swap.configure(delay=3600)
    for function in (f, lambda x: x.cos() + 1, lambda x: x.tan() + 1):
        torch.compile(function, backend="frame_swap")(torch.randn(4, 4))
    for record in records():
        record.attempts[0].begun_at = time.time()
    trace = events(records(), time.time() + 1)
    assert overlaps(trace) == []
    assert len({s["tid"] for s in slices(trace) if s["cat"] == "compile"}) == 3


def test_phases_of_threads_beside_a_compile_are_drawn_as_long_as_they_are() -> None:
    torch.compile(f, backend="frame_swap")(torch.randn(4, 4))
    frame_swap.wait()
    (attempt,) = records()[0].attempts
    attempt.compile_span, attempt.worker_pid = (10.0, 20.0), 1234
    attempt.phases = (("wait", 11.0, 15.0), ("compile_file", 12.0, 18.0), ("within", 12.5, 14.0))
    trace = events(records(), time.time())
    took = {s["name"]: round(s["dur"] / 1e6, 3) for s in slices(trace) if s["cat"] == "phase"}
    assert took == {"wait": 4.0, "compile_file": 6.0, "within": 1.5}
    assert overlaps(trace) == []


def test_a_lost_worker_has_a_compile_all_the_same() -> None:
    torch.compile(f, backend="frame_swap")(torch.randn(4, 4))
    frame_swap.wait()
    (attempt,) = records()[0].attempts
    attempt.worker_pid = None
    assert {"queue", "compile"} <= {s["cat"] for s in slices(events(records(), time.time()))}
    attempt.store = "found"
    assert not {"queue", "compile"} & {s["cat"] for s in slices(events(records(), time.time()))}


def test_failures_and_rejections_are_marks_with_reasons(tmp_path: Path) -> None:
    compiled, x = torch.compile(f, backend="frame_swap"), torch.randn(4, 4)
    compiled(x)
    frame_swap.wait()
    (record,) = records()
    with pytest.warns(FrameSwapWarning):
        record.reject("for the test")
    no_compiler = torch._inductor.config.patch({"cpp.cxx": (None, str(tmp_path / "no-compiler"))})
    with no_compiler, fresh_cache(dir=str(tmp_path)), pytest.warns(FrameSwapWarning):
        torch.compile(lambda x: x.sin() + 7, backend="frame_swap")(x)
        frame_swap.wait()
    trace = events(records(), time.time())
    marks = {e["cat"]: e["args"]["reason"] for e in trace if e["ph"] == "i"}
    assert marks["rejected"] == "for the test"
    assert "InvalidCxxCompiler" in marks["failed"]
    assert loose_arrows(trace) == []


def test_a_foreground_compile_is_on_the_thread_that_waits() -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    torch.compile(lambda x: x * 2, backend="frame_swap")(nested)
    assert live(frame_swap.report())[0].state is State.FOREGROUND
    trace = events(records(), time.time())
    (compile_,) = [s for s in slices(trace) if s["cat"] == "compile"]
    (capture,) = [s for s in slices(trace) if s["cat"] == "capture"]
    assert (compile_["pid"], compile_["tid"]) == (capture["pid"], capture["tid"])
    assert overlaps(trace) == []


def test_code_from_a_retry_is_marked() -> None:
    torch.compile(f, backend="frame_swap")(torch.randn(4, 4))
    frame_swap.wait()
    (attempt,) = records()[0].attempts
    attempt.begin_again("what the store had could not be loaded")
    marks = [e for e in events(records(), time.time()) if e["ph"] == "i" and e["cat"] == "compiled again"]
    assert [mark["args"]["reason"] for mark in marks] == ["what the store had could not be loaded"]
    assert loose_arrows(events(records(), time.time())) == []


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.json"
    path.write_text("before")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="the timeline cannot be written: No space left"):
        frame_swap.timeline(path)
    assert [one.name for one in tmp_path.iterdir()] == ["trace.json"]
    assert path.read_text() == "before"
    monkeypatch.undo()
    frame_swap.timeline(path)
    assert json.loads(path.read_text())["traceEvents"] != []
    with pytest.raises(FileNotFoundError, match="give a file in a folder that"):
        frame_swap.timeline(tmp_path / "none" / "trace.json")


def test_the_command_prints_a_row_for_each_graph(swapped: Trace, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": swapped}))
    timeline_picture.show(path, None)
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["graph", "ship", "queue"]
    assert len(rows) == 3
    assert all(len(row.split()) >= 7 for row in rows)  # id, name, place, and the seconds of each step
    assert max(map(len, (head, *rows))) <= 83


def test_the_command_draws(swapped: Trace, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    path, png = tmp_path / "trace.json", tmp_path / "trace.png"
    path.write_text(json.dumps({"traceEvents": swapped}))
    timeline_picture.show(path, png)
    assert png.read_bytes().startswith(b"\x89PNG")


def test_what_is_no_timeline_is_said(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("[1]")
    for name in ("other.json", "none.json"):
        with pytest.raises(SystemExit, match="is no timeline"):
            timeline_picture.show(tmp_path / name, None)


def test_abandoned_compiles_have_no_arrow_to_an_install() -> None:
    frame_swap.configure(delay=3600)
    torch.compile(f, backend="frame_swap")(torch.randn(4, 4))
    records()[0].attempts[0].move(Event.ABANDONED, "for the test")
    trace = events(records(), time.time())
    assert [e for e in trace if e["ph"] in ("s", "f")] == []
