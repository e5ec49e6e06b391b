"""What `wait()` and `watch()` show: on a terminal, in a pipe, in a notebook; and that it changes nothing."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import frame_swap
from frame_swap import State
from frame_swap.region import Attempt, Event, Purpose, Record
from frame_swap.region import record as region_record
from frame_swap.ui.progress import display, state

COMPILES = """
import torch, frame_swap
frame_swap.configure(delay=2.5)
torch.compile(lambda x: x.sin() + 1, backend="frame_swap")(torch.ones(3))
"""
WAITS = COMPILES + "frame_swap.wait()\n"


def on_terminal(program: str, columns: int = 80) -> str:
    """What `program` prints on a terminal of so many columns, escape sequences included."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = os.environ | {"TERM": "xterm", "COLUMNS": str(columns)}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=child, stdout=child, stderr=child, env=environment
    ) as process:
        os.close(child)
        printed = b""
        while True:
            try:
                some = os.read(parent, 65536)
            except OSError:  # the other end is closed
                break
            if not some:
                break
            printed += some
    os.close(parent)
    assert process.returncode == 0, printed.decode()
    return printed.decode()


def without_escapes(printed: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed).replace("\r", "\n").splitlines()


@pytest.mark.fast
def test_a_pipe_gets_lines(run_program: Callable[..., Any]) -> None:
    lines = run_program(WAITS).stderr.splitlines()
    assert [line for line in lines if not line.startswith("frame-swap: ")] == []
    assert lines[0] == f"frame-swap: {display.NORMAL.format('meanwhile')}"
    assert len(lines) >= 3
    seconds = [int(re.search(r"0 of 1 graph done after (\d+) s", line)[1]) for line in lines[1:-1]]
    assert all(b - a >= display.LINES_EVERY - 1 for a, b in pairwise(seconds))  # of a compile that takes long
    assert re.search(r"1 of 1 graph on compiled code after \d+ s; eager code has served 1 call$", lines[-1])


@pytest.mark.parametrize(
    "waits",
    ["frame_swap.wait(progress=False)", pytest.param("", marks=pytest.mark.thorough)],
    ids=["False", "no wait"],
)
def test_nothing_is_shown_unasked(waits: str, run_program: Callable[..., Any]) -> None:
    assert run_program(COMPILES + waits).stderr == ""


def test_a_short_wait_shows_nothing(run_program: Callable[..., Any]) -> None:
    assert run_program("import frame_swap; frame_swap.wait()").stderr == ""


@pytest.mark.fast
def test_a_terminal_gets_a_bar_that_fits_and_leaves_one_line() -> None:
    printed = on_terminal(WAITS + "print('after')")
    lines = [line.rstrip() for line in without_escapes(printed) if line.strip()]
    assert any("━" in line and "0 of 1 graph" in line for line in lines)
    assert any("is being compiled" in line or "is being loaded" in line for line in lines)
    assert max(map(len, lines)) <= 80
    assert lines[-1] == "after"
    assert "1 of 1 graph on compiled code" in " ".join(lines[-3:-1])


def test_what_the_program_prints_stays_above_the_bar() -> None:
    program = (
        COMPILES
        + "with frame_swap.watch():\n    import time\n    for i in range(6): print('step', i); time.sleep(.5)"
    )
    lines = without_escapes(on_terminal(program))
    assert [line.strip() for line in lines if line.startswith("step")] == [f"step {i}" for i in range(6)]


def test_a_child_of_a_watched_program_prints_and_ends(run_program: Callable[..., Any]) -> None:
    program = COMPILES + (
        "import os, time\n"
        "with frame_swap.watch():\n"
        "    time.sleep(2)\n"
        "    if not (child := os.fork()): print('child', flush=True); os._exit(0)\n"
        "    os.waitpid(child, 0)\n"
    )
    assert "child" in on_terminal(program)


@pytest.mark.thorough
def test_watch_is_for_whatever_is_compiled_later(run_program: Callable[..., Any]) -> None:
    program = "import frame_swap\nwatching = frame_swap.watch()\n" + COMPILES + "frame_swap.wait(progress=False)\n"
    lines = run_program(program + "watching.stop()").stderr.splitlines()
    assert "1 of 1 graph on compiled code" in lines[-1]


def test_a_display_that_fails_is_dropped(run_program: Callable[..., Any]) -> None:
    program = "import sys\n" + WAITS.replace(
        "frame_swap.wait()", "sys.stderr.close(); print(frame_swap.wait().regions[0].state)"
    )
    assert run_program(program).stdout.strip() == "installed"


def planted(monkeypatch: pytest.MonkeyPatch, *ended: tuple[int, float]) -> list[Record]:
    """Records with a compile of so many nodes and seconds each, which has ended, and nothing else."""
    records = []
    for size, seconds in ended:
        record = Record(None, "0/0")
        record.size = size
        record.attempts[0].compiled(0.0, 0.0, seconds, 1)
        record.attempts[0].move(Event.LOADED)
        record.attempts[0].move(Event.INSTALLED)
        records.append(record)
    monkeypatch.setattr(region_record, "_records", records)
    return records


@pytest.mark.fast
def test_what_is_left_is_estimated_from_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    frame_swap.configure(workers=1)
    records = planted(monkeypatch, (10, 20.0), (20, 40.0))
    assert state.Progress.now(time.time()).left == 0.0
    waits, runs = Record(None, "1/0"), Record(None, "2/0")
    waits.size, runs.size = 5, 30
    runs.attempts[0].begun_at = time.time() - 25.0
    records += [waits, runs]
    progress = state.Progress.now(time.time())
    assert progress.left == pytest.approx(5 * 2 + 30 * 2 - 25, abs=1)
    assert [one.doing for one in progress.pending] == ["is being compiled", "waits for a worker"]
    frame_swap.configure(workers=2)
    assert state.Progress.now(time.time()).left == pytest.approx((5 * 2 + 30 * 2 - 25) / 2, abs=1)


def test_nothing_is_estimated_where_that_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    records = planted(monkeypatch)
    records.append(Record(None, "0/0"))
    assert state.Progress.now(time.time()).left is None  # nothing has ended
    records = planted(monkeypatch, (10, 20.0))
    tuned = Attempt(records[0], Purpose.BETTER)
    tuned.autotuned = True
    records[0].begin(tuned)
    assert state.Progress.now(time.time()).left is None
    assert tuned.state is State.PENDING


CELL = WAITS.replace("x.sin() + 1", "x.sin() + 1 + 0 * {n}")


@pytest.mark.thorough
def test_a_notebook_keeps_the_last_state(tmp_path: Path) -> None:
    nbformat = pytest.importorskip("nbformat", reason="needs nbclient and ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel")
    pytest.importorskip("ipykernel", reason="needs nbclient and ipykernel")
    cells = [CELL.format(n=1), CELL.format(n=1), "frame_swap.report()"]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(book, timeout=200, kernel_name="python3").execute()
    for cell in book.cells[:2]:
        shown = [out for out in cell.outputs if out.output_type == "display_data"]
        assert len(shown) == 1, cell.outputs  # displayed anew in its place
        assert "on compiled code" in shown[0].data["text/html"]
        assert "on compiled code" in shown[0].data["text/plain"]
    (report,) = book.cells[2].outputs
    assert "<table>" in report.data["text/html"]
    assert "2 graphs" in report.data["text/plain"]
