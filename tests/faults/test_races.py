"""Events of the program while its frames compile, load and install, also on other threads.

Each combination of a moment and an event is one case. A moment is held by stopping the thread that is in it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any

import pytest
import torch
from helpers import live

import frame_swap
from faults.moments import HANG, Canned, InBackground, Moment, interrupted
from frame_swap import State, backend, delivery, region
from frame_swap.artifacts import load
from frame_swap.farm.workers import workers
from frame_swap.frames import cache_entry
from frame_swap.internals import dynamo
from frame_swap.shipping import parcel

pytestmark = pytest.mark.usefixtures("no_warnings")


class Program:
    """A compiled function of a module, a number and a class, with weak references to all objects of its compile."""

    SOURCE = "def function(x):\n    return model(x).sin() * scale if marker is not None else x\n"

    def __init__(self, monkeypatch: pytest.MonkeyPatch | None = None) -> None:
        self.freed: list[weakref.ref[Any]] = []
        if monkeypatch is not None:
            self._watch_all(monkeypatch)
        self.scope: dict[str, Any] = {"model": torch.nn.Linear(4, 4), "scale": 2.0, "marker": type("", (), {})}
        exec(compile(self.SOURCE, __file__, "exec"), self.scope)
        self.function = self.scope["function"]
        self.compiled = torch.compile(self.function, backend="frame_swap", dynamic=False)
        self.x = torch.randn(3, 4)

    def _watch_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._watch(monkeypatch, parcel, "pack", lambda args, _: [args[0]])
        self._watch(monkeypatch, backend, "eager_code", lambda args, code: [args[0], code.call])
        self._watch(monkeypatch, load, "load", lambda args, compiled: [compiled.call])
        self._watch(monkeypatch, delivery.service, "submit", lambda args, job: [job])
        self._watch(monkeypatch, delivery.Delivery, "arrived", lambda args, _: [args[1]])

    def _watch(
        self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, of: Callable[[Any, Any], list[Any]]
    ) -> None:
        inner = getattr(owner, name)

        def watched(*args: Any, **keywords: Any) -> Any:
            result = inner(*args, **keywords)
            self.freed += map(weakref.ref, of(args, result))
            return result

        monkeypatch.setattr(owner, name, watched)

    def check(self) -> None:
        torch.testing.assert_close(self.compiled(self.x), self.function(self.x))

    def delete(self, *names: str) -> list[weakref.ref[Any]]:
        """Delete globals and the compiled function; return the objects that must be freed then."""
        deleted = [weakref.ref(self.scope.pop(name)) for name in names]
        if "function" in names:
            del self.function, self.compiled
        gc.collect()
        return deleted


class Silent(Executor):
    """An executor that never returns a result."""

    def submit(self, call: Callable[[], Any], /, *args: Any, **keywords: Any) -> Future[Any]:  # type: ignore[override]
        return Future()


class Held(Executor):
    """An executor of frame-swap's workers that keeps their results until `release`."""

    def __init__(self) -> None:
        self._held: list[tuple[Future[Any], Future[Any]]] = []

    def submit(self, call: Callable[[], Any], /, *args: Any, **keywords: Any) -> Future[Any]:  # type: ignore[override]
        self._held.append((workers.submit(call), Future()))
        return self._held[-1][1]

    def release(self) -> None:
        held, self._held = self._held, []
        for real, shown in held:
            if shown.set_running_or_notify_cancel():
                shown.set_result(real.result(HANG))


# --- The moments: each gives the program, with its first graph on its way and stopped there ----------------


@contextlib.contextmanager
def compiling(monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    """A worker compiles."""
    executor = Held()
    frame_swap.configure(executor=executor)
    program = Program(monkeypatch)
    program.check()
    yield program
    frame_swap.configure(executor=None)
    executor.release()


@contextlib.contextmanager
def loading(monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    """The loader thread loads, under Dynamo's compile lock."""
    program = Program(monkeypatch)
    with Moment(monkeypatch, load, "load", after=True) as moment:
        program.check()
        moment.wait()
        yield program


@contextlib.contextmanager
def _installing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, after: bool) -> Iterator[Program]:
    program = Program(monkeypatch)
    program.check()
    settle()
    call, x = program.compiled, program.x
    expected = program.function(x)
    with Moment(monkeypatch, owner, name, after=after) as moment:
        caller = InBackground(functools.partial(call, x))
        moment.wait()
        del call
        yield program
    torch.testing.assert_close(caller.result(), expected)


@contextlib.contextmanager
def about_to_install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    """Another thread's call has found the cache entry, and has not written to it yet."""
    with _installing(monkeypatch, cache_entry, "replace_code", after=False) as program:
        yield program


@contextlib.contextmanager
def installing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    """Another thread's call has just checked the entry, and is about to write."""
    with _installing(monkeypatch, dynamo, "adopt_code", after=True) as program:
        yield program


@contextlib.contextmanager
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Program]:
    """Another thread's call has written to the entry, and has not said so yet."""
    with _installing(monkeypatch, cache_entry, "replace_code", after=True) as program:
        yield program


MOMENTS = [compiling, loading, about_to_install, installing, installed]
for_each_moment = pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.__name__)


# --- The events --------------------------------------------------------------------------------------------


@for_each_moment
def test_reset(moment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with moment(monkeypatch) as program:
        # It takes Dynamo's compile lock, so it may have to wait for the load or the install.
        reset = InBackground(torch._dynamo.reset)
        if moment is compiling:
            reset.result()
    reset.result()
    (first,) = live(frame_swap.wait())
    assert first.state is (State.INSTALLED if moment in MOMENTS[2:] else State.STALE)
    assert_freed(program)
    program.check()
    settle()
    program.check()
    assert frame_swap.report().regions[1].state is State.INSTALLED


@for_each_moment
def test_the_function_and_its_model_are_deleted(moment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with moment(monkeypatch) as program:
        deleted = program.delete("function", "model")
    frame_swap.wait()
    gc.collect()
    assert [ref() for ref in deleted] == [None, None]
    torch._dynamo.reset()  # until then Dynamo keeps the function's code, and with it all that it made of that
    assert_freed(program)


@for_each_moment
def test_what_guards_are_about_is_deleted(moment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo then empties the cache entry at once, even if another thread holds its lock."""
    with moment(monkeypatch) as program:
        deleted = program.delete("marker")
    (first,) = live(frame_swap.wait())
    assert first.state is (State.INSTALLED if moment is installed else State.STALE)
    gc.collect()
    assert [ref() for ref in deleted] == [None]
    assert_freed(program)
    program.scope["marker"] = type("", (), {})
    program.check()
    settle()
    program.check()
    assert frame_swap.report().regions[-1].state is State.INSTALLED


@for_each_moment
def test_a_recompile(moment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with moment(monkeypatch) as program:
        x = torch.randn(5, 4)
        expected = program.function(x)
        other = InBackground(lambda: program.compiled(x))  # it waits for Dynamo's compile lock
        if moment is compiling:
            other.result()
    torch.testing.assert_close(other.result(), expected)
    assert_both_swap(program, lambda: torch.testing.assert_close(program.compiled(x), expected))


@for_each_moment
def test_a_global_changes(moment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_scale(scale: float) -> None:
        program.scope["scale"] = scale
        program.check()

    with moment(monkeypatch) as program:
        program.scope["scale"] = 3.0
        other = InBackground(program.check)
        if moment is compiling:
            other.result()
    other.result()
    assert_both_swap(program, lambda: with_scale(3.0), lambda: with_scale(2.0))


@for_each_moment
def test_stances(moment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def check_each() -> None:
        for stance in ("force_eager", "eager_on_recompile", "fail_on_recompile"):
            with torch.compiler.set_stance(stance):
                program.check()

    with moment(monkeypatch) as program:
        check_each()
    settle()
    check_each()
    program.check()
    (first,) = live(frame_swap.report())
    assert first.state is State.INSTALLED


# --- KeyboardInterrupt: at each point of a capture and of an install ---------------------------------------


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # within a generator that ends
def test_an_interrupt_anywhere_in_an_install_leaves_a_frame_that_works() -> None:
    files = (
        "/attempt.py",
        "/record.py",
        "/trampoline.py",
        "/plan.py",
        "/locks.py",
        "/call_site.py",
        "/cache_entry.py",
    )
    frame_swap.configure(executor=Canned(workers.submit))
    for at in itertools.count():
        torch._dynamo.reset()
        program = Program()
        program.check()
        settle()
        (first,) = region.records()[at:]
        if not interrupted(at, files, lambda: program.compiled(program.x)):
            break
        program.check()
        assert_nothing_is_held()
        assert (first.state, first.reason, first.artifacts) == (State.INSTALLED, "", 1), f"at point {at}"
        assert (trampoline := first.server) is None or not trampoline.offered, f"at point {at}"
        calls = first.eager_calls
        program.check()
        assert first.eager_calls == calls, f"at point {at}"
        program.check()
    assert at > 30


def test_an_interrupt_anywhere_in_a_capture_leaves_nothing_pending(pytestconfig: pytest.Config) -> None:
    """At each point with --long, else at each third."""
    files = (
        "/backend.py",
        "/delivery.py",
        "/attempt.py",
        "/record.py",
        "/trampoline.py",
        "/service.py",
        "/call_site.py",
    )
    for at in itertools.count(step=1 if pytestconfig.getoption("--long") else 3):
        torch._dynamo.reset()
        program = Program()
        frame_swap.configure(executor=Silent())
        if not interrupted(at, files, lambda: program.compiled(program.x)):
            break
        frame_swap.configure(when="never")
        program.check()
        assert_nothing_is_held()
        # Where Dynamo was interrupted after it had put the trampoline into the globals, what comes settles it.
        lost = [r for r in region.records() if r.awaited and r.server is None]
        assert not lost, f"at point {at}: {frame_swap.report()}"
        frame_swap.configure(when="ready")
    assert at > 30


def test_an_interrupt_where_the_first_call_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(job: Any) -> None:
        raise KeyboardInterrupt

    program = Program()
    with monkeypatch.context() as patches:
        patches.setattr(delivery.Job, "wait", interrupt)
        frame_swap.configure(when="wait")
        with pytest.raises(KeyboardInterrupt):
            program.compiled(program.x)
    settle()
    program.check()
    assert [r.state for r in frame_swap.report().regions] == [State.STALE, State.INSTALLED]


def assert_nothing_is_held() -> None:
    def take_all() -> None:
        for lock in (dynamo.compile_lock, region.registry.lock, delivery.service._lock):
            assert lock.acquire(timeout=HANG)
            lock.release()

    gc.collect()  # what was interrupted: a generator gives back what it holds when it goes
    InBackground(take_all).result()


# --- Threads that race -------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", ["delete", "recompile", "global", "stance", "swap"])
def test_another_thread_races_with_the_calls(event: str) -> None:
    """In whatever order they come, no call raises, and each result is right.

    A reset is not among them: PyTorch itself crashes where one thread resets while another calls ("eager" does).
    """
    if event == "recompile" and torch.__version__ < (2, 12):
        pytest.skip("in torch 2.11 a capture in one thread makes calls in others raise, whatever the backend")
    events: dict[str, Callable[[Program], object]] = {
        "delete": lambda p: p.scope.update(marker=type("", (), {})),
        "recompile": lambda p: p.compiled(torch.randn(5, 4)),
        "global": lambda p: p.scope.update(scale=3.0),
        "stance": lambda p: None,
        "swap": lambda p: frame_swap.swap(),
    }
    if event not in ("recompile", "global"):  # what they compile is another graph
        frame_swap.configure(executor=Canned(workers.submit))
    for _ in range(5):
        torch._dynamo.reset()
        program = Program()
        results = [program.function(program.x)]
        results.append(results[0] * 1.5)  # after `scale` has changed
        program.check()
        (row,) = region.records()[-1:]
        begin = threading.Barrier(2)

        def call_until_settled() -> None:
            begin.wait()
            for _ in range(200):
                actual = program.compiled(program.x)
                assert any(torch.allclose(actual, expected) for expected in results)
                if row.state not in (State.PENDING, State.READY):
                    break

        def act() -> None:
            begin.wait()
            with torch.compiler.set_stance("force_eager") if event == "stance" else contextlib.nullcontext():
                events[event](program)

        threads = [InBackground(call_until_settled), InBackground(act)]
        for thread in threads:
            thread.result()
        settle()


def test_a_job_may_be_cancelled_wherever_garbage_is_collected() -> None:
    """A trampoline in a reference cycle may be freed at any allocation, even while this thread holds locks."""
    frame_swap.configure(executor=Silent())
    program = Program()
    program.check()
    assert delivery.service._loader is not None

    def collect() -> None:
        with delivery.service._lock, delivery.service._loader._shutdown_lock, region.registry.lock:
            torch._dynamo.reset()
            gc.collect()

    InBackground(collect).result()
    (first,) = region.records()
    assert first.state is State.STALE


def test_a_row_of_the_report_keeps_nothing_alive() -> None:
    program = Program()
    program.check()
    settle()
    program.check()
    (row,) = live(frame_swap.report())
    plain = {str, int, float, bool, tuple, type(None), State, region.Purpose}
    (attempt,) = row.attempts
    journal = region.journal.Journal
    assert {type(value) for value in vars(row).values()} <= plain | {weakref.ref, list, journal}
    assert {type(value) for value in vars(attempt).values()} <= plain | {region.Record, journal}
    noted = [value for one in (*attempt.journal.spans, *attempt.journal.moments) for value in one]
    assert {type(value) for value in (*noted, *itertools.chain(*attempt.phases))} <= plain
    (compile,) = row.row().compiles
    assert {type(value) for value in vars(compile).values()} <= plain


def settle() -> None:
    assert region.wait_for_compiles(HANG), frame_swap.report()


def assert_both_swap(program: Program, second: Callable[[], None], first: Callable[[], None] | None = None) -> None:
    settle()
    second()
    (first or program.check)()
    assert [r.state for r in frame_swap.wait().regions] == [State.INSTALLED] * 2
    calls = [r.eager_calls for r in frame_swap.report().regions]
    second()
    (first or program.check)()
    assert [r.eager_calls for r in frame_swap.report().regions] == calls


def assert_freed(program: Program) -> None:
    """Assert that all objects of the first graph's compile are freed."""
    delivery.service._loader and delivery.service._loader.submit(lambda: None).result(HANG)  # it has let go, too
    gc.collect()
    assert len(program.freed) >= 4
    assert [alive for ref in program.freed if (alive := ref()) is not None] == []
