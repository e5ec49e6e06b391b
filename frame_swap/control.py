"""What a program asks of frame-swap while it runs: the report, to wait for compiles, and to install their code."""

from __future__ import annotations

from .farm.service import service
from .region import Report, capturing, records, wait_for_compiles
from .serving.trampoline import Trampoline


def report() -> Report:
    """What has been captured so far, and what has become of it."""
    return Report((record.row() for record in records()), capturing())


def swap() -> Report:
    """Install all compiled code that is ready, on the calling thread; returns the report. For when="manual"."""
    for trampoline in _trampolines():
        trampoline.install(wait=True)
    return report()


def wait(timeout: float | None = None) -> Report:
    """Block until no compile is pending, at most `timeout` seconds; then install, except for when="manual".

    `ui.progress.wait`, which programs call, shows how far that is.
    """
    with service.hurried():
        wait_for_compiles(timeout)
    for trampoline in _trampolines():
        trampoline.install_unless_manual()
    return report()


def _trampolines() -> list[Trampoline]:
    return [record.server for record in records() if record.server is not None]
