"""Make a fault happen: the side of the worker's process."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from frame_swap.farm import compile
from frame_swap.farm.local import worker
from frame_swap.farm.protocol import Request

from . import VARIABLE, Fault

initialize_worker = worker.initialize


def initialize(*args: Any) -> None:
    """Plant the fault, then initialize the worker as usual: replaces `worker.initialize`."""
    fault = Fault(**json.loads(os.environ[VARIABLE]))
    happen: Callable[[], None] = globals()[fault.what]
    aimed_at = not fault.only

    def strike() -> None:
        if aimed_at and fault.strike():
            happen()

    compile_request = compile._compile

    def compile_watched(request: Request, *rest: Any, **keywords: Any) -> Any:
        nonlocal aimed_at
        aimed_at = fault.only.encode() in request.content
        return compile_request(request, *rest, **keywords)

    def dump(result: Any, file: Any) -> None:
        """Write as usual; strike when the first half is written."""
        content = pickle.dumps(result)
        half = len(content) // 2
        file.write(content[:half])
        file.flush()
        strike()
        file.write(content[half:])

    def arm_imported() -> None:
        from frame_swap.artifacts import load
        from frame_swap.internals import inductor

        if fault.when == "compiling":
            precede(inductor, "stock_inductor", strike)
        elif fault.when == "loading":
            precede(load, "try_out", strike)
        elif fault.when == "packing":
            precede(load, "pack", strike)

    compile._compile = compile_watched
    if fault.when == "importing":
        precede(worker, "_import_torch", strike)
    elif fault.when == "sending":
        worker.pickle = types.SimpleNamespace(**{**vars(pickle), "dump": dump})  # type: ignore[assignment]
    else:
        follow(worker, "_import_torch", arm_imported)
    initialize_worker(*args)


def precede(owner: Any, name: str, action: Callable[[], None]) -> None:
    """Make `owner.name` run `action` first."""
    usual = getattr(owner, name)
    setattr(owner, name, lambda *args, **keywords: (action(), usual(*args, **keywords))[1])


def follow(owner: Any, name: str, action: Callable[[], None]) -> None:
    """Make `owner.name` run `action` last."""
    usual = getattr(owner, name)
    setattr(owner, name, lambda *args, **keywords: (usual(*args, **keywords), action())[0])


# The faults


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crashes() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def exits() -> None:
    os._exit(3)


def raises() -> None:
    raise ArithmeticError("for the test")


def runs_out_of_memory() -> None:
    raise MemoryError


def eats_memory() -> None:
    eaten = [b"x" * 100_000_000 for _ in range(30)]
    threading.Event().wait(timeout=len(eaten) * 100)


def hangs() -> None:
    """Hang, and keep the GIL, so that the worker's other threads stand still, too."""
    ctypes.PyDLL(None).pause()


def killed_then_hangs() -> None:
    """Be killed at the first attempt, hang at the second."""
    marks = json.loads(os.environ[VARIABLE])["marks"]
    if len(list(Path(marks).glob("hit-*"))) == 1:
        killed()
    threading.Event().wait(timeout=3600)  # `hangs` would hold locks on files of the cache


def killed_beside_a_compiler() -> None:
    """Be killed while a child process, like a compiler, has a temporary file open."""
    source = """if True:
        import tempfile, time
        file = tempfile.NamedTemporaryFile(prefix="frame-swap-")
        print(flush=True)
        time.sleep(3600)
    """
    compiler = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE)
    assert compiler.stdout is not None
    compiler.stdout.readline()
    Path(json.loads(os.environ[VARIABLE])["marks"], f"compiler-{compiler.pid}").touch()
    killed()


def finds_the_disk_full() -> None:
    """Make every later write into Inductor's cache fail."""
    from torch._inductor import codecache

    def write_atomic(path: str, *args: Any, **keywords: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    codecache.write_atomic = write_atomic


def libraries_crash_when_loaded() -> None:
    """Replace the libraries in the artifact by one that aborts when it is loaded."""
    from frame_swap.artifacts import load

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "crash.c")
        source.write_text(
            "#include <stdlib.h>\n__attribute__((constructor)) static void crash(void) { abort(); }\n"
        )
        library = source.with_suffix(".so")
        subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
        crashing = library.read_bytes()

    def dump_crashing(content: Any) -> bytes:
        if isinstance(content, tuple):
            entry, kernels = content
            assert kernels, "the artifact has no library"
            content = entry, dict.fromkeys(kernels, crashing)
        return pickle.dumps(content)

    load.pickle = types.SimpleNamespace(dumps=dump_crashing, loads=pickle.loads)  # type: ignore[assignment]


def packages_crash_when_loaded() -> None:
    """Abort where a package of AOTInductor's is loaded."""
    from frame_swap.internals import packages

    packages.load = lambda package: os.abort()
