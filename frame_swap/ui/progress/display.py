"""Where progress is shown: on a terminal, in a notebook, or as lines in a file or a pipe."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, TextIO

from .state import Progress

NORMAL = "This is normal: eager code serves the calls {}, with the same results."
LINES_EVERY = 10.0
"""Seconds between two lines where nothing has ended."""

MOST_ROWS = 8


class Display(Protocol):
    """One display, from the first look to the last."""

    def show(self, progress: Progress) -> None:
        """Show how far the compiles are."""

    def end(self, progress: Progress) -> None:
        """Show how it has ended. What is shown last stays."""


def display_here() -> Display:
    """The display that fits this process."""
    if (show := _notebook()) is not None:
        return Notebook(show)
    stream = sys.stderr
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        return Terminal()
    return Lines(stream)


class Lines:
    """A line when something has ended, and now and then where nothing has."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._done = -1
        self._at = 0.0

    def show(self, progress: Progress) -> None:
        """Print a line, if there is news."""
        now = time.monotonic()
        if self._done < 0:
            self._print(f"{NORMAL.format('meanwhile')}\n{_line(progress)}")
        elif progress.done != self._done or now - self._at >= LINES_EVERY:
            self._print(_line(progress))
        else:
            return
        self._done, self._at = progress.done, now

    def end(self, progress: Progress) -> None:
        """Print how it has ended."""
        self._print(summary(progress))

    def _print(self, text: str) -> None:
        for line in text.splitlines():
            print(f"frame-swap: {line}", file=self._stream, flush=True)


class Terminal:
    """A bar with a line for each compile, below what the program prints."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._streams = sys.stdout, sys.stderr
        self._live = Live(console=Console(stderr=True), auto_refresh=False)
        self._live.start()
        _terminals.append(self)

    def show(self, progress: Progress) -> None:
        """Draw it anew."""
        self._live.update(drawn(progress), refresh=True)

    def end(self, progress: Progress) -> None:
        """Leave one line."""
        _terminals.remove(self)
        self._live.update(f"frame-swap: {summary(progress)}", refresh=True)
        self._live.stop()

    def forget(self) -> None:
        """In a forked child: print past the display, which the parent's thread draws."""
        sys.stdout, sys.stderr = self._streams


class Notebook:
    """The same in the output of a notebook's cell; its last state stays there.

    Args:
        show: displays an object, and returns a function that displays another in its place.
    """

    def __init__(self, show: Callable[[Any], Callable[[Any], None]]) -> None:
        self._show = show
        self._update: Callable[[Any], None] | None = None

    def show(self, progress: Progress) -> None:
        """Display it, or display it anew."""
        self._display(_Html(bar_in_html(progress), _line(progress)))

    def end(self, progress: Progress) -> None:
        """Display how it has ended."""
        text = f"frame-swap: {summary(progress)}"
        self._display(_Html(f"<pre>{text}</pre>", text))

    def _display(self, page: _Html) -> None:
        if self._update is None:
            self._update = self._show(page)
        else:
            self._update(page)


class _Html:
    """What a notebook displays: HTML, or text where it shows none."""

    def __init__(self, html: str, text: str) -> None:
        self._html, self._text = html, text

    def _repr_html_(self) -> str:
        return self._html

    def __repr__(self) -> str:
        return self._text


def summary(progress: Progress) -> str:
    """One line on how it has ended."""
    done = f"{progress.compiled} of {_graphs(progress.known)} on compiled code after {progress.elapsed:.0f} s"
    if progress.pending:
        done += f", {len(progress.pending)} still pending"
    elif progress.compiled < progress.known:
        done += " (frame_swap.report() says why not all)"
    return f"{done}; eager code has served {_calls(progress)}"


def drawn(progress: Progress) -> Any:
    """A bar, a row for each compile, and that this is normal; for rich."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    head = Table.grid(padding=(0, 1))
    bar = ProgressBar(
        total=max(1, progress.known),
        completed=progress.done,
        width=24,
        style="bright_black",  # rich's own grey is not seen on a dark background
        complete_style="green",
        finished_style="green",
    )
    head.add_row("frame-swap", bar, Text(_line(progress, short=True)))
    rows = Table.grid(padding=(0, 2))
    for one in progress.pending[:MOST_ROWS]:
        rows.add_row(Text(f"  {one.name}", overflow="ellipsis", no_wrap=True), one.doing, one.took)
    if (more := len(progress.pending) - MOST_ROWS) > 0:
        rows.add_row(f"  and {more} more", "", "")
    return Group(head, rows, Text(NORMAL.format(f"({progress.calls} so far)")))


def bar_in_html(progress: Progress) -> str:
    """The same for a notebook, without colours of its own: the notebook's theme decides."""
    import html

    rows = "".join(
        f"<tr><td>{html.escape(one.name)}</td><td>{one.doing}</td><td>{one.took}</td></tr>"
        for one in progress.pending[:MOST_ROWS]
    )
    bar = f'<progress value="{progress.done}" max="{max(1, progress.known)}"></progress>'
    line = _line(progress, short=True)
    normal = NORMAL.format(f"({progress.calls} so far)")
    return f"frame-swap {bar} {line}<table>{rows}</table>{normal}"


def _line(progress: Progress, short: bool = False) -> str:
    parts = [f"{progress.done} of {_graphs(progress.known)} done after {progress.elapsed:.0f} s"]
    if progress.left is not None:
        parts.append(f"about {progress.left:.0f} s left")
    if not short:
        at = [one for one in progress.pending if one.seconds is not None]
        parts += [f"{at[0].name} {at[0].doing} ({at[0].took})"] if at else []
        parts.append(f"eager code has served {_calls(progress)}")
    return ", ".join(parts)


def _graphs(count: int) -> str:
    return f"{count} graph{'s' * (count != 1)}"


def _calls(progress: Progress) -> str:
    return f"{progress.calls} call{'s' * (progress.calls != 1)}"


def _notebook() -> Callable[[Any], Callable[[Any], None]] | None:
    """How this process displays an object in a notebook's cell; None where it is in none."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if ipython is None or getattr(shell, "kernel", None) is None:  # the shell in a terminal has none
        return None

    def show(page: Any) -> Callable[[Any], None]:
        handle = ipython.display.display(page, display_id=True)
        return lambda other: handle.update(other)

    return show


_terminals: list[Terminal] = []


def _after_fork_in_child() -> None:
    for terminal in _terminals:
        terminal.forget()
    _terminals.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
