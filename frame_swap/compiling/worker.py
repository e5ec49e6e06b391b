"""One compile, in a worker process: parcel in, artifact out.

Nothing here imports torch at the top: a worker first lowers its priority and lets go of the program's
terminal, and only then pays for the import.

Guarantees:
- `initialize` returns once the worker is nice, deaf to Ctrl-C, detached from the program's output and watched:
  when the program's process is gone, however it went, the worker ends itself and its compilers. They are one
  process group and are killed as one: a worker whose compiler ends does not begin another meanwhile.
- `compile_graph` raises nothing: a failure comes back as an `Outcome` with `error` set.
- Each compile begins with the settings of its own parcel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from .refusal import first_line


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


_LISTENERS = ("TORCH_LOGS", "TORCH_LOGS_OUT", "TORCH_TRACE", "TORCH_DTRACE")
"""What the program listens to is in each parcel, and its files are its own: see echo.py."""


def initialize(parent: int, niceness: int, compiler_threads: int) -> None:
    """Make this process a worker of `parent`; runs once, before the first job."""
    with contextlib.suppress(OSError):  # not permitted to change priority: then not
        os.nice(niceness)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    _let_go_of_output()
    threading.Thread(target=_end_with, args=(parent,), name="frame-swap-watch", daemon=True).start()
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(compiler_threads)
    for variable in _LISTENERS:
        os.environ.pop(variable, None)
    _allow_caches()

    import torch
    import torch._dynamo
    import torch._inductor.compile_fx

    with contextlib.suppress(ImportError):
        # Inductor's progress bar makes a lock that outlives a killed worker, and the program is told of a leak.
        from tqdm import tqdm

        tqdm.set_lock(threading.RLock())
    if not torch.cuda.is_available():
        threading.Thread(target=_probe_cpu, name="frame-swap-probe", daemon=True).start()


def _probe_cpu() -> None:
    # Which vector instructions there are, Inductor finds out with about ten runs of the C++ compiler, the first
    # time on a machine. They overlap with the tracing of the first graph if they begin now.
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    with contextlib.suppress(Exception):  # no compiler, or a full disk: the compile itself will say so
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


def _let_go_of_output() -> None:
    # A worker that outlives its parent and holds its stdout keeps `python train.py | tee log` from ending.
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            os.dup2(null, stream.fileno())
    os.close(null)


def _end_with(parent: int) -> None:
    import psutil

    try:  # wakes up when it is dead, even if nobody has reaped it yet
        select.select([os.pidfd_open(parent)], [], [])
    except (AttributeError, OSError):  # not Linux, or gone already
        with contextlib.suppress(psutil.Error):
            psutil.Process(parent).wait()
    kill_group(os.getpid())
    with contextlib.suppress(psutil.Error):  # where there are no process groups
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    os._exit(0)


def kill_group(worker: int) -> None:
    """Kill a worker and its compilers, all at once; nothing where it has not begun, or is gone."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(OSError):
            os.killpg(worker, signal.SIGKILL)


def compile_graph(parcel: bytes, sizes: dict[str, int], submitted: float) -> Outcome:
    """Run all of Inductor's `compile_fx` on a parcel of `ship.pack`.

    Args:
        sizes: what symbols in the graph's shapes stand for, by name; those not in it, as it was traced.
    """
    started = time.time()
    artifact, guards, error, details = None, b"", "", ""
    heard: list[bytes] = []
    _allow_caches()
    try:
        artifact, guards = _compile(parcel, sizes, heard.append)
    except BaseException as failure:
        error = first_line(failure)
        details = traceback.format_exc()
    return Outcome(artifact, guards, error, details, submitted, started, time.time(), os.getpid(), b"".join(heard))


def _compile(parcel: bytes, sizes: dict[str, int], keep_echo: Callable[[bytes], None]) -> tuple[bytes, bytes]:
    from .. import internals
    from . import artifact, echo, libraries, ship

    graph, state, options, compile_id, definitions, triton_kernels = ship.open_parcel(parcel)
    state.extend_search_path()
    if definitions is not None:
        definitions.install()
    # The lock is free in a worker; in an executor of threads it keeps Dynamo out while configs are patched.
    with internals.compile_lock, state.applied_to_process():
        _forget_other_cache_directory()
        gm, inputs, fake_mode = ship.unpack_graph(graph, sizes)
        if triton_kernels is not None:
            triton_kernels.register(gm)
        shapes = fake_mode.shape_env
        known = len(shapes.guards)
        context = internals.CompileContext(internals.CompileId.from_string(compile_id))
        with (
            echo.recorded(state.audience, keep_echo),
            libraries.recorded() as kernels,
            _constants_pickled_for_real(),
            internals.compile_context(context),
            internals.tracing(internals.TracingContext(fake_mode)),
            internals.inductor_config.patch(force_disable_caches=False),
            internals.functorch_config.patch(
                enable_autograd_cache=True,
                strict_autograd_cache=True,
                bypass_autograd_cache_key=True,
                bundled_autograd_cache=True,
                force_non_lazy_backward_lowering=True,
                force_autograd_cache=True,
            ),
        ):
            compiled: Any = internals.stock_inductor(gm, inputs, options)
            entry = compiled.serialize()
        late = [guard.expr for guard in shapes.guards[known:]]
        return artifact.pack(entry, kernels), pickle.dumps(late)


@contextlib.contextmanager
def _constants_pickled_for_real() -> Iterator[None]:
    """A graph's constants are real tensors. Inductor pickles them while its FakeTensorMode is on, which does not
    let it copy those that are on a GPU."""
    import torch

    from .. import internals

    def for_real(reduce: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def reduce_for_real(storage: Any) -> Any:
            with internals.unset_fake_temporarily():
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
