"""While there are sleepers, the threads of ops that wait for each other sleep; before and afterwards they spin."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from frame_swap.runtime import machine, openmp

TASKS = Path("/proc/self/task")

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(not TASKS.exists() or openmp.library() is None, reason="for GNU's OpenMP on Linux"),
]

OPS = 300


def sleeps_of_ops() -> int:
    """How often threads of OpenMP go to sleep in `OPS` ops that have a pause between them."""
    python = {str(thread.native_id) for thread in threading.enumerate()}
    x = torch.ones(200_000)

    def asleep() -> int:
        statuses = [task.joinpath("status").read_text() for task in TASKS.iterdir() if task.name not in python]
        return sum(int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0]) for status in statuses)

    x.sin()
    before = asleep()
    for _ in range(OPS):
        x.sin()
        sum(range(5_000))
    return asleep() - before


@pytest.fixture(autouse=True)
def as_many_threads_as_cpus() -> None:
    assert torch.get_num_threads() <= machine.usable_cpus()
    if torch.get_num_threads() < max(2, machine.usable_cpus()):
        pytest.skip("no thread of an op is without a CPU of its own")
    for thread in threading.enumerate():
        if thread.name == "frame-swap-sleeper":
            thread.join(60)  # compiles that earlier tests have begun may have to end


def present(count: int) -> openmp.Sleepers:
    sleepers = openmp.Sleepers(count)
    assert sleepers.present.wait(60)
    return sleepers


def test_threads_sleep_meanwhile_and_spin_afterwards() -> None:
    threads = torch.get_num_threads()
    sleepers = present(1)
    try:
        with_sleepers = sleeps_of_ops()
        assert torch.get_num_threads() == threads  # so results are the same to the last bit
    finally:
        sleepers.end()
    sleepers.thread.join()
    assert with_sleepers > OPS / 2
    assert sleeps_of_ops() < with_sleepers / 2
