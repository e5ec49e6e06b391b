"""How the threads of an op wait for each other while workers take some of the CPUs.

GNU's OpenMP, which PyTorch's ops run on, lets a waiting thread spin for milliseconds. Where a worker has taken the
CPU of one thread of an op, all others spin until it gets that CPU back: they burn what the worker could use, and
the scheduler takes them for busy. Only where a process has more such threads than there are CPUs do they sleep
almost at once. `Sleepers` are threads of ours that make it so.

Guarantees:
- Ops keep their number of threads. So each result is what it would be without workers, to the last bit.
- It holds for all ops of the process, those of a backward and of an optimizer included, and ends with `end`.
- Where PyTorch runs on another OpenMP, or there are more CPUs than threads and workers, nothing changes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from typing import Any

import torch

from ..internals import eager


class Sleepers:
    """Threads of OpenMP that sleep until `end`.

    Args:
        count: how many; one for each CPU that something else is about to take.

    Attributes:
        thread: the thread that they belong to.
        present: set when they are there, and count.
    """

    def __init__(self, count: int) -> None:
        self.present = threading.Event()
        self._ended = threading.Event()
        self.thread = threading.Thread(target=self._sleep, args=[count], name="frame-swap-sleeper", daemon=True)
        with contextlib.suppress(RuntimeError):  # out of threads: then ops spin
            self.thread.start()

    def end(self) -> None:
        """Let them end, and the threads of ops spin again."""
        self._ended.set()

    def _sleep(self, count: int) -> None:
        if (openmp := library()) is not None:
            # The threads of this region stay, asleep, for as long as the thread that began it.
            openmp.GOMP_parallel(_does_nothing(), None, count + 1, 0)
            self.present.set()
            self._ended.wait()


@functools.cache
def library() -> Any | None:
    """GNU's OpenMP, if that is what PyTorch's ops run on. To find out, the calling thread's number is changed."""
    usual = torch.get_num_threads()
    for path in (None, eager.library_file()):  # one that the program was started with comes before PyTorch's own
        try:
            loaded = ctypes.CDLL(path)
            before = loaded.omp_get_max_threads()
            loaded.omp_set_num_threads(before + 1)
            is_pytorchs = torch.get_num_threads() != usual
            loaded.omp_set_num_threads(before)
            if is_pytorchs and hasattr(loaded, "GOMP_parallel"):
                return loaded
        except (OSError, TypeError, AttributeError):
            continue
    return None


def _does_nothing() -> ctypes.c_void_p:
    """A function of C that may be called with any argument."""
    return ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p)
