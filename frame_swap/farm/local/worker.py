"""A worker process: what it is made of, and the calls that it runs.

Nothing here imports torch at the top: a worker first lowers its priority, and only then pays for the import.

Guarantees:
- `initialize` returns once the worker is nice, in a process group of its own, and watched: when the program's
  process is gone, however it went, the worker ends itself and its compilers, and removes its folder. When it holds
  more memory than it may, compilers included, it ends itself, too.
- `run` raises nothing, and what it returns is short. A result is in the worker's folder as a whole, or not at all.
- Whatever ends the worker, its folder then says in plain text what it was doing: `stage`, and `traceback` or
  `last_words` where there was an occasion to write them. Its temporary files and its compilers' are there, too.
"""

from __future__ import annotations

import contextlib
import faulthandler
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

_LISTENERS = ("TORCH_LOGS", "TORCH_LOGS_OUT", "TORCH_TRACE", "TORCH_DTRACE")
"""What the program listens to is in each parcel, and its files are its own: see echo.py."""


CALL, RESULT = "call", "result"
"""Files in the worker's folder: what it is to run, and a pair of what that returned and what it raised."""


def run() -> str:
    """Run the call that lies in this worker's folder, and put its result there; how that failed, or ""."""
    folder = Path(_folder)
    result: tuple[Any, BaseException | None]
    try:
        call = pickle.loads((folder / CALL).read_bytes())
        os.unlink(folder / CALL)
        try:
            result = call(), None
        except BaseException as error:
            result = None, error
        _note("sending its result")
        _send(result)
        _note("idle")
    except BaseException as error:
        return first_line(error)[:500]  # it must go through the pipe in one piece
    return ""


def _send(result: tuple[Any, BaseException | None]) -> None:
    unfinished = Path(_folder, f"{RESULT}.unfinished")
    with unfinished.open("wb") as file:
        pickle.dump(result, file)
    unfinished.rename(Path(_folder, RESULT))


def initialize(parent: int, niceness: int, compiler_threads: int, folder: str, memory_limit: float) -> None:
    """Make this process a worker of `parent`; runs once, before the first job.

    Args:
        niceness: by how much its priority is lower.
        compiler_threads: how many compilers it may run at a time.
        folder: its own, for what it leaves behind.
        memory_limit: bytes that it may hold, with its compilers.
    """
    global _folder, _traceback_file  # which stays open
    _folder = folder
    place.enter(_note, folder)
    _note("importing torch")
    try:
        with contextlib.suppress(OSError):  # not permitted to change priority: then not
            os.nice(niceness)
        os.setpgid(0, 0)  # with its compilers
        os.umask(0o077)  # what is written into caches is for nobody else
        # One that outlives its parent and holds its stdout keeps `python train.py | tee log` from ending.
        nowhere = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(nowhere, standard)
        threading.Thread(target=_end_with, args=(parent,), name="frame-swap-watch", daemon=True).start()
        if memory_limit < math.inf:
            watch = threading.Thread(
                target=_end_beyond, args=(memory_limit,), name="frame-swap-memory", daemon=True
            )
            watch.start()
        _traceback_file = open(os.path.join(folder, "traceback"), "w")  # noqa: SIM115
        faulthandler.enable(_traceback_file)
        faulthandler.register(signal.SIGTERM, _traceback_file, chain=True)
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(compiler_threads)
        for variable in _LISTENERS:
            os.environ.pop(variable, None)
        compile.allow_caches()
        _import_torch()
    except BaseException:
        _leave("traceback", traceback.format_exc())
        os._exit(1)


def _import_torch() -> None:
    import torch

    from ...artifacts import folders
    from ...internals import inductor

    inductor.import_compiling()
    folders.keep_temporary_files_in(_folder)
    with contextlib.suppress(ImportError):
        # Inductor's progress bar makes a lock that outlives a killed worker, and the program is told of a leak.
        from tqdm import tqdm

        tqdm.set_lock(threading.RLock())
    if not torch.cuda.is_available():
        # It warns of a CUDA compiler: not while a compile is recorded, or the program would hear that again.
        import torch.utils.cpp_extension

        threading.Thread(target=_probe_cpu, name="frame-swap-probe", daemon=True).start()


_folder = ""
"""This worker's own, which only this user can open; "" in an executor that is not ours."""

_traceback_file: Any = None


def _note(stage: str) -> None:
    """What the worker is doing now, in words that fit behind "while"."""
    _leave("stage", stage)


def _leave(name: str, text: str) -> None:
    if _folder:
        with contextlib.suppress(OSError):
            Path(_folder, name).write_text(text)


def _probe_cpu() -> None:
    # Which vector instructions there are, Inductor finds out with about ten runs of the C++ compiler, the first
    # time on a machine. They overlap with the tracing of the first graph if they begin now.
    from ...artifacts import folders
    from ...internals import inductor

    # No compiler, or a full disk, or a cache that is not to be used: the compile itself will say so.
    with contextlib.suppress(Exception):
        directory = os.environ.setdefault(folders.INDUCTOR, folders.default_cache())
        folders.check(directory)
        inductor.find_vector_instructions()


def _end_with(parent: int) -> None:
    import psutil

    try:  # wakes up when it is dead, even if nobody has reaped it yet
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
            os.killpg(0, signal.SIGKILL)  # the folder is for who waits for the result
        time.sleep(0.2)


def _end() -> None:
    shutil.rmtree(_folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)  # this process, and its compilers
