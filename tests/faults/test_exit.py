"""A program that ends while compiles are pending ends at once, and leaves no process or file of its workers."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from faults.moments import HANG

PENDING = """
    import os, sys, time, torch, frame_swap
    from frame_swap.farm.workers import workers
    compiled = torch.compile(lambda x: (x.sin() @ x).relu(), backend="frame_swap")
    compiled(torch.randn(32, 32))
    assert [str(r.state) for r in frame_swap.report().regions] == ["pending"]
"""


@pytest.fixture
def blocked_compiler(tmp_path: Path) -> Path:
    """A C++ compiler that never ends, and starts a child that never ends; both write down their PIDs."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        f"#!/bin/sh\necho $$ >> {tmp_path}/pids\nsleep 100000 &\necho $! >> {tmp_path}/pids\nwait\n"
    )
    compiler.chmod(0o700)
    return compiler


def start(ending: str, compiler: Path) -> subprocess.Popen[str]:
    """Start a program that prints its workers' PIDs during a C++ compile, reads a line, and executes `ending`."""
    pids = compiler.parent / "pids"
    program = PENDING + (
        f"""
    while not os.path.exists({str(pids)!r}) or open({str(pids)!r}).read().count("\\n") < 2:
        time.sleep(0.01)
    print(*workers.pids(), flush=True)
    sys.stdin.readline()
    print(time.time(), flush=True)
    {ending}
    """
    )
    environment = {"CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(compiler.parent / "cache")}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**psutil.Process().environ(), **environment},
    )


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("pass", 0),
        ("sys.exit(3)", 3),
        ("raise ValueError('uncaught')", 1),
        ("os.kill(os.getpid(), 15); time.sleep(1000)", -signal.SIGTERM),
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL),
    ],
    ids=["end", "sys.exit", "uncaught", "SIGTERM", "SIGKILL"],
)
def test_an_end_in_the_middle_of_a_compile(
    ending: str, status: int, blocked_compiler: Path, record_property: Callable[[str, object], None]
) -> None:
    program = start(ending, blocked_compiler)
    assert program.stdout is not None
    workers = [int(pid) for pid in program.stdout.readline().split()]
    compilers = [int(pid) for pid in (blocked_compiler.parent / "pids").read_text().split()]
    processes = [psutil.Process(pid) for pid in (*workers, *compilers)]
    assert len(workers) >= 1
    assert len(compilers) >= 2

    # Returns when it has ended and nobody holds its output any more; the compile would take for ever.
    output, errors = program.communicate("\n", timeout=HANG)
    record_property("seconds to the end", time.time() - float(output))
    assert program.returncode == status
    if status >= 0:  # else nobody frees loky's semaphores but its tracker, which says so
        assert "leaked" not in errors
    ended = time.monotonic()
    _, alive = psutil.wait_procs(processes, timeout=5.0)
    record_property("seconds to the last worker's end", time.monotonic() - ended)
    assert not alive
    written = {int(pid) for pid in (blocked_compiler.parent / "pids").read_text().split()}
    assert not [pid for pid in written if psutil.pid_exists(pid) and "sleep" in psutil.Process(pid).name()]


@pytest.mark.parametrize(
    "another",
    [
        pytest.param("frame_swap.configure(workers=2)", marks=pytest.mark.long),
        "os.kill(workers.pids()[0], 9)",
    ],
)
def test_the_end_with_another_pool_than_the_first(another: str, run_program: Any) -> None:
    """loky waits for each pool in a separate exit hook."""
    run_program(
        PENDING
        + f"""
    frame_swap.configure(workers=1)
    frame_swap.wait()
    {another}
    frame_swap.wait()
    compiled = torch.compile(lambda x: (x.cos() @ x).relu(), backend="frame_swap")
    compiled(torch.randn(32, 32))
    frame_swap.configure(delay=600)
    compiled = torch.compile(lambda x: (x.tan() @ x).relu(), backend="frame_swap")
    compiled(torch.randn(32, 32))
    while not (pids := workers.pids()):
        pass
    os.kill(pids[0], 19)  # SIGSTOP: the compile takes for ever
    """
    )
