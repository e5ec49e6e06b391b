"""The program's own workers: one pool of processes, on the terms of the settings in force.

torch is not imported here, since `import frame_swap` starts the first worker: it imports torch while the program
does so itself.

Guarantees:
- `start` neither waits nor raises, and starts one process at most. Further ones start when calls wait for them.
- Where the settings change, processes on the old terms end once they have run what they were given. Those that
  have nothing to do and would be started again as they are go over to the new terms.
- At exit nothing is waited for: workers are killed together with their compilers.
- A forked child starts without workers, and does not touch its parent's. A fork waits while another thread starts
  workers.

Assumed: one lock guards which pool there is. The pool's own locks are taken under it; nothing that holds one of
these asks for it.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from .. import settings
from .local.pool import Pool, kill_all
from .local.process import Terms, register_at_exit
from .queue import NO_CALLS, Demand


class Workers:
    """Worker processes of this program's.

    Attributes:
        pool: they and what waits for them; None while there are none.
        stopped: whether the interpreter is on its way out.
    """

    def __init__(self) -> None:
        self.pool: Pool | None = None
        self.stopped = False
        self._lock = threading.RLock()

    def start(self) -> None:
        """Start one, where the program will have something to compile.

        With `capture="background"` the first compile starts it instead: that is to keep the first calls fast.
        """
        with contextlib.suppress(OSError, RuntimeError, ValueError):  # the first compile will say so
            now = settings.current()
            if wanted_here() and now.executor is None and now.when != "never" and now.capture == "call":
                self._on_terms(now).start()

    def submit(
        self,
        call: Callable[[], Any],
        wanted: Callable[[], bool] = lambda: True,
        demand: Demand = NO_CALLS,
        second: Callable[[str], Callable[[], Any]] | None = None,
    ) -> Future[Any]:
        """Run `call` in a worker; see `Pool.submit`.

        Raises:
            RuntimeError: the interpreter is shutting down, or there is no thread.
        """
        now = settings.current()
        with self._lock:  # so that no other thread retires the pool meanwhile
            return self._on_terms(now).submit(call, now.job_timeout, wanted, demand, second)

    def pids(self) -> list[int]:
        """PIDs of live workers, including those still starting."""
        pool = self.pool
        return pool.pids() if pool is not None else []

    def make_way(self) -> None:
        """Nothing will be compiled here for now: end those that have nothing to do. The next call starts one."""
        pool = self.pool
        if pool is not None:
            pool.end_idle()

    def stop(self) -> None:
        """End all now, without waiting for what they compile."""
        with self._lock:
            self.stopped = True
            self.pool = None
        kill_all()

    def forget(self) -> None:
        """In a forked child: start over, leaving the parent's workers to the parent."""
        self.__init__()  # type: ignore[misc]

    def _on_terms(self, wished: settings.Settings) -> Pool:
        terms = Terms(wished.workers, wished.idle_timeout, wished.memory_limit * 1e9, wished.log_dir)
        with self._lock:
            if self.stopped:
                raise RuntimeError("the interpreter is shutting down")
            if self.pool is None or self.pool.terms != terms:
                before, self.pool = self.pool, Pool(terms)
                _stop_at_exit()
                if before is not None:
                    before.retire(self.pool)  # jobs that were submitted are still finished and delivered
            return self.pool


def wanted_here() -> bool:
    """Whether this process may start any ahead of its first compile.

    Not in a child of multiprocessing's: a DataLoader's worker only imports the user's module. And while a spawned
    child imports that, it must not start processes.
    """
    importing = getattr(multiprocessing.current_process(), "_inheriting", False)
    return not (settings.disabled() or multiprocessing.parent_process() is not None or importing)


workers = Workers()


@functools.cache
def _stop_at_exit() -> None:
    # Hooks run in reverse order: this one runs before those of concurrent.futures and loky, which wait for work.
    register_at_exit(workers.stop)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=workers.forget)
