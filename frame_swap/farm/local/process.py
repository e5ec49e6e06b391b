"""A worker process as the program sees it: the call that it runs, and how it ends.

Guarantees:
- `run` returns what the call returned, raises what it raised, or raises `Lost`, which says why.
- A process may die at any moment: nothing here waits for one that is dead.
- What ran beside a lost process goes with it: its process group, its folder, its pipes.
- A process talks to this one through inherited pipes and through files in a folder that is closed to other users.

Assumed: `changing` is held while a process is started or ended, which takes milliseconds, and across each fork:
loky's own locks are free then, and the child gets no copy of a pipe that tells of the end of a process. A daemonic
process of multiprocessing can have none of these: its calls are `Lost`.

The processes are loky's, and each has an executor of its own: one that dies takes all calls of its executor along.
loky keeps both ends of its pipes open, so it waits for ever for the rest of a message whose sender has died. Hence
calls and results are files, and only what is written in one piece goes through the pipes.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import math
import multiprocessing.process
import os
import pickle
import shutil
import signal
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

import loky
import psutil
from loky import process_executor

from ...errors import first_line
from ...runtime import forks, machine
from . import tokens, worker

GROWTH = 500_000_000
"""A process that has grown by more bytes than this since its smallest call is replaced: Inductor keeps a lot."""

LAST_LINES = 20
"""How many lines of its log a lost process is quoted with."""

ENVIRONMENT = {
    **machine.WORKER_ENVIRONMENT,
    "FRAME_SWAP_WORKER": "1",  # so that it starts none itself
    "PYTHONSAFEPATH": "1",  # import nothing from the directory that they start in
    "LOKY_MAX_MEMORY_LEAK_SIZE": "1e18",  # loky would replace a process while it gets its next call, and warn of it
}

SIGNAL_NAMES: dict[int, str] = {number: number.name for number in signal.Signals}

register_at_exit = getattr(threading, "_register_atexit", atexit.register)
"""Registers hooks that run before the interpreter waits for threads; the last one runs first."""

# loky registers its hook, which waits for pending calls, with each executor. Register it once, and before the hook
# that ends pending calls, so that the latter runs first.
register_at_exit(process_executor._python_exit)
process_executor.process_pool_executor_at_exit = process_executor._python_exit


changing = forks.lock()
"""Held while a process is started or ended: by one thread at a time, and not during a fork."""


_running: set[Process] = set()
"""This program's processes: while there are any, there is a folder for their tokens."""


@functools.cache
def _tokens_folder() -> str:
    return tempfile.mkdtemp(prefix="frame-swap-")  # 0700


def _is_over(process: Process) -> None:
    _running.discard(process)
    if not _running:
        shutil.rmtree(_tokens_folder(), ignore_errors=True)
        _tokens_folder.cache_clear()


class Terms(NamedTuple):
    """The terms that all processes of a pool share.

    Attributes:
        size: how many there are at most.
        idle_timeout: seconds after which one with nothing to do ends.
        memory_limit: bytes that one may hold, with the compilers that it runs.
        log_dir: the folder for their logs; None where a log goes with its process.
    """

    size: int
    idle_timeout: float
    memory_limit: float
    log_dir: str | None = None


class Lost(RuntimeError):
    """A call ended with its process; the message says how, and what to do.

    Attributes:
        details: what the process left behind for the log.
        again: whether another attempt might end better.
    """

    def __init__(self, reason: str, details: str = "", *, again: bool = True) -> None:
        super().__init__(reason)
        self.details = details
        self.again = again


class Process:
    """A worker process and the folder that it shares with this one; see worker.py for the other side.

    Attributes:
        holds_gpu: whether it holds memory of a GPU, as it does from the first compile for one until it ends.
        log: the file in which it says what it does, and which has what it prints.

    Raises:
        Exception: it could not be started.
    """

    def __init__(self, terms: Terms) -> None:
        self.ended = self._running = self._overdue = self.holds_gpu = False
        self._least = math.inf
        _running.add(self)
        self.folder = Path(tempfile.mkdtemp(prefix="frame-swap-"))  # 0700
        arguments = (os.getpid(), machine.NICENESS, str(self.folder), terms.memory_limit, terms.log_dir)
        environment = {
            **ENVIRONMENT,
            "TORCHINDUCTOR_COMPILE_THREADS": str(machine.compilers()),
            tokens.FOLDER: _tokens_folder(),
            tokens.COUNT: str(machine.compilers()),
        }
        try:
            self._executor = loky.ProcessPoolExecutor(
                1, initializer=worker.initialize, initargs=arguments, env=environment
            )
            self._executor.submit(os.getpid)  # starts it
            (self._process,) = self._executor._processes.values()
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            _is_over(self)
            raise
        # The program may wait for all `multiprocessing.active_children()`: this is none of its.
        multiprocessing.process._children.discard(self._process)  # type: ignore[attr-defined]
        self.pid: int = self._process.pid
        self.log = worker.log_path(str(self.folder), terms.log_dir, self.pid)

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return bool(self._process.is_alive())

    @property
    def usable(self) -> bool:
        """Whether it may get another call."""
        return self.alive and self._size() - self._least < GROWTH

    def run(self, call: bytes, limit: float) -> Any:
        """Run a pickled call in the process; return its result.

        Args:
            limit: seconds that it may take, the start of the process included.

        Raises:
            Lost: the process ended first, or call or result found no room.
            Exception: what the call raised.
        """
        self._running = True
        try:
            Path(self.folder, worker.CALL).write_bytes(call)
            failure = self._executor.submit(worker.run).result(min(limit, threading.TIMEOUT_MAX))
        except TimeoutError:
            self.expire()
            raise self._loss(limit) from None
        except (process_executor.BrokenProcessPool, process_executor.ShutdownExecutorError) as error:
            error.__traceback__ = None  # a cycle: the executor holds the error, and the traceback the executor
            raise self._loss(limit) from None
        except OSError as error:
            failure = first_line(error)
        self._running = False
        self._least = min(self._least, self._size())
        if failure:
            advice = "free some space, or set TMPDIR to a folder on a disk that has some"
            raise Lost(f"its files could not be written: {failure}; {advice}", again=False)
        with Path(self.folder, worker.RESULT).open("rb") as file:
            result, raised, self.holds_gpu = pickle.load(file)
        os.unlink(file.name)
        if raised is not None:
            raise raised
        return result

    def expire(self) -> None:
        """End the process because its call takes too long."""
        self._overdue = True
        # The worker's handler writes a traceback, and then lets the signal end the process.
        self._process.terminate()
        self._process.join(timeout=5)

    def end(self) -> None:
        """End the process with its compilers now, and remove its folder."""
        with changing:
            if self.ended:
                return
            self.ended = True
            # The group outlives a leader that died just now; after longer, another group may have its number.
            if self._running or self._process.is_alive():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.pid, signal.SIGKILL)
            self._executor.shutdown(wait=True, kill_workers=True)
            _is_over(self)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _loss(self, limit: float) -> Lost:
        # The worker writes plain text, into a folder of this user's.
        stage, last_words, traceback = (self._left(self.folder / n) for n in ("stage", "last_words", "traceback"))
        stage = stage or "starting"
        printed = self._left(Path(self.log)).splitlines()[-LAST_LINES:]
        details = "\n".join([traceback, f"the last lines of {self.log}:", *printed]).lstrip()
        self.end()
        if self._overdue:
            advice = "frame_swap.configure(job_timeout=...) allows it more"
            return Lost(f"it was still {stage} after job_timeout={limit:g} s; {advice}", details, again=False)
        if last_words:
            return Lost(f"{last_words}, while {stage}", details, again=False)
        code: int = self._process.exitcode or 0
        if code < 0:
            how = f"was killed by {SIGNAL_NAMES.get(-code, -code)} while {stage}"
        else:
            raised = traceback.rpartition("\n")[2]
            how = f"ended with exit code {code} while {stage}{': ' * bool(raised)}{raised}"
        advice = "the logger frame_swap has its traceback at level INFO"
        if code == -signal.SIGKILL:
            advice = "if memory ran out, frame_swap.configure(workers=1) needs less of it"
        return Lost(f"the worker was lost: it {how}; {advice}", details)

    @staticmethod
    def _left(path: Path) -> str:
        try:
            return path.read_text(errors="replace").strip()
        except OSError:
            return ""

    def _size(self) -> float:
        try:
            return float(psutil.Process(self.pid).memory_info().rss)
        except psutil.Error:
            return math.inf


def forget_all() -> None:
    """In a forked child: the processes are the parent's. Wake no thread of its executors."""
    process_executor._threads_wakeups.clear()
    _running.clear()
    _tokens_folder.cache_clear()
