"""Tokens for compilers: no more at work than there are, in all workers together; none is lost with a process."""

from __future__ import annotations

import fcntl
import functools
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.harness import fresh_workers
from torch._inductor import async_compile

from frame_swap.farm.local import process, tokens
from frame_swap.farm.workers import workers
from frame_swap.internals import inductor
from frame_swap.runtime import machine

pytestmark = pytest.mark.fast


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(tokens.FOLDER, str(tmp_path))
    monkeypatch.setenv(tokens.COUNT, "2")
    return tmp_path


def held(folder: Path) -> int:
    """How many tokens somebody holds."""
    return sum(not _is_free(file) for file in folder.iterdir())


def _is_free(file: Path) -> bool:
    with file.open() as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.fixture
def holders(folder: Path) -> Iterator[Callable[[], Any]]:
    """Starts processes, each of which takes a token and holds it until it is killed."""
    started: list[Any] = []
    context = multiprocessing.get_context("spawn")

    def start() -> Any:
        has_it = context.Event()
        one = context.Process(target=hold, args=(has_it,))
        one.start()
        started.append(one)
        assert has_it.wait(100)
        return one

    yield start
    for one in started:
        one.kill()
        one.join()


def hold(has_it: Any) -> None:
    with tokens.held():
        has_it.set()
        signal.pause()


def test_a_call_holds_a_token_and_gives_it_back(folder: Path) -> None:
    assert tokens.call_holding(held, folder) == 1
    assert held(folder) == 0
    with pytest.raises(ZeroDivisionError):
        tokens.call_holding(divmod, 1, 0)
    assert held(folder) == 0


def test_who_finds_none_waits_and_a_killed_holder_gives_its_own_back(
    folder: Path, holders: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = holders(), holders()
    looked = threading.Event()
    monkeypatch.setattr(tokens, "PAUSE", 0.001)
    usual = tokens.time.sleep
    monkeypatch.setattr(tokens.time, "sleep", lambda seconds: (looked.set(), usual(seconds)))
    results: list[int] = []
    third = threading.Thread(target=lambda: results.append(tokens.call_holding(held, folder)))
    third.start()
    assert looked.wait(100), "it has looked for a token and found none"
    assert (results, held(folder)) == ([], 2)
    first.kill()
    third.join(100)
    assert results == [2]


@pytest.mark.parametrize("lacking", ["variable", "folder"])
def test_without_tokens_nobody_waits(lacking: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if lacking == "variable":
        monkeypatch.delenv(tokens.FOLDER)
    else:
        folder.rmdir()
    assert tokens.call_holding(int) == 0


def test_workers_have_tokens() -> None:
    place, count = (
        workers.submit(functools.partial(os.getenv, name)).result() for name in (tokens.FOLDER, tokens.COUNT)
    )
    assert int(count) == machine.compilers()
    assert place == process._tokens_folder()
    assert os.stat(place).st_mode & 0o077 == 0


def test_inductors_compilers_hold_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ compilers on threads of the worker, and Triton's in processes of Inductor's."""
    monkeypatch.setattr(
        async_compile.AsyncCompile, "submit", async_compile.AsyncCompile.submit
    )  # undone at the end
    monkeypatch.setattr(async_compile, "_worker_compile_triton", held)
    inductor.wrap_compilers(tokens.call_holding)
    task: Any = async_compile.AsyncCompile.submit(lambda: held(folder))
    assert (task if isinstance(task, int) else task.result()) == 1
    assert async_compile._worker_compile_triton(folder) == 1
    pickle.dumps(functools.partial(tokens.call_holding, os.getpid))  # as it travels to these processes


def test_the_folder_goes_with_the_last_worker() -> None:
    workers.submit(os.getpid).result()
    place = process._tokens_folder()
    fresh_workers()
    assert not os.path.exists(place)
