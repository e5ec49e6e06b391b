"""How many threads the ops of the calling thread may use.

Guarantees:
- `call_on_threads` changes this for the calling thread alone, and puts it back. Threads that start meanwhile have
  the usual number; `torch.set_num_threads` would change it for them for good.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

from ..internals import eager

_Args = TypeVar("_Args")
_Result = TypeVar("_Result")


def call_on_threads(threads: int | None, call: Callable[[_Args], _Result], args: _Args) -> _Result:
    """Return `call(args)`, whose ops use at most `threads` threads; None stands for the usual number."""
    if threads is None or threads >= (usual := torch.get_num_threads()) or (openmp := library()) is None:
        return call(args)
    openmp.set_threads(threads)
    usual_mkl = openmp.set_mkl_threads(threads)
    openmp.end_idle_threads()
    try:
        return call(args)
    finally:
        openmp.set_threads(usual)
        openmp.set_mkl_threads(usual_mkl)


class OpenMP(NamedTuple):
    """Functions of the libraries that give threads to PyTorch's ops. Each acts on the calling thread alone.

    Attributes:
        set_threads: set the most threads of an op.
        set_mkl_threads: the same for MKL, 0 for those of OpenMP; returns the number before.
        end_idle_threads: end those that this thread's earlier ops left spinning on a core (up to 15 ms each time).
    """

    set_threads: Callable[[int], object]
    set_mkl_threads: Callable[[int], int]
    end_idle_threads: Callable[[], object]


@functools.cache
def library() -> OpenMP | None:
    """PyTorch's OpenMP; None where PyTorch does not use one, or it cannot be found."""
    usual = torch.get_num_threads()
    for path in (None, eager.library_file()):  # one that the program was started with comes before PyTorch's own
        try:
            loaded = ctypes.CDLL(path)
            set_threads = loaded.omp_set_num_threads
            before = loaded.omp_get_max_threads()
        except (OSError, TypeError, AttributeError):
            continue
        set_threads(before + 1)
        is_pytorchs = torch.get_num_threads() != usual
        set_threads(before)
        if is_pytorchs:
            set_mkl_threads = getattr(ctypes.CDLL(eager.library_file()), "MKL_Set_Num_Threads_Local", lambda _: 0)
            pause = getattr(loaded, "omp_pause_resource_all", lambda _: 0)
            omp_pause_soft = 1
            return OpenMP(set_threads, set_mkl_threads, functools.partial(pause, omp_pause_soft))
    return None
