"""`frame_swap.wait()` and `frame_swap.watch()`: what is compiled, what serves meanwhile, and when that ends.

Guarantees:
- What is shown goes to stderr, or into the notebook. The program's own output stays as it is.
- A display changes nothing of what happens: one that fails is dropped, and the log says so.
- No thread runs where nobody looks. In a forked child nothing is shown.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from types import TracebackType

from ... import control
from ...region import Report
from .display import Display, display_here
from .state import Progress

log = logging.getLogger(__name__)

PATIENCE = 1.0
"""Seconds for which nothing is shown: short waits need no display."""

PAUSE, RARELY = 0.5, 1.0
"""Seconds between two looks while the program waits, and while it runs: its threads miss the milliseconds of a
drawing."""


def wait(timeout: float | None = None, *, progress: bool = True) -> Report:
    """Block until no compile is pending, at most `timeout` seconds; then install, except for when="manual".

    This includes captures in the background. What was captured there is installed by the next call of its frame.

    Args:
        progress: whether to show how far the compiles are, once this has taken a second: by a bar on a terminal and
            in a notebook, by lines elsewhere.

    Returns the report; rows that are still pending when the time is up say so.
    """
    if not progress:
        return control.wait(timeout)
    with Watching():
        return control.wait(timeout)


def watch() -> Watching:
    """Show how far the compiles are while the program runs on, whenever there are some.

    Returns:
        A context manager: the display ends with its block, with its `stop()`, or with the program.
    """
    return Watching(RARELY)


class Watching:
    """A thread that looks at the compiles and shows them, every `pause` seconds."""

    def __init__(self, pause: float = PAUSE) -> None:
        self._pause = pause
        self._over = threading.Event()
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._show_all, name="frame-swap-watch", daemon=True)
        self._thread.start()

    def __enter__(self) -> Watching:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Show once more what has become of the compiles, and then no more."""
        self._over.set()
        if os.getpid() == self._process:
            self._thread.join()

    def _show_all(self) -> None:
        try:
            while not self._over.is_set():
                self._show_some()
        except Exception:
            log.info("frame-swap: progress cannot be shown", exc_info=True)

    def _show_some(self) -> None:
        """Wait until something is compiled, and show it until nothing is, or until the display is to end."""
        began: float | None = None
        display: Display | None = None
        while began is None or Progress.now(began).pending:
            over = self._over.wait(self._pause)
            progress = Progress.now(began or time.time())
            if began is None and progress.pending:
                began = time.time()
            if display is None and began is not None and time.time() - began >= PATIENCE:
                display = display_here()
            if display is not None and progress.pending:
                display.show(progress)
            if over:
                break
        if display is not None and began is not None:
            display.end(Progress.now(began))
