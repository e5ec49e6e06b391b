"""How the program and the workers share the machine. All numbers of this policy are here.

The program comes first. Workers take half of the CPUs at most and run at a lower priority. Nobody spins: neither
workers, nor the program's threads while workers compile (openmp.py). The thread that loads results gives the GIL
back early.

What was tried besides, with figures, is in docs/benchmarks.md.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

NICENESS = 1
"""By how much the priority of workers and their compilers is below the program's. Where they have a core of their
own it does not matter. Where they have none, more of it gives the program some steps before the swap and puts off
the swap: in the end as many steps are done, or fewer. Figures are in docs/benchmarks.md."""

WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}
"""Workers trace with the program's number of threads: a thread that waits must not spin."""

SWITCH_INTERVAL = 0.0005
"""Seconds until the loader's thread gives the GIL to a thread that wants it. The program's calls want it back after
each op, and Python's default is 5 ms."""


def usable_cpus() -> int:
    """How many CPUs this process may use: its affinity mask, not what the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """Worker processes for this machine: half of the usable CPUs, at least 1 and at most 4.

    The other half is the program's own, and each worker's compilers run beside it. Each worker takes half a
    gigabyte, 1.6 more of a GPU's memory where it compiles for one, and seconds to start.
    """
    return max(1, min(4, usable_cpus() // 2))


def compilers_per_worker(workers: int) -> int:
    """How many compilers each of `workers` processes may run at a time."""
    return max(1, usable_cpus() // workers)


def crowded_by(workers: int) -> bool:
    """Whether a compile in the program, which has compilers beside it, leaves no cores to `workers` processes."""
    return usable_cpus() < workers + 2


T = TypeVar("T")


def run_courteously(call: Callable[[], T]) -> T:
    """Return `call()`, and meanwhile let other threads have the GIL after at most `SWITCH_INTERVAL`.

    Several threads may do so at a time: the first sets the interval, and the last puts it back.
    """
    global _courteous, _usual
    with _lock:
        if not _courteous:
            _usual = sys.getswitchinterval()
            sys.setswitchinterval(min(_usual, SWITCH_INTERVAL))
        _courteous += 1
    try:
        return call()
    finally:
        with _lock:
            _courteous -= 1
            if not _courteous:
                sys.setswitchinterval(_usual)


_lock, _courteous, _usual = threading.Lock(), 0, 0.0


def _after_fork_in_child() -> None:
    """The threads that were courteous are not here."""
    global _lock, _courteous
    if _courteous:
        sys.setswitchinterval(_usual)
    _lock, _courteous = threading.Lock(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
