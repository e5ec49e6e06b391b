"""Plant a fault, and check that it did no harm: the side of the tests' process."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
from helpers import live

import frame_swap
from frame_swap import FrameSwapWarning, Region, State
from frame_swap.farm.local import pool, worker
from frame_swap.farm.workers import workers

from . import VARIABLE, Fault, inject


def plant(monkeypatch: pytest.MonkeyPatch, fault: Fault) -> Fault:
    """End the running workers; those that start from now on have `fault`."""
    monkeypatch.setattr(worker, "initialize", inject.initialize)
    monkeypatch.setenv(VARIABLE, json.dumps(asdict(fault)))
    fresh_workers()
    return fault


def fresh_workers() -> None:
    """End all workers of this process, and the pool's threads; the next compile starts new ones."""
    pools = list(pool._all)
    workers.pool = None
    pool.kill_all()
    for old in pools:
        old._threads.shutdown()


def survives(
    function: Callable[[torch.Tensor], torch.Tensor],
    *words: str,
    state: State = State.FAILED,
    device: str = "cpu",
) -> Region:
    """Assert that `function` fails to compile, calls are right, and one warning and the report say `words`."""
    compiled = torch.compile(function, backend="frame_swap")
    x = torch.linspace(0.1, 0.9, 12, device=device).reshape(3, 4)
    known = len(frame_swap.report().regions)
    with one_warning(*words):
        for _ in range(2):
            torch.testing.assert_close(compiled(x), function(x))
            report = frame_swap.wait(timeout=240)
    (region,) = report.regions[known:]
    assert region.state is state, report
    for word in words:
        assert word in region.reason, region.reason
    assert region.eager_calls == 2
    return region


def works(function: Callable[[torch.Tensor], torch.Tensor], device: str = "cpu") -> Region:
    """Assert that compiled code of `function` is installed, its calls are right, and nothing is warned of."""
    compiled = torch.compile(function, backend="frame_swap")
    x = torch.linspace(0.1, 0.9, 12, device=device).reshape(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(compiled(x), function(x))
        region = live(frame_swap.wait(timeout=240))[-1]
        assert (region.state, region.reason) == (State.INSTALLED, ""), frame_swap.report()
        torch.testing.assert_close(compiled(x), function(x))
    return region


@contextlib.contextmanager
def one_warning(*words: str) -> Iterator[None]:
    """Assert that the block issues exactly one FrameSwapWarning, which contains all of `words`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    ours = [str(w.message) for w in caught if w.category is FrameSwapWarning]
    assert len(ours) == 1, ours
    for word in words:
        assert word in ours[0], ours[0]


@contextlib.contextmanager
def nothing_left_behind() -> Iterator[None]:
    """Assert that the block leaves no process, thread, file handle or file once its workers have ended."""
    workers.start()  # with its first worker loky starts what it keeps until the program ends
    assert workers.pids()
    fresh_workers()
    if torch.cuda.is_available():
        torch.ones(1, device="cuda")  # as the first trace of Dynamo's does: CUDA keeps what it opens
    with tempfile.TemporaryDirectory() as folder, mock.patch("tempfile.tempdir", folder):
        before = held()
        yield
        fresh_workers()
        after = held()
        more = {kind: left for kind in after if (left := after[kind] - before[kind])}
        assert not more, more


def held() -> dict[str, Any]:
    """Child processes, threads, file handles and files, as of now. Handles go by target: their numbers vary."""
    handles = []
    for handle in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the handle of the listing itself is closed by now
            handles.append(os.readlink(f"/proc/self/fd/{handle}"))
    processes = psutil.Process().children(recursive=True)
    return {
        "processes": {(process.pid, " ".join(process.cmdline())) for process in processes},
        "threads": {thread for thread in threading.enumerate() if thread.name.startswith("frame-swap-worker")},
        "handles": Counter("a pipe" if handle.startswith("pipe:") else handle for handle in handles),
        "files": set(Path(tempfile.gettempdir()).rglob("*")),
    }
