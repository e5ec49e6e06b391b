"""Forks at chosen moments: the child works, and the parent goes on."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
    import faulthandler, os, signal, sys, threading
    faulthandler.enable()
    faulthandler.dump_traceback_later(150, exit=True)  # a hang; it is of no use in a forked child

    import torch
    torch.set_num_threads(1)  # OpenMP does not survive a fork
    import frame_swap
    from frame_swap.internals import dynamo, loading
    from frame_swap import region
    from frame_swap.artifacts import load
    from frame_swap.farm.local import pool
    from frame_swap.farm.service import Service, service
    from frame_swap.farm.workers import workers
    from frame_swap.frames import cache_entry

    def f(x):
        return (x.sin() @ x).relu()

    def g(x):
        return (x.cos() @ x).tanh()

    x = torch.randn(8, 8)
    compiled = torch.compile(f, backend="frame_swap")

    # An operator's first call looks itself up in a C++ static, without the GIL. A child that is forked from another
    # thread then waits for its end for ever; so it does in plain PyTorch. This one, compiled code calls.
    torch.mm(x, x, out=torch.empty(8, 8))

    def check(function=f, compiled=compiled):
        torch.testing.assert_close(compiled(x), function(x))

    def states():
        return [str(r.state) for r in frame_swap.report().regions]

    def limit_time():
        '''Of a forked child.'''
        faulthandler.register(signal.SIGALRM, chain=True)
        signal.alarm(120)

    def child(function=g):
        '''Goes on with what it has, and captures and compiles something new.'''
        frame_swap.configure(delay=0)
        check()
        new = torch.compile(function, backend="frame_swap")
        check(function, new)
        frame_swap.wait()
        check(function, new)
        check()
        print("child", *states(), flush=True)

    def fork():
        if (pid := os.fork()) == 0:
            limit_time()
            try:
                child()
            finally:
                workers.stop()
                sys.stdout.flush()
                os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0, "the child failed"

    def executor():
        '''loky's, of a worker.'''
        return next(iter(workers.pool._processes))._executor

    def stopped(owner, name, after=False):
        '''Another thread's next call of `owner.name` stops there; until it is released, or a fork begins.'''
        inner, reached, released = getattr(owner, name), threading.Event(), threading.Event()
        def stop(*args, **keywords):
            result = inner(*args, **keywords) if after else None
            if not reached.is_set() and threading.current_thread() is not threading.main_thread():
                reached.set()
                released.wait()
            return result if after else inner(*args, **keywords)
        setattr(owner, name, stop)
        os.register_at_fork(before=released.set)  # this hook runs first: the last one registered does
        return reached, released

    def in_background(call):
        thread = threading.Thread(target=call)
        thread.start()
        return thread
"""


WITHOUT_GPUS = {"CUDA_VISIBLE_DEVICES": ""}
"""For the programs: where there is a GPU Dynamo initialises CUDA, and then no backend works in a forked child."""


def run(run_program: Any, program: str) -> dict[str, list[str]]:
    """The states that parent and children print, by printer."""
    done = run_program(textwrap.dedent(PROGRAM) + textwrap.dedent(program), **WITHOUT_GPUS)
    lines = [line.split() for line in done.stdout.splitlines()]
    return {who: states for who, *states in lines}


def test_while_a_worker_compiles(run_program: Any) -> None:
    states = run(
        run_program,
        """
        frame_swap.configure(delay=600)
        check()
        frame_swap.configure(delay=0)
        fork()
        print("parent", *states(), flush=True)
        os._exit(0)  # without the delay's end
        """,
    )
    assert states == {"child": ["failed", "installed"], "parent": ["pending"]}


def test_while_a_compile_waits_for_the_worker(run_program: Any) -> None:
    """The queue is the parent's: its compiles go on there, and the child's own come to the child."""
    states = run(
        run_program,
        """
        frame_swap.configure(workers=1)
        reached, released = stopped(pool.Pool, '_run_once')
        check()
        assert reached.wait(100)
        waiting = torch.compile(g, backend="frame_swap")
        check(g, waiting)
        fork_child, child = child, lambda: fork_child(lambda x: (x.tan() @ x).relu())
        fork()
        check()
        frame_swap.wait()
        check()
        check(g, waiting)
        print("parent", *states())
        """,
    )
    assert states == {"child": ["failed", "failed", "installed"], "parent": ["installed", "installed"]}


MOMENTS = {
    # The loader thread holds Dynamo's compile lock, and much of Inductor is patched.
    "a load": ("load, 'load', after=True", "check()"),
    "an import": ("loading, 'import_loading'", "check()"),
    # Another thread's call has rewritten the entry, under Dynamo's compile lock.
    "an install": (
        "cache_entry, 'replace_code', after=True",
        "check(); region.wait_for_compiles(); in_background(check)",
    ),
    # Another thread has started a worker, and has not put it on its pool's list yet.
    "the start of workers": (
        "pool.Process, '__init__', after=True",
        "frame_swap.configure(memory_limit=1e6); in_background(workers.start)",  # on other terms
    ),
}


MARKS = {
    "an import": pytest.mark.long,
    "an install": pytest.mark.thorough,
    "the start of workers": pytest.mark.thorough,
}


@pytest.mark.parametrize("moment", [pytest.param(moment, marks=MARKS.get(moment, ())) for moment in MOMENTS])
def test_a_fork_waits_for(moment: str, run_program: Any) -> None:
    where, begin = MOMENTS[moment]
    states = run(
        run_program,
        f"""
        reached, released = stopped({where})
        {begin}
        assert reached.wait(100)
        fork()
        check()
        frame_swap.wait()
        check()
        print("parent", *states())
        """,
    )
    assert states["child"][-1] == "installed"
    assert set(states["parent"]) == {"installed"}


def test_a_fork_waits_for_the_compile_lock(run_program: Any) -> None:
    """A user's capture holds it, too; a child forked meanwhile would wait for it for ever."""
    states = run(
        run_program,
        """
        reached, pause = threading.Event(), threading.Lock()
        pause.acquire()
        def capture():
            with dynamo.compile_lock:
                reached.set()
                pause.acquire()  # C code: nothing runs between it and the release of the compile lock
        in_background(capture)
        assert reached.wait(100)
        os.register_at_fork(before=pause.release)
        fork()
        """,
    )
    assert states == {"child": ["installed"] * 2}


def test_locks_that_other_threads_hold(run_program: Any) -> None:
    """A fork does not wait for locks that are held only for moments; the child gets new ones."""
    states = run(
        run_program,
        """
        import logging
        from frame_swap.frames import dispatch
        handler = logging.StreamHandler()
        logging.getLogger().addHandler(handler)
        compiled = frame_swap.opt_in(f)
        check(compiled=compiled)
        frame_swap.wait()
        check(compiled=compiled)
        begin, release = threading.Barrier(6), threading.Event()
        def hold(lock):
            with lock:
                begin.wait()
                release.wait()
        locks = service._lock, region.registry.lock, dispatch._changing, executor()._shutdown_lock, handler.lock
        for lock in locks:
            in_background(lambda lock=lock: hold(lock))
        begin.wait()
        def child():
            logging.getLogger().warning("from the child")
            check(compiled=compiled)
            new = frame_swap.opt_in(g)
            check(g, new)
            frame_swap.wait()
            check(g, new)
            print("child", *states(), flush=True)
        fork()
        release.set()
        check(compiled=compiled)
        print("parent", *states())
        """,
    )
    assert states == {"child": ["installed"] * 2, "parent": ["installed"]}


def test_a_child_that_runs_to_its_end(run_program: Any) -> None:
    """It runs Python's and loky's exit hooks, with its parent's workers alive and a compile of its own pending."""
    states = run(
        run_program,
        """
        check()
        hold = threading.Event()
        def hold_pool():
            with executor()._shutdown_lock:
                hold.set()
                threading.Event().wait(5)
        thread = in_background(hold_pool)
        hold.wait()
        faulthandler.cancel_dump_traceback_later()  # Python hangs at the end of a child that has inherited it
        if (pid := os.fork()) == 0:
            limit_time()
            frame_swap.configure(delay=600)
            check(g, torch.compile(g, backend="frame_swap"))
            print("child", *states(), flush=True)
            sys.exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        frame_swap.wait()
        check()
        print("parent", *states())
        """,
    )
    assert states == {"child": ["failed", "pending"], "parent": ["installed"]}


SCRIPT = """
    {program}

    def run_child():
        child()
        sys.stdout.flush()

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 8
        def __getitem__(self, at):
            torch.testing.assert_close(compiled(x), f(x))
            return x + at

    if __name__ == "__main__":
        frame_swap.configure(delay={delay})
        check()
        {body}
        check()
        print("parent", *states(), flush=True)
        os._exit(0)
"""


long = pytest.mark.long


@pytest.mark.parametrize(
    "method", ["fork", pytest.param("spawn", marks=pytest.mark.thorough), pytest.param("forkserver", marks=long)]
)
def test_multiprocessing(method: str, tmp_path: Path) -> None:
    body = f"""
        import multiprocessing
        process = multiprocessing.get_context({method!r}).Process(target=run_child)
        process.start()
        process.join()
        assert process.exitcode == 0
    """
    states = run_script(tmp_path, body)
    assert states["child"][-1] == "installed"
    assert states["parent"] == ["pending"]


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=long)])
def test_workers_of_a_data_loader(method: str, tmp_path: Path) -> None:
    body = f"""
        loader = torch.utils.data.DataLoader(Data(), 2, num_workers=2, multiprocessing_context={method!r})
        total = sum(batch.sum() for batch in loader)
        torch.testing.assert_close(total, 8 * x.sum() + 28 * x.numel())
    """
    assert run_script(tmp_path, body) == {"parent": ["pending"]}


def run_script(folder: Path, body: str) -> dict[str, list[str]]:
    """Run a program from a file, so that spawned processes can import it."""
    script = folder / "train.py"
    program = textwrap.dedent(PROGRAM).replace("x = torch.randn(8, 8)", "x = torch.ones(8, 8) / 8")
    parts = textwrap.dedent(SCRIPT).partition("{program}")
    rest = parts[2].replace("{delay}", "600").replace("    {body}", textwrap.indent(textwrap.dedent(body), "    "))
    script.write_text(program + rest)
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | WITHOUT_GPUS,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    return {who: states for who, *states in lines}
