"""Workers that die, hang or miss something: the program goes on, and is warned once."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers import live

import frame_swap
from frame_swap import State
from frame_swap.farm.workers import workers
from frame_swap.region import records

from . import VARIABLE, Fault
from .harness import fresh_workers, nothing_left_behind, plant, survives, works


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache folder for all tests, since Inductor takes seconds to examine the machine."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder for one test."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(autouse=True)
def one_worker(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[None]:
    """Start each test with one worker and this run's cache; end all workers after it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    frame_swap.configure(workers=1)
    yield
    fresh_workers()


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Fault]:
    """Gives new workers a fault: `faulty("compiling", "killed")`."""

    def faulty(when: str, what: str, **details: Any) -> Fault:
        return plant(monkeypatch, Fault(when, what, str(tmp_path), **details))

    return faulty


SIGKILL = ("the worker was lost: it was killed by SIGKILL", "configure(workers=1)")


@pytest.mark.parametrize(
    ("when", "what", "words"),
    [
        ("importing", "killed", (*SIGKILL, "while importing torch")),
        ("importing", "raises", ("ended with exit code 1 while importing torch", "ArithmeticError: for the test")),
        pytest.param("compiling", "killed_beside_a_compiler", (*SIGKILL, "while compiling")),
        pytest.param("compiling", "exits", ("exit code 3 while compiling",), marks=pytest.mark.long),
        pytest.param("sending", "killed", (*SIGKILL, "while sending its result"), marks=pytest.mark.thorough),
    ],
)
def test_a_worker_that_is_lost_twice_leaves_the_pair(
    faulty: Callable[..., Fault], when: str, what: str, words: tuple[str, ...]
) -> None:
    with nothing_left_behind():
        fault = faulty(when, what)
        survives(lambda x: x.sin() + 1, "its compile failed", *words, "(tried twice)")
        # A worker that dies before it is given anything to do is replaced, and nothing was tried.
        assert fault.hits in ((2, 3) if when == "importing" else (2,))
        compilers = [int(mark.name.removeprefix("compiler-")) for mark in Path(fault.marks).glob("compiler-*")]
        assert len(compilers) == (2 if what == "killed_beside_a_compiler" else 0)
        wait_for(lambda: not any(map(runs, compilers)))
    (retry,) = [moment for moment in records()[-1].attempts[0].journal.moments if moment.name == "tried again"]
    assert words[0] in retry.reason


@pytest.mark.parametrize(
    ("when", "what"),
    [
        ("compiling", "crashes"),
        pytest.param("importing", "killed", marks=pytest.mark.long),
        pytest.param("loading", "crashes", marks=pytest.mark.long),
        pytest.param("sending", "killed", marks=pytest.mark.long),
    ],
)
def test_a_worker_that_is_lost_once_is_replaced_and_nobody_notices(
    faulty: Callable[..., Fault], when: str, what: str
) -> None:
    with nothing_left_behind():
        fault = faulty(when, what, times=1)
        works(lambda x: x.sin() + 3)
        assert fault.hits == 1


def test_the_innocent_do_not_fail_with_the_culprit(faulty: Callable[..., Fault]) -> None:
    fault = faulty("compiling", "killed", only="sinh")
    frame_swap.configure(workers=2)
    functions = [torch.sinh, torch.cos, torch.tan, torch.atan]
    x = torch.linspace(0.1, 0.9, 12)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", frame_swap.FrameSwapWarning)
        compiled = [torch.compile(lambda x, f=f: f(x) * 2, backend="frame_swap") for f in functions]
        for one in compiled:
            one(x)
        frame_swap.wait(timeout=240)
    for function, one in zip(functions, compiled, strict=True):
        torch.testing.assert_close(one(x), function(x) * 2)
    states = [region.state for region in frame_swap.report().regions]
    assert states == [State.FAILED, State.INSTALLED, State.INSTALLED, State.INSTALLED], frame_swap.report()
    assert fault.hits == 2
    assert len([w for w in caught if w.category is frame_swap.FrameSwapWarning]) == 1


def test_what_nobody_wants_any_more_is_not_tried_again(faulty: Callable[..., Fault]) -> None:
    fault = faulty("compiling", "hangs")
    torch.compile(lambda x: x.sin() + 4, backend="frame_swap")(torch.randn(3))
    (region,) = live(frame_swap.report())
    wait_for(lambda: fault.hits == 1)
    region.abandon()
    (pid,) = workers.pids()
    os.kill(pid, 9)
    workers.pool.retire()
    (thread,) = workers.pool._threads._threads
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert (region.state, fault.hits) == (State.STALE, 1)


RETRYING = """
    import os, pathlib, threading, torch, frame_swap
    from frame_swap.farm.local import worker
    from frame_swap.farm.workers import workers
    from faults import inject
    worker.initialize = inject.initialize
    workers.pids(), workers.make_way()  # the one that the import has started is as it should be
    torch.set_num_threads(1)  # OpenMP does not survive a fork
    compiled = torch.compile(lambda x: x.sin() + 1, backend="frame_swap")
    x = torch.randn(4)
    compiled(x)
    # The first attempt is lost, and the second is on its way.
    while len(list(pathlib.Path({marks!r}).glob("hit-*"))) < 2:
        threading.Event().wait(0.05)
    print(frame_swap.report().regions[0].state, *workers.pids(), flush=True)
"""


def retrying(marks: Path) -> tuple[str, dict[str, str]]:
    """A program whose compile hangs at its second attempt, and the environment that makes it so."""
    fault = Fault("compiling", "killed_then_hangs", str(marks))
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {VARIABLE: json.dumps(dataclasses.asdict(fault)), "PYTHONPATH": path, "FRAME_SWAP_WORKERS": "1"}
    return textwrap.dedent(RETRYING.format(marks=str(marks))), environment


@pytest.mark.thorough
@pytest.mark.parametrize("ending", ["pass", pytest.param("raise SystemExit(3)", marks=pytest.mark.long)])
def test_exit_during_a_second_attempt(run_program: Any, tmp_path: Path, ending: str) -> None:
    program, environment = retrying(tmp_path)
    done = run_program(program + ending, check=False, **environment)
    state, *pids = done.stdout.split()
    assert (state, done.returncode, done.stderr) == ("pending", 3 if "3" in ending else 0, "")
    wait_for(lambda: not any(runs(int(pid)) for pid in pids))


@pytest.mark.long
def test_a_fork_during_a_second_attempt(run_program: Any, tmp_path: Path) -> None:
    program, environment = retrying(tmp_path)
    program += textwrap.dedent("""
        if os.fork() == 0:
            worker.initialize = inject.initialize_worker
            print(workers.pids(), flush=True)
            torch.testing.assert_close(compiled(x), x.sin() + 1)
            other = torch.compile(lambda x: x.sin() + 2, backend="frame_swap")
            other(x)
            print(*(region.state for region in frame_swap.wait(timeout=200).regions), flush=True)
            torch.testing.assert_close(other(x), x.sin() + 2)
            workers.stop()
            os._exit(0)
        os.wait()
        torch.testing.assert_close(compiled(x), x.sin() + 1)
        print(frame_swap.report().regions[0].state, *workers.pids(), flush=True)
    """)
    before, forked, child, after = run_program(program, **environment).stdout.splitlines()
    assert (forked, child) == ("[]", "failed installed")
    assert after == before
    assert before.startswith("pending ")


def test_a_hang_ends_with_the_time_limit(faulty: Callable[..., Fault]) -> None:
    with nothing_left_behind():
        faulty("importing", "hangs")
        frame_swap.configure(job_timeout=2)
        survives(lambda x: x.sin() + 5, "still importing torch after job_timeout=2 s", "configure(job_timeout=...)")


def test_a_hang_that_keeps_the_gil_leaves_its_traceback_in_the_log(
    faulty: Callable[..., Fault], caplog: pytest.LogCaptureFixture
) -> None:
    """The time limit ends once the worker hangs, not before."""
    fault = faulty("compiling", "hangs")
    caplog.set_level(logging.INFO, "frame_swap.backend")
    frame_swap.configure(job_timeout=3600)

    def time_is_up() -> None:
        wait_for(lambda: fault.hits == 1)
        (process,) = workers.pool._processes
        process.expire()

    threading.Thread(target=time_is_up).start()
    survives(lambda x: x.sin() + 6, "it was still compiling after job_timeout=3600 s")
    assert fault.hits == 1
    assert "in hangs" in caplog.text


def test_a_worker_that_takes_too_much_memory_ends(faulty: Callable[..., Fault]) -> None:
    with nothing_left_behind():
        fault = faulty("compiling", "eats_memory")
        frame_swap.configure(memory_limit=2.0)
        survives(
            lambda x: x.sin() + 7, "more than memory_limit=2;", "configure(memory_limit=...)", "while compiling"
        )
        assert fault.hits == 1


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("raises", ("ArithmeticError: for the test", "FRAME_SWAP_DISABLE=1")),
        ("runs_out_of_memory", ("MemoryError", "configure(workers=1)")),
    ],
)
def test_what_a_compile_raises_is_the_reason(
    faulty: Callable[..., Fault], what: str, words: tuple[str, ...]
) -> None:
    fault = faulty("compiling", what, times=1)
    survives(lambda x: x.sin() + 8, "its compile failed", *words)
    assert fault.hits == 1, "it was tried again"


@pytest.mark.parametrize("variable", ["CXX", "PATH"])
@pytest.mark.usefixtures("empty_cache")
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "no-such-compiler" if variable == "CXX" else "")
    # Inductor reads CXX when it is imported, and the program's settings are the worker's.
    settings = {"cpp.cxx": (None, "no-such-compiler")} if variable == "CXX" else {}
    advice = "install a C++ compiler (g++ or clang), or name one in the variable CXX"
    if variable == "PATH" and torch.cuda.is_available():  # where there is a GPU, Triton's compiler is asked first
        advice = "install gcc or clang, or name one in the variable CC"
    with torch._inductor.config.patch(settings):
        fresh_workers()
        survives(lambda x: x.sin() + 10, advice)


FREE_SPACE = ("No space left on device", "free some space, or set TORCHINDUCTOR_CACHE_DIR")


def test_a_full_cache(faulty: Callable[..., Fault]) -> None:
    faulty("compiling", "finds_the_disk_full")
    survives(lambda x: x.sin() + 11, *FREE_SPACE)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        pytest.param("size=64k", FREE_SPACE[1:], marks=pytest.mark.long),
        ("ro", ("Read-only file system", "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written to")),
    ],
)
def test_a_real_disk_that_is_full_or_read_only(empty_cache: Path, options: str, words: tuple[str, ...]) -> None:
    command = ["mount", "-t", "tmpfs", "-o", f"mode=700,{options}", "tmpfs", str(empty_cache)]
    mount = subprocess.run(command, capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"may not mount a file system: {mount.stderr.strip()}")
    try:
        fresh_workers()
        survives(lambda x: x.sin() + 12, *words)
    finally:
        fresh_workers()
        subprocess.run(["umount", "--lazy", str(empty_cache)], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes into every folder")
def test_a_cache_that_cannot_be_written_to(empty_cache: Path) -> None:
    empty_cache.chmod(0o500)
    survives(lambda x: x.sin() + 13, "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written to")


def test_an_artifact_that_crashes_who_loads_it_crashes_the_worker(faulty: Callable[..., Fault]) -> None:
    with nothing_left_behind():
        fault = faulty("packing", "libraries_crash_when_loaded")
        survives(
            lambda x: x.sin() + 14, "was killed by SIGABRT while loading what it had compiled", "(tried twice)"
        )
        assert fault.hits == 2


@pytest.mark.thorough
def test_in_place_of_a_package_that_crashes_who_loads_it_there_is_other_code(
    faulty: Callable[..., Fault],
) -> None:
    """The worker that has made the package is lost, and the next one makes none."""
    frame_swap.configure(artifact="aoti")
    with nothing_left_behind(), torch.no_grad():
        faulty("packing", "packages_crash_when_loaded")
        works(lambda x: x.sin() + 14)
        (region,) = frame_swap.report().regions
        assert region.artifact == "inductor"
        assert "killed by SIGABRT while loading what it had compiled" in region.artifact_reason


def test_idle_workers_end_and_come_back() -> None:
    frame_swap.configure(idle_timeout=0.1)
    workers.start()
    assert len(workers.pids()) == 1
    wait_for(lambda: not workers.pids())
    works(lambda x: x.sin() + 15)
    wait_for(lambda: not workers.pids())


def test_a_timer_whose_thread_has_yet_to_end_holds_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread of a cancelled timer ends some time later: on a busy machine, after the worker."""
    run, may_end = threading.Timer.run, threading.Event()

    def lingers(timer: threading.Timer) -> None:
        run(timer)
        may_end.wait()

    try:
        with nothing_left_behind():
            monkeypatch.setattr(threading.Timer, "run", lingers)
            works(lambda x: x.sin() + 16)
    finally:
        may_end.set()


def runs(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until `condition()` holds, a minute at most."""
    pause = threading.Event()
    for _ in range(1200):
        if condition():
            return
        pause.wait(0.05)
    pytest.fail("waited in vain")
