"""Forks and the end of the program while a frame is being captured beside it."""

from __future__ import annotations

import textwrap
from typing import Any

import pytest

PROGRAM = """
    import faulthandler, os, sys, threading, time
    faulthandler.dump_traceback_later(150, exit=True)  # a hang

    import torch
    torch.set_num_threads(1)  # OpenMP does not survive a fork
    import frame_swap
    from frame_swap.capture.captures import Capture, Outcome
    from frame_swap.internals import beside, dynamo, read_log
    frame_swap.configure(capture="background", when="never")

    def f(x):
        return (x.sin() @ x).relu()

    x = torch.randn(8, 8)
    call = torch.compile(f, backend="frame_swap")
    torch.mm(x, x, out=torch.empty(8, 8))  # its first call looks itself up without the GIL

    outcomes = []
    run = Capture.run
    def noted(capture):
        outcomes.append(run(capture).name)
        return Outcome[outcomes[-1]]
    Capture.run = noted

    def stay(obey):
        '''The next capture stays in an op, under Dynamo's lock; an event that is set when it is there.'''
        reached, dispatch = threading.Event(), beside.FakeTensorMode.dispatch
        def wait(*args, **keywords):
            if read_log.log() is not None and not reached.is_set():
                reached.set()
                while True:
                    if obey:
                        read_log.log().checkpoint()
                    time.sleep(0.001)
            return dispatch(*args, **keywords)
        beside.FakeTensorMode.dispatch = wait
        return reached

    def check():
        assert torch.equal(call(x), f(x))

    def settle():
        for _ in range(3):
            check()
            frame_swap.wait(100)
        return [row.eager_calls > 0 for row in frame_swap.report().regions][-1:]

    def fork():
        if (pid := os.fork()) == 0:
            code = 1
            try:
                assert frame_swap.report().capturing == []
                whole = torch.compile(f, backend="frame_swap", fullgraph=True)  # captured in the call
                assert torch.equal(whole(x), f(x))
                print("child", settle(), flush=True)
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0, "the child failed"
"""


def run(run_program: Any, program: str) -> list[str]:
    """The lines that the program prints."""
    lines: list[str] = run_program(textwrap.dedent(PROGRAM) + textwrap.dedent(program)).stdout.splitlines()
    return lines


def test_a_fork_stops_the_capture(run_program: Any) -> None:
    """It would hold Dynamo's lock for as long as the trace takes; here, for ever."""
    lines = run(
        run_program,
        """
        reached = stay(obey=True)
        check()
        assert reached.wait(100)
        fork()
        frame_swap.wait(100)
        assert outcomes == ["STOPPED"], outcomes
        print("parent", settle(), outcomes[1:])
        """,
    )
    assert lines == ["child [True]", "parent [True] ['WAITS']"]


def test_a_fork_beside_a_capture_that_does_not_stop(run_program: Any) -> None:
    """The child gets a lock of its own, since the thread that holds it does not exist there."""
    lines = run(
        run_program,
        """
        from frame_swap.runtime import forks
        forks.PATIENCE = 0.1
        reached = stay(obey=False)
        check()
        assert reached.wait(100)
        fork()
        check()
        print("parent", len(frame_swap.report().capturing), flush=True)
        os._exit(0)
        """,
    )
    assert lines == ["child [True]", "parent 1"]


def test_what_waits_for_a_call_survives_a_fork(run_program: Any) -> None:
    lines = run(
        run_program,
        """
        check()
        frame_swap.wait(100)
        fork()
        print("parent", settle(), outcomes)
        """,
    )
    assert lines == ["child [True]", "parent [True] ['WAITS']"]


@pytest.mark.parametrize("moment", ["the trace", "the call"])
def test_the_program_ends_during_a_capture(moment: str, run_program: Any) -> None:
    lines = run(
        run_program,
        f"""
        import atexit
        atexit.register(lambda: print(outcomes, "frame-swap-capture" in [t.name for t in threading.enumerate()]))
        reached = stay(obey=True)
        check()
        if {moment == "the trace"}:
            assert reached.wait(100)
        import frame_swap.capture.thread as home
        atexit.unregister(home.thread.stop)
        atexit.register(home.thread.stop)  # before the line above prints
        """,
    )
    # A capture that waits for its call may not have begun.
    assert lines == ["['STOPPED'] False"] or (moment == "the call" and lines == ["[] False"])
