"""How the program and the workers share the machine. All numbers of this policy are here.

The program comes first. Workers take half of the CPUs at most and run at a lower priority. Nobody spins: neither
workers, nor the program's threads while workers compile (openmp.py). The threads that capture frames and load
results give the GIL back early, and let no full garbage collection begin, during which they would hold it. Nor
does one begin while a call of the program's captures a frame, or rewrites it.

What was tried besides, with figures, is in docs/benchmarks.md.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import sysconfig
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

YOUNG_OBJECTS = 20_000
"""How many objects more than have died are made before Python looks for garbage among them, while a frame is
captured or code loaded. Python's default is 700: each capture of a small BERT then makes enough short-lived objects
look old for every second or third to begin a full collection, which holds the GIL for 0.25 to 0.8 s (torch and
transformers imported). A look at this many takes 5 ms. Dynamo itself looks at all that are not old when it has
captured a frame."""


def usable_cpus() -> int:
    """How many CPUs this process may use: its affinity mask, not what the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """Worker processes for this machine: half of the usable CPUs, at least 1 and at most 4.

    The other half is the program's own, and each worker's compilers run beside it. Each worker takes half a
    gigabyte, as much of a GPU's memory where it compiles for one, and seconds to start.
    """
    return max(1, min(4, usable_cpus() // 2))


MOST_COMPILERS = 32
"""Each is a process, of a tenth of a gigabyte or more. Inductor starts no more in the program, either."""


def compilers() -> int:
    """How many compilers all workers together may run at a time. A core is the program's, where there are some."""
    return min(MOST_COMPILERS, usable_cpus() - (usable_cpus() >= 4))


def crowded_by(workers: int) -> bool:
    """Whether a compile in the program, which has compilers beside it, leaves no cores to `workers` processes."""
    return usable_cpus() < workers + 2


WORK = 0.001
"""Seconds that the loader's thread works, then to rest (rests.py). A thread that calls operators gives the GIL away
in each, some thousand times a step, and waits `SWITCH_INTERVAL` for it where another thread works on: beside an
import of 0.7 s, a step of 1.7 ms took up to 160 ms, and 10 with rests as long as the work (1200 small operators,
CPU, Python 3.11)."""

REST = 2.0
"""Seconds of rest for each second of work. With 1, 2 and 3 a load took 0.49, 0.74 and 0.99 s (0.35 alone), and
steps beside it 2.0, 1.45 and 1.3 of their usual time (the same on Python 3.12): as many are done, each in less."""

T = TypeVar("T")


def run_courteously(call: Callable[[], T]) -> T:
    """Return `call()`, and meanwhile let other threads have the GIL after at most `SWITCH_INTERVAL`.

    Nor does Python begin a full garbage collection by itself, as in `run_without_full_collections`.

    Several threads may do so at a time.
    """
    return _giving_way.run(functools.partial(run_without_full_collections, call))


def run_without_full_collections(call: Callable[[], T]) -> T:
    """Return `call()`, and meanwhile begin no full garbage collection by itself: `gc.collect()` does.

    Where many objects were made meanwhile, by all threads, they count as old afterwards, and a full collection is
    as far away as after one.

    Several threads may do so at a time.
    """
    return _collecting_little.run(call)


def _give_way() -> Callable[[], None]:
    usual = sys.getswitchinterval()
    ours = min(usual, SWITCH_INTERVAL)
    sys.setswitchinterval(ours)

    def take_back() -> None:
        if abs(sys.getswitchinterval() - ours) < 1e-6:  # Python rounds it; else the program has changed it since
            sys.setswitchinterval(usual)

    return take_back


# Python 3.14 has no full collections that hold the GIL; a build without GIL has no generations.
_HAS_GENERATIONS = sys.version_info < (3, 14) and not sysconfig.get_config_var("Py_GIL_DISABLED")
_NEVER = 1_000_000_000


def _collect_little() -> Callable[[], None]:
    usual, before = gc.get_threshold(), gc.get_count()
    if not _HAS_GENERATIONS or not usual[0]:
        return lambda: None
    ours = (max(usual[0], YOUNG_OBJECTS), _NEVER, _NEVER)
    gc.set_threshold(*ours)

    def take_back() -> None:
        if gc.get_threshold() == ours:  # else the program has changed it since
            gc.set_threshold(*usual)
        now = gc.get_count()
        made_many = now[0] >= usual[0] or now[1:] != before[1:]
        if made_many and gc.get_threshold()[0] and not gc.get_freeze_count():
            # All objects move to the oldest generation, and the count that makes a full collection due begins anew;
            # but not where the program has frozen objects itself, which would be thawed.
            gc.freeze()
            gc.unfreeze()

    return take_back


class _Change:
    """A change of the process's settings for the length of calls, of which threads make several at a time.

    The first call makes the change, and the last one takes it back. So does a forked child, where the threads that
    are in such calls do not exist.

    Args:
        make: makes it; returns what takes it back.
    """

    def __init__(self, make: Callable[[], Callable[[], None]]) -> None:
        self._make = make
        self._take_back: Callable[[], None]
        # While a thread of the program's holds it, a finalizer or a handler of a signal may make such a call.
        self._lock, self._calls = threading.RLock(), 0

    def run(self, call: Callable[[], T]) -> T:
        with self._lock:
            if not self._calls:
                self._take_back = self._make()
            self._calls += 1
        try:
            return call()
        finally:
            with self._lock:
                self._calls -= 1
                if not self._calls:
                    self._take_back()

    def after_fork_in_child(self) -> None:
        if self._calls:
            self._take_back()
        self._lock, self._calls = threading.RLock(), 0


_giving_way, _collecting_little = _Change(_give_way), _Change(_collect_little)

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_giving_way.after_fork_in_child)
    os.register_at_fork(after_in_child=_collecting_little.after_fork_in_child)
