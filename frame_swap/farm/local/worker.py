"""One compile, in a worker process: parcel in, artifact out.

Nothing here imports torch at the top: a worker first lowers its priority, and only then pays for the import.

Guarantees:
- `initialize` returns once the worker is nice, in a process group of its own, and watched: when the program's
  process is gone, however it went, the worker ends itself and its compilers, and removes its folder. When it holds
  more memory than it may, compilers included, it ends itself, too.
- `run` raises nothing, and what it returns is short. A result is in the worker's folder as a whole, or not at all.
- `compile_graph` raises nothing: a failure comes back as an `Outcome` with `error` set.
- Each compile begins with the settings of its own parcel.
- An artifact that is sent has been loaded once, here.
- Whatever ends the worker, its folder then says in plain text what it was doing: `stage`, and `traceback` or
  `last_words` where there was an occasion to write them. Its temporary files and its compilers' are there, too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from ...errors import first_line


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a worker sends back: plain, picklable values.

    Attributes:
        artifact: the compiled graph, forward and backward in one; None where the compile failed.
        late_guards: pickled list of sympy relations that the compile added to the shapes' guards.
        error: one line for the report; "" where all went well.
        details: the traceback in the worker, for the log.
        submitted, started, finished: seconds since the epoch: asked for, begun, ended.
        pid: the worker's process id.
        echo: what the compile left behind besides code, for `echo.replay`; also where it failed.
        remarks: what the user should be warned of besides.
    """

    artifact: bytes | None
    late_guards: bytes
    error: str
    details: str
    submitted: float
    started: float
    finished: float
    pid: int
    echo: bytes = b""
    remarks: tuple[str, ...] = ()


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
        _allow_caches()
        _import_torch()
    except BaseException:
        _leave("traceback", traceback.format_exc())
        os._exit(1)


def _import_torch() -> None:
    import torch
    import torch._dynamo
    import torch._inductor.compile_fx

    from ...artifacts import folders

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
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    from ...artifacts import folders

    # No compiler, or a full disk, or a cache that is not to be used: the compile itself will say so.
    with contextlib.suppress(Exception):
        directory = os.environ.setdefault(folders.INDUCTOR, folders.default_cache())
        folders.check(directory)
        pick_vec_isa()


def _allow_caches() -> None:
    # What makes a compile's result serialisable is the machinery of Inductor's caches, so they cannot be off.
    # These variables are read when torch is imported, and settings give way to them.
    for variable in (
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES",
        "TORCH_COMPILE_FORCE_DISABLE_CACHES",
        "TORCHINDUCTOR_AUTOGRAD_CACHE",
    ):
        os.environ.pop(variable, None)


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


def compile_graph(parcel: bytes, sizes: dict[str, int], submitted: float) -> Outcome:
    """Run all of Inductor's `compile_fx` on a parcel of `ship.pack`.

    Args:
        sizes: what symbols in the graph's shapes stand for, by name; those not in it, as it was traced.
    """
    started = time.time()
    artifact, guards, error, details = None, b"", "", ""
    heard: list[bytes] = []
    remarks: list[str] = []
    _allow_caches()
    _note("compiling")
    try:
        artifact, guards = _compile(parcel, sizes, heard.append, remarks)
    except BaseException as failure:
        error = f"{first_line(failure)}; {_advice(failure)}"
        details = traceback.format_exc()
    echo, times = b"".join(heard), (submitted, started, time.time())
    return Outcome(artifact, guards, error, details, *times, os.getpid(), echo, tuple(remarks))


def _advice(failure: BaseException) -> str:
    """What the user can do about it."""
    texts: list[str] = []
    numbers: set[int | None] = set()
    cause: BaseException | None = failure
    while cause is not None and len(texts) < 20:
        texts.append(f"{type(cause).__name__}: {cause}")
        numbers.add(getattr(cause, "errno", None))
        cause = cause.__cause__ or cause.__context__
    said = "\n".join(texts)

    def is_about(*codes: int) -> bool:
        return not numbers.isdisjoint(codes) or any(os.strerror(code) in said for code in codes)

    if "InvalidCxxCompiler" in said or "No working C++ compiler" in said:
        return "install a C++ compiler (g++ or clang), or name one in the variable CXX"
    if is_about(errno.ENOSPC, errno.EDQUOT):
        return "free some space, or set TORCHINDUCTOR_CACHE_DIR to a folder on a disk that has some"
    if is_about(errno.EROFS, errno.EACCES, errno.EPERM):
        return "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written to"
    if isinstance(failure, MemoryError) or is_about(errno.ENOMEM):
        return "frame_swap.configure(workers=1) needs less memory"
    return "FRAME_SWAP_DISABLE=1 shows whether plain Inductor does the same"


def _compile(
    parcel: bytes, sizes: dict[str, int], keep_echo: Callable[[bytes], None], remarks: list[str]
) -> tuple[bytes, bytes]:
    from ...artifacts import folders, libraries, load
    from ...internals import dynamo, fake_tensors, inductor
    from ...shipping import echo, ship

    graph, state, options, compile_id, definitions, triton_kernels = ship.open_parcel(parcel)
    state.extend_search_path()
    if definitions is not None:
        definitions.install()
    # The lock is free in a worker; in an executor of threads it keeps Dynamo out while configs are patched.
    with dynamo.compile_lock, state.applied_to_process(), folders.safe_caches() as warned:
        remarks += warned
        if _folder:
            os.environ["TMPDIR"] = _folder  # restored with what else the program's environment has changed
        _forget_other_cache_directory()
        gm, inputs, fake_mode = ship.unpack_graph(graph, sizes)
        if triton_kernels is not None:
            triton_kernels.register(gm)
        shapes = fake_mode.shape_env
        known = len(shapes.guards)
        context = fake_tensors.CompileContext(fake_tensors.CompileId.from_string(compile_id))
        with (
            echo.recorded(state.audience, keep_echo),
            libraries.recorded() as kernels,
            _constants_pickled_for_real(),
            fake_tensors.compile_context(context),
            fake_tensors.tracing(fake_tensors.TracingContext(fake_mode)),
            inductor.backward_before_forward(),
            inductor.inductor_config.patch(force_disable_caches=False),
            inductor.functorch_config.patch(
                enable_autograd_cache=True,
                strict_autograd_cache=True,
                bypass_autograd_cache_key=True,
                bundled_autograd_cache=True,
                force_non_lazy_backward_lowering=True,
                force_autograd_cache=True,
            ),
        ):
            compiled: Any = inductor.stock_inductor(gm, inputs, options)
            entry = compiled.serialize()
        late = [guard.expr for guard in shapes.guards[known:]]
        packed = load.pack(entry, kernels)
        del compiled, entry, kernels
        _note("loading what it had compiled")
        load.try_out(packed, state, options)
        return packed, pickle.dumps(late)


@contextlib.contextmanager
def _constants_pickled_for_real() -> Iterator[None]:
    """A graph's constants are real tensors. Inductor pickles them while its FakeTensorMode is on, which does not
    let it copy those that are on a GPU."""
    import torch

    from ...internals import fake_tensors

    def for_real(reduce: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def reduce_for_real(storage: Any) -> Any:
            with fake_tensors.unset_fake_temporarily():
                return reduce(storage)

        return reduce_for_real

    with contextlib.ExitStack() as stack:
        for storage in (torch.UntypedStorage, torch.TypedStorage):
            stack.enter_context(mock.patch.object(storage, "__reduce__", for_real(storage.__reduce__)))
        yield


_cache_directory: str | None = None


def _forget_other_cache_directory() -> None:
    """Inductor remembers which files it has written; a job with another cache directory needs them anew."""
    global _cache_directory
    directory = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    if _cache_directory is not None and directory != _cache_directory:
        from torch._inductor.utils import clear_caches

        clear_caches()
    _cache_directory = directory
