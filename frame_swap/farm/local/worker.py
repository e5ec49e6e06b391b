"""A worker process: how it is set up, and how it runs calls.

No module is imported here that imports torch: a worker lowers its priority first, and imports torch after that.

Guarantees:
- When `initialize` returns, the worker has a lower priority and a process group of its own, and is watched: once
  the program's process is gone, for whatever reason, the worker ends itself and its compilers, and removes its
  folder. It also ends itself when it holds more memory than it may, compilers included.
- `run` raises nothing and returns a short text. A result is in the worker's folder as a whole, or not at all.
- However the worker ends, its folder says in plain text what it was doing: `stage`, and `traceback` or `last_words`
  if there was time to write them. Temporary files of the worker and its compilers are there, too.
- What the worker and its compilers print goes into the worker's log, and nowhere else.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import math
import os
import pickle
import select
import shutil
import signal
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from ...errors import first_line
from .. import compile, place
from . import bytecode, tokens

_LISTENERS = ("TORCH_LOGS", "TORCH_LOGS_OUT", "TORCH_TRACE", "TORCH_DTRACE")
"""The parcel says what the program logs and traces, and the files belong to the program; see shipping/echo."""


CALL, RESULT = "call", "result"
"""Files in the worker's folder: the call to run; its result, its exception, and whether a GPU's memory is held."""


def run() -> str:
    """Run the call in this worker's folder and write its result there. Return how that failed, or ""."""
    folder = Path(_folder)
    result: tuple[Any, BaseException | None]
    gc.disable()  # an eighth of a compile's time, else; see `_tidy_soon`
    try:
        call = pickle.loads((folder / CALL).read_bytes())
        os.unlink(folder / CALL)
        try:
            result = call(), None
        except BaseException as error:
            result = None, error
        _note("sending its result")
        from ...internals import gpu

        _send((*result, gpu.is_in_use()))
        _note("idle")
        _tidy_soon()
    except BaseException as error:
        return first_line(error)[:500]  # it has to fit through the pipe in one piece
    finally:
        gc.enable()
    return ""


TIDY_AFTER = 3.0
"""Seconds from a result until a worker collects its garbage, for half a second. The program loads meanwhile."""


def _tidy_soon() -> None:
    """Give back what the last call has left behind, unless another one begins."""

    def tidy() -> None:
        from ...internals import gpu

        if gc.isenabled():  # no call runs
            gc.collect()
            gpu.give_back_cached()

    timer = threading.Timer(TIDY_AFTER, tidy)
    timer.daemon = True
    with contextlib.suppress(RuntimeError):  # out of threads
        timer.start()


def _send(result: tuple[Any, BaseException | None, bool]) -> None:
    unfinished = Path(_folder, f"{RESULT}.unfinished")
    with unfinished.open("wb") as file:
        pickle.dump(result, file)
    unfinished.rename(Path(_folder, RESULT))


def log_path(folder: str, log_dir: str | None, pid: int) -> str:
    """The log of the worker `pid`: in `log_dir`, or in the worker's own folder."""
    return os.path.join(folder, "log") if log_dir is None else os.path.join(log_dir, f"worker-{pid}.log")


def initialize(parent: int, niceness: int, folder: str, memory_limit: float, log_dir: str | None) -> None:
    """Make this process a worker of `parent`; runs once, before the first job.

    Args:
        niceness: by how much its priority is lower.
        folder: its own, for what it leaves behind.
        memory_limit: bytes that it may hold, with its compilers.
        log_dir: where its log is kept when it has ended; None where that goes, too.
    """
    global _folder, _traceback_file  # which stays open
    _folder = folder
    gc.disable()
    try:
        with contextlib.suppress(OSError):  # changing the priority is not permitted
            os.nice(niceness)
        os.setpgid(0, 0)  # with its compilers
        os.umask(0o077)  # files in caches are for this user alone
        # A worker that outlives its parent and holds its stdout would keep `python train.py | tee log` from ending.
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        path = log_path(folder, log_dir, os.getpid())
        for standard in (1, 2):
            os.dup2(_opened(path), standard)
        place.enter(_note, folder, path)
        _note("importing torch")
        threading.Thread(target=_end_with, args=(parent,), name="frame-swap-watch", daemon=True).start()
        if memory_limit < math.inf:
            watch = threading.Thread(
                target=_end_beyond, args=(memory_limit,), name="frame-swap-memory", daemon=True
            )
            watch.start()
        _traceback_file = open(os.path.join(folder, "traceback"), "w")  # noqa: SIM115
        faulthandler.enable(_traceback_file)
        faulthandler.register(signal.SIGTERM, _traceback_file, chain=True)
        for variable in _LISTENERS:
            os.environ.pop(variable, None)
        compile.allow_caches()
        bytecode.keep()
        _import_torch()
        gc.freeze()  # modules stay
        gc.enable()
    except BaseException:
        _leave("traceback", traceback.format_exc())
        os._exit(1)


def _opened(path: str) -> int:
    """A descriptor that appends to the log, or to nothing where that cannot be written."""
    with contextlib.suppress(OSError):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    return os.open(os.devnull, os.O_WRONLY)


def _import_torch() -> None:
    import torch

    from ...artifacts import folders
    from ...internals import inductor
    from ...shipping.echo import PREPARING

    inductor.import_compiling()
    inductor.wrap_compilers(tokens.call_holding)
    folders.keep_temporary_files_in(_folder)
    with contextlib.suppress(ImportError):
        # Inductor's progress bar makes a lock that outlives a killed worker; the program would hear of a leak.
        from tqdm import tqdm

        tqdm.set_lock(threading.RLock())
    if not torch.cuda.is_available():
        # This import may warn of a CUDA compiler: do it now, before a compile's record repeats that to the program.
        import torch.utils.cpp_extension

        threading.Thread(target=_probe_cpu, name=PREPARING, daemon=True).start()
    else:
        threading.Thread(target=_prepare_for_gpu, name=PREPARING, daemon=True).start()


_folder = ""
"""This worker's folder, closed to other users; "" in a user's executor."""

_traceback_file: Any = None


def _note(stage: str) -> None:
    """Note what the worker does now, in words that fit behind "while"."""
    _leave("stage", stage)
    place.log(stage)


def _leave(name: str, text: str) -> None:
    if _folder:
        with contextlib.suppress(OSError):
            Path(_folder, name).write_text(text)


def _probe_cpu() -> None:
    # The first time on a machine, Inductor runs the C++ compiler several times to find the vector instructions.
    # Begun now, these runs overlap with the tracing of the first graph.
    from ...artifacts import folders
    from ...internals import inductor

    # Without a compiler, on a full disk or with an unsafe cache, the compile itself reports the problem.
    with contextlib.suppress(Exception):
        directory = os.environ.setdefault(folders.INDUCTOR, folders.default_cache())
        folders.check(directory)
        inductor.find_vector_instructions()


def _prepare_for_gpu() -> None:
    from ...internals import inductor

    with contextlib.suppress(Exception):  # the compile itself reports the problem
        inductor.prepare_for_gpu()


def _end_with(parent: int) -> None:
    import psutil

    try:  # returns when the parent is dead, even before it is reaped
        select.select([os.pidfd_open(parent)], [], [])
    except (AttributeError, OSError):  # not Linux, or gone already
        with contextlib.suppress(psutil.Error):
            psutil.Process(parent).wait()
    _end()


def _end_beyond(limit: float) -> None:
    import psutil

    me = psutil.Process()
    while True:
        held = 0
        for process in (me, *me.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                held += process.memory_info().rss
        if held > limit:
            held_gb, limit_gb = held / 1e9, limit / 1e9
            advice = "frame_swap.configure(memory_limit=...) allows it more"
            _leave("last_words", f"it took {held_gb:.1f} GB, more than memory_limit={limit_gb:g}; {advice}")
            os.killpg(0, signal.SIGKILL)  # the folder stays for the process that waits for the result
        time.sleep(0.2)


def _end() -> None:
    for folder in (_folder, os.environ.get(tokens.FOLDER)):
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)  # this process, and its compilers
