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


def present(count: int) -> openmp.Sleepers:
    sleepers = openmp.Sleepers(count)
    sleepers.present.wait()
    return sleepers


def test_threads_sleep_meanwhile_and_spin_afterwards() -> None:
    threads = torch.get_num_threads()
    sleepers = present(1)
    with_sleepers = sleeps_of_ops()
    assert torch.get_num_threads() == threads
    sleepers.end()
    sleepers.thread.join()
    assert with_sleepers > OPS / 2
    assert sleeps_of_ops() < with_sleepers / 2


def test_results_are_the_same_to_the_last_bit() -> None:
    x = torch.randn(3, 200_000)
    before = x.sum(), torch.softmax(x, -1), x @ x.T
    sleepers = present(2)
    assert all(map(torch.equal, before, (x.sum(), torch.softmax(x, -1), x @ x.T)))
    sleepers.end()
