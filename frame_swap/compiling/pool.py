"""Worker processes, and for each a thread here that hands it one call at a time.

Guarantees:
- `submit` neither waits for a call nor raises because of one. Each future ends: with what the call returned or
  raised; with `Lost`, which says why, where its process was lost; or cancelled, while it had not begun.
- A process that is lost concerns the call that it ran, and no other. That call is tried again once, in a fresh
  process; not where it went beyond a limit, where nobody wants it any more, or while the pool is being killed.
- A process may die at any moment, also half-way through a message: nothing here waits for one that is dead.
- What ran beside a lost process goes with it: its process group, its folder, its pipes. It is replaced when there
  is something to do.
- A process that has nothing to do for `idle_timeout` ends, and so does its thread.
- `kill` ends all processes and waits for no call; `retire` lets what was submitted end first.
- In a forked child `forget_all` closes the child's copies of the pipes and touches no process.
- Processes and this one talk through two inherited pipes each. Nothing listens, and nobody else can connect.

Assumed: the pool's lock guards its lists, and is held while a process is started or ended, which takes
milliseconds. A process is used by its own thread; others only end it.

Why no library: the executors of `concurrent.futures` and loky share their pipes among workers and keep both ends
open. One worker that dies then takes the calls of all along, and the executor waits for ever for the rest of a
result if it dies while sending it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import psutil

NICENESS = 2
"""How far workers and their compilers stand back behind the program. Where they have a core of their own it does
not matter. Where they have none, more would starve them: at 10, a program that keeps two cores busy waits for
its swap for minutes; at 0, its steps take twice as long as at 2 and the swap comes no sooner."""

ENTRY = "from frame_swap.compiling.worker import main; main()"
"""What a worker process runs."""

GROWTH = 500_000_000
"""A process that holds so many bytes more than after its first call is replaced: Inductor keeps a lot."""


class Terms(NamedTuple):
    """What the processes of a pool have in common.

    Attributes:
        size: how many there are at most.
        idle_timeout: seconds after which one with nothing to do ends.
        memory_limit: bytes that one may hold, with the compilers that it runs.
        compilers: how many of these it may run at a time.
    """

    size: int
    idle_timeout: float
    memory_limit: float
    compilers: int


class Lost(RuntimeError):
    """A process ended while it ran a call; the message says how, and what to do.

    Attributes:
        details: what it left behind for the log.
        again: whether another attempt might end better.
    """

    def __init__(self, reason: str, details: str = "", *, again: bool = True) -> None:
        super().__init__(reason)
        self.details = details
        self.again = again


class Process:
    """One worker process; see `worker.main` for the other side.

    Raises:
        OSError: it could not be started.
    """

    def __init__(self, terms: Terms) -> None:
        self._lock = threading.Lock()
        self._running = False  # a call
        self._overdue = False
        self._ended = False
        self._first_size: int | None = None
        self._ends: list[Connection] = []
        _all.add(self)
        request_reader, self._requests = self._pipe()
        self._replies, reply_writer = self._pipe()
        handles = (request_reader.fileno(), reply_writer.fileno())
        search_path = json.dumps([os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)])
        start = f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); {ENTRY}"
        self.folder = tempfile.mkdtemp(prefix="frame-swap-")  # 0700
        try:
            self._process = subprocess.Popen(
                # -P: nothing is imported from the directory that it starts in
                [sys.executable, "-P", "-c", start, search_path, *map(str, handles)],
                pass_fds=handles,
                stdin=subprocess.DEVNULL,
                # One that outlives its parent and holds its stdout keeps `python train.py | tee log` from ending.
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # Those that wait in a worker must not spin: it traces with the program's number of threads.
                env={**os.environ, "OMP_WAIT_POLICY": "passive"},
                process_group=0,  # with its compilers
            )
        except BaseException:
            self.close()
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        request_reader.close()
        reply_writer.close()
        self.pid = self._process.pid
        with contextlib.suppress(OSError):  # gone already: the first call will say so
            self._requests.send((os.getpid(), NICENESS, terms.compilers, self.folder, terms.memory_limit))

    @property
    def usable(self) -> bool:
        """Whether it may be given another call."""
        return self._process.poll() is None and not self._overdue and not self._has_grown()

    def run(self, call: bytes, limit: float) -> Any:
        """Have it run a pickled call; returns what that returns.

        Args:
            limit: seconds that it may take, the start of the process included.

        Raises:
            Lost: the process ended first.
            Exception: what the call raised.
        """
        alarm = threading.Timer(min(limit, threading.TIMEOUT_MAX), self._expire)
        alarm.daemon = True
        self._running = True
        try:
            if limit < math.inf:
                alarm.start()
            self._requests.send_bytes(call)
            result, error = self._replies.recv()
        except (EOFError, OSError):
            raise self._loss(limit) from None
        finally:
            with self._lock:
                self._running = False
            alarm.cancel()
        if error is not None:
            raise error
        self._note_first_size()
        return result

    def end(self) -> None:
        """End it now, with its compilers, and remove its folder. Its own thread closes the pipes."""
        self._kill_group()
        self._process.wait()
        self._ended = True  # what has its number from now on is another
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Close the pipes, and nothing else."""
        for end in self._ends:
            end.close()

    def forget(self) -> None:
        """In a forked child: it is the parent's."""
        self.close()
        if hasattr(self, "_process"):
            self._process.returncode = 0  # there is nothing to wait for here

    def _pipe(self) -> tuple[Connection, Connection]:
        reader, writer = Pipe(duplex=False)
        self._ends += reader, writer
        return reader, writer

    def _expire(self) -> None:
        with self._lock:
            if not self._running:
                return
            self._overdue = True
        # The worker's handler writes down where it is, whatever it does, and lets the signal end it.
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        self._kill_group()

    def _kill_group(self) -> None:
        # The group outlives a leader that is dead, and keeps its number until the last of them is gone.
        if not self._ended:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)

    def _loss(self, limit: float) -> Lost:
        # What it has written is text, in a folder of our own.
        left = {name: _text(Path(self.folder, name)) for name in ("stage", "last_words", "traceback")}
        self.end()
        code = self._process.returncode
        stage = left["stage"] or "starting"
        if self._overdue:
            reason = f"it was still {stage} after job_timeout={limit:g} s; frame_swap.configure(job_timeout=...)"
            return Lost(f"{reason} allows it more", left["traceback"], again=False)
        if left["last_words"]:
            return Lost(f"{left['last_words']}, while {stage}", left["traceback"], again=False)
        how = f"was killed by {_signal_name(-code)} while {stage}"
        advice = "the logger frame_swap has its traceback at level INFO"
        if code == -signal.SIGKILL:
            advice = "if memory ran out, frame_swap.configure(workers=1) needs less of it"
        elif code >= 0:
            raised = left["traceback"].rpartition("\n")[2]
            how = f"ended with exit code {code} while {stage}{': ' * bool(raised)}{raised}"
        return Lost(f"the worker was lost: it {how}; {advice}", left["traceback"])

    def _has_grown(self) -> bool:
        if self._first_size is None:
            return False
        try:
            size: int = psutil.Process(self.pid).memory_info().rss
        except psutil.Error:
            return False
        return size - self._first_size > GROWTH

    def _note_first_size(self) -> None:
        if self._first_size is None:
            with contextlib.suppress(psutil.Error):
                self._first_size = psutil.Process(self.pid).memory_info().rss


_all: weakref.WeakSet[Process] = weakref.WeakSet()


def forget_all() -> None:
    """In a forked child: close its copies of all pipes."""
    for process in list(_all):
        process.forget()


class _Task(NamedTuple):
    future: Future[Any]
    call: bytes
    limit: float
    wanted: Callable[[], bool]


class Pool:
    """Processes on the same terms, and what they have to do."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self._changed = threading.Condition()
        self._tasks: deque[_Task] = deque()
        self._processes: dict[threading.Thread, Process | None] = {}
        self._retired = False
        self._killed = False

    def start(self) -> None:
        """Start what processes are missing.

        Raises:
            OSError, RuntimeError: there is none, and none could be started.
        """
        with self._changed:
            try:
                while len(self._processes) < self.terms.size and not self._killed:
                    self._hire()
            except (OSError, RuntimeError):
                if not self._processes:
                    raise

    def submit(
        self, call: Callable[[], Any], limit: float = math.inf, wanted: Callable[[], bool] = lambda: True
    ) -> Future[Any]:
        """Have `call` run in a process of the pool; it must pickle, and what it returns.

        Args:
            limit: seconds that it may take; where its process has yet to start, that included.
            wanted: asked before it is tried again.

        Raises:
            OSError, RuntimeError: no process could be started.
        """
        task = _Task(Future(), pickle.dumps(call), limit, wanted)
        with self._changed:
            if self._killed:
                raise RuntimeError("the interpreter is shutting down")
            self.start()
            self._tasks.append(task)
            self._changed.notify()
        return task.future

    def pids(self) -> list[int]:
        """Of the processes that there are."""
        with self._changed:
            return [process.pid for process in self._processes.values() if process is not None]

    def retire(self) -> None:
        """End when all that was submitted has ended."""
        with self._changed:
            self._retired = True
            self._changed.notify_all()

    def kill(self) -> None:
        """End all processes now."""
        with self._changed:
            self._retired = self._killed = True
            tasks = list(self._tasks)
            self._tasks.clear()
            processes = [process for process in self._processes.values() if process is not None]
            self._changed.notify_all()
        for task in tasks:
            task.future.cancel()
        for process in processes:
            process.end()

    def _hire(self) -> None:
        process = Process(self.terms)
        thread = threading.Thread(target=self._attend, args=(process,), name="frame-swap-worker", daemon=True)
        self._processes[thread] = process
        try:
            thread.start()
        except RuntimeError:  # out of threads
            del self._processes[thread]
            _discard(process)
            raise

    def _attend(self, process: Process | None) -> None:
        while (task := self._next(process)) is not None:
            process = self._serve(task, process)
            del task  # with the call, and what it returned

    def _next(self, process: Process | None) -> _Task | None:
        """Wait for something to do; where there is nothing, the process ends, and None."""
        me = threading.current_thread()
        with self._changed:
            self._processes[me] = process
            idle = min(self.terms.idle_timeout, threading.TIMEOUT_MAX)
            self._changed.wait_for(lambda: self._tasks or self._retired, idle)
            if self._tasks:
                return self._tasks.popleft()
            del self._processes[me]
            if process is not None:
                _discard(process)
            return None

    def _serve(self, task: _Task, process: Process | None) -> Process | None:
        """Run a task, which may take a second attempt; returns the process that is there now."""
        if not task.future.set_running_or_notify_cancel():
            return process
        attempts = 0
        while True:
            attempts += 1
            try:
                process = self._usable(process)
                result = process.run(task.call, task.limit)
            except Lost as lost:
                if process is not None:
                    _discard(process)
                    process = None
                if lost.again and attempts == 1 and task.wanted() and not self._killed:
                    continue
                tried = f"{lost} (tried twice)" if attempts > 1 else str(lost)
                task.future.set_exception(Lost(tried, lost.details))
            except BaseException as error:
                task.future.set_exception(error)
            else:
                task.future.set_result(result)
            return process

    def _usable(self, process: Process | None) -> Process:
        """`process`, or a fresh one in its place."""
        if process is not None:
            if process.usable:
                return process
            _discard(process)
        with self._changed:  # `kill` finds it on the list, or it is not started
            if self._killed:
                raise Lost("the interpreter is shutting down", again=False)
            try:
                fresh = Process(self.terms)
            except OSError as error:
                raise Lost(f"no worker could be started: {error}") from error
            self._processes[threading.current_thread()] = fresh
            return fresh


def _discard(process: Process) -> None:
    process.end()
    process.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
