"""The seven steps of a frame's life happen in order, and leave nothing behind."""

from __future__ import annotations

import gc
import traceback
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import faulty
import pytest
import torch
from helpers import codes_called, live
from torch._inductor.utils import fresh_cache

import frame_swap
from frame_swap import FrameSwapWarning, State, backend, delivery, errors
from frame_swap.frames import cache_entry
from frame_swap.internals import aot, dynamo
from frame_swap.runtime import machine

pytestmark = pytest.mark.fast


def only_region() -> frame_swap.Region:
    (region,) = live(frame_swap.report())
    return region


def only_entry(code: CodeType) -> Any:
    (entry,) = dynamo.cache_entries(code)
    return entry


def files_called(call: Callable[[], Any]) -> set[str]:
    """Files of all Python code that runs during `call`."""
    return {code.co_filename for code in codes_called(call)}


def f(x: torch.Tensor) -> torch.Tensor:
    return (x.sin() + 1).sum(-1)


def test_the_graph_is_shipped_before_eager_code_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    submit, eager_code = delivery.service.submit, backend.eager_code
    monkeypatch.setattr(delivery.service, "submit", lambda *a: order.append("ship") or submit(*a))
    monkeypatch.setattr(backend, "eager_code", lambda *a, **k: order.append("eager") or eager_code(*a, **k))
    torch.compile(f, backend="frame_swap")(torch.randn(4, 4))
    assert order == ["ship", "eager"]


def test_the_entry_is_rewritten_in_place_and_the_old_code_is_gone() -> None:
    frame_swap.configure(when="manual")
    compiled = torch.compile(f, backend="frame_swap")
    x = torch.randn(4, 4)
    compiled(x)
    region, entry = only_region(), only_entry(f.__code__)
    guard_manager = entry.guard_manager
    old = weakref.ref(entry.code)
    assert region.server in entry.code.co_consts

    frame_swap.wait()
    assert region.state is State.READY
    assert only_entry(f.__code__).code is old()

    frame_swap.swap()
    assert region.state is State.INSTALLED
    assert region.reason == ""
    assert only_entry(f.__code__).guard_manager is guard_manager
    assert old() is None
    assert region.server not in only_entry(f.__code__).code.co_consts, "only its answer to errors is left"
    torch.testing.assert_close(compiled(x), f(x))


def test_a_call_after_the_swap_touches_nothing_of_ours() -> None:
    frame_swap.configure(when="manual")
    compiled = torch.compile(f, backend="frame_swap")
    x = torch.randn(4, 4)
    compiled(x)
    ours = {name for name in files_called(lambda: compiled(x)) if "/frame_swap/" in name}
    assert "trampoline.py" in {name.rpartition("/")[2] for name in ours}  # so this can be seen at all

    frame_swap.wait()
    frame_swap.swap()
    calls = only_region().eager_calls
    assert not {name for name in files_called(lambda: compiled(x)) if "/frame_swap/" in name}
    assert only_region().eager_calls == calls


def test_what_the_worker_sent_is_gone_after_the_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []
    arrived = delivery.Delivery.arrived
    monkeypatch.setattr(delivery.Delivery, "arrived", lambda s, o: sent.append(weakref.ref(o)) or arrived(s, o))
    compiled = torch.compile(f, backend="frame_swap")
    compiled(torch.randn(4, 4))
    frame_swap.wait()
    gc.collect()
    assert [outcome() for outcome in sent] == [None]


def test_forward_and_backward_change_over_together(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def counting(gm: torch.fx.GraphModule, inputs: list[Any], made: Any = aot.boxed_nop) -> Any:
        number, run = len(graphs), made(gm, inputs)
        graphs.append(gm)

        def counted(args: list[Any]) -> Any:
            ran.append(number)
            return run(args)

        aot.mark_boxed(counted)
        return counted

    graphs: list[torch.fx.GraphModule] = []
    monkeypatch.setattr(aot, "boxed_nop", counting)
    frame_swap.configure(when="manual", first="pair")
    compiled = torch.compile(lambda x: (x * x.sin()).sum(), backend="frame_swap")
    x = torch.randn(8, requires_grad=True)
    compiled(x).backward()
    assert ran == [0, 1]  # eager forward, eager backward
    early = compiled(x)
    assert ran == [0, 1, 0]

    frame_swap.wait()
    frame_swap.swap()
    compiled(x).backward()
    assert ran == [0, 1, 0]  # neither
    x.grad = None
    early.backward()
    assert ran == [0, 1, 0, 1]  # a backward belongs to the forward that ran
    torch.testing.assert_close(x.grad, x.sin() + x * x.cos())


def test_installing_waits_for_a_call_when_ready() -> None:
    compiled = torch.compile(f, backend="frame_swap")
    x = torch.randn(4, 4)
    compiled(x)
    frame_swap.region.wait_for_compiles()
    region = only_region()
    assert (region.state, region.eager_calls) == (State.READY, 1)
    compiled(x)
    assert (region.state, region.eager_calls) == (State.INSTALLED, 1)


def test_when_wait_the_first_call_runs_compiled_code() -> None:
    frame_swap.configure(when="wait")
    x = torch.randn(4, 4)
    torch.testing.assert_close(torch.compile(f, backend="frame_swap")(x), f(x))
    assert (only_region().state, only_region().eager_calls) == (State.INSTALLED, 0)


def test_when_never_nothing_is_sent_to_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery.service, "submit", lambda *a: pytest.fail("something was submitted"))
    frame_swap.configure(when="never")
    compiled, x = torch.compile(f, backend="frame_swap"), torch.randn(4, 4)
    for calls in (1, 2):
        torch.testing.assert_close(compiled(x), f(x))
        assert (only_region().state, only_region().eager_calls) == (State.EAGER, calls)
    assert live(frame_swap.wait()) == [only_region()]  # nothing is pending


def test_a_delay_holds_back_what_is_finished() -> None:
    frame_swap.configure(delay=1.0)
    torch.compile(f, backend="frame_swap")(torch.randn(4, 4))
    frame_swap.wait()
    region = only_region()
    assert region.installed_at is not None
    assert region.compile_span is not None
    assert region.installed_at - region.compile_span[1] >= 1.0


def test_two_workers_compile_two_graphs_at_once(tmp_path: Path) -> None:
    frame_swap.configure(workers=2)
    with torch._inductor.config.patch(post_grad_custom_post_pass=faulty.Meet(str(tmp_path))):
        for function in (lambda x: (x.sin() @ x).relu(), lambda x: (x.cos() @ x).tanh()):
            torch.compile(function, backend="frame_swap")(torch.randn(16, 16))
        first, second = live(frame_swap.wait())
    assert {first.worker_pid, second.worker_pid} == {int(one.name) for one in tmp_path.iterdir()}
    assert first.compile_span is not None
    assert second.compile_span is not None
    assert max(first.compile_span[0], second.compile_span[0]) < min(first.compile_span[1], second.compile_span[1])


def test_a_compile_that_fails_leaves_the_pair_and_warns_once(tmp_path: Path) -> None:
    compiled, x = torch.compile(f, backend="frame_swap"), torch.randn(4, 4)
    no_compiler = torch._inductor.config.patch({"cpp.cxx": (None, str(tmp_path / "no-compiler"))})
    with warnings.catch_warnings(record=True) as caught, no_compiler, fresh_cache(dir=str(tmp_path)):
        warnings.simplefilter("always")
        for _ in range(3):
            torch.testing.assert_close(compiled(x), f(x))
            frame_swap.wait()
    ours = [w for w in caught if issubclass(w.category, FrameSwapWarning)]
    assert len(ours) == 1
    region = only_region()
    assert region.state is State.FAILED
    assert region.reason in str(ours[0].message)
    assert "no-compiler" in region.reason
    assert "its compile failed" in str(frame_swap.report())
    assert region.eager_calls == 3


def test_a_reset_while_compiling_makes_the_region_stale() -> None:
    frame_swap.configure(delay=3600)
    compiled, x = torch.compile(f, backend="frame_swap"), torch.randn(4, 4)
    compiled(x)
    region = only_region()
    assert region.state is State.PENDING
    torch._dynamo.reset()
    assert region.state is State.STALE
    assert region.server is None
    frame_swap.configure(delay=0)
    torch.testing.assert_close(compiled(x), f(x))
    frame_swap.wait()
    assert [r.state for r in frame_swap.report().regions] == [State.STALE, State.INSTALLED]


def test_behind_a_foreign_wrapper_a_check_remains() -> None:
    def wrapping(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        inner = frame_swap.frame_swap_backend(gm, inputs)
        return lambda *args: inner(*args)

    compiled, x = torch.compile(f, backend=wrapping), torch.randn(4, 4)
    compiled(x)
    frame_swap.wait()
    torch.testing.assert_close(compiled(x), f(x))
    region = only_region()
    assert (region.state, region.eager_calls) == (State.INSTALLED, 1)
    assert "a check remains" in region.reason


def test_an_unfamiliar_cache_entry_is_not_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def unfamiliar(entry: Any) -> Any:
        raise errors.UnknownLayout("for the test")

    monkeypatch.setattr(cache_entry, "_code_field", unfamiliar)
    compiled, x = torch.compile(f, backend="frame_swap"), torch.randn(4, 4)
    compiled(x)
    code = only_entry(f.__code__).code
    frame_swap.wait()
    torch.testing.assert_close(compiled(x), f(x))
    assert only_entry(f.__code__).code is code
    assert (only_region().state, only_region().eager_calls) == (State.INSTALLED, 1)
    assert "a check remains" in only_region().reason


def test_modules_that_share_a_code_object_are_told_apart() -> None:
    modules = [torch.nn.Linear(4, 4), torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh())]
    compiled = [torch.compile(m, backend="frame_swap") for m in modules]
    x = torch.randn(2, 4)
    for c in compiled:
        c(x)
    frame_swap.wait()
    for c, m in zip(compiled, modules, strict=True):
        torch.testing.assert_close(c(x), m(x))
    assert [r.state for r in frame_swap.report().regions] == [State.INSTALLED] * 2
    assert [r.eager_calls for r in frame_swap.report().regions] == [1, 1]


def test_a_plain_call_of_the_backend_outside_of_dynamo_is_refused_politely() -> None:
    gm = torch.fx.symbolic_trace(lambda x: (x.sin() + 1,))
    compiled = frame_swap.frame_swap_backend(gm, [torch.randn(4)])
    x = torch.randn(4)
    torch.testing.assert_close(compiled(x), (x.sin() + 1,))
    assert only_region().state is State.FOREGROUND
    assert "outside of Dynamo" in only_region().reason


def full_collections_in_a_capture(backend: str) -> int:
    """How many begin by themselves while Dynamo captures a frame, or frame-swap rewrites it, in its first call."""
    seen: list[bool] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and info["generation"] == 2:
            frames = traceback.extract_stack()
            seen.append(any(f.filename.endswith("convert_frame.py") or f.name == "call_constants" for f in frames))

    compiled = torch.compile(torch.nn.Linear(8, 8), backend=backend)
    usual = gc.get_threshold()
    gc.collect()
    gc.disable()
    kept = [[] for _ in range(1_000_000)]  # so that more than a quarter of all objects is new, and a collection due
    gc.set_threshold(20, 1, 1)
    gc.callbacks.append(note)
    gc.enable()
    try:
        compiled(torch.randn(2, 8))
    finally:
        gc.set_threshold(*usual)
        gc.callbacks.remove(note)
    del kept
    return sum(seen)


@pytest.mark.skipif(not machine._HAS_GENERATIONS, reason="this Python has no full collections that hold the GIL")
def test_no_full_garbage_collection_begins_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    assert full_collections_in_a_capture("eager") > 0
    assert full_collections_in_a_capture("frame_swap") == 0
    monkeypatch.setenv("FRAME_SWAP_DISABLE", "1")
    torch._dynamo.reset()
    assert full_collections_in_a_capture("frame_swap") > 0, "it was not left to stock"


def test_inputs_of_a_captured_call_die_with_it() -> None:
    """Though what was made meanwhile counts as old."""

    @torch.compile(backend="frame_swap")
    def broken(x: torch.Tensor) -> torch.Tensor:
        y = x.relu()
        torch._dynamo.graph_break()
        return (y * x).sum()

    x = torch.randn(64, requires_grad=True)
    seen = weakref.ref(x)
    broken(x).backward()
    del x
    assert seen() is None
