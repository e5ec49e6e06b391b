"""While workers compile the pair uses fewer threads; afterwards thread counts are as before."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.library import custom_op

import frame_swap
from frame_swap.runtime import openmp
from frame_swap.serving import pair

pytestmark = pytest.mark.fast

NOTED: list[tuple[int, int]] = []


@custom_op("pair_test::note", mutates_args=())
def note(x: Tensor) -> Tensor:
    """Record how many threads an op may use, in this thread and in a new one."""
    others: list[int] = []
    thread = threading.Thread(target=lambda: others.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    NOTED.append((torch.get_num_threads(), *others))
    return x.clone()


note.register_fake(torch.empty_like)


@pytest.fixture
def three_threads() -> Iterator[None]:
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(usual)


@pytest.mark.usefixtures("three_threads")
@pytest.mark.skipif(openmp.library() is None, reason="this PyTorch does not use OpenMP")
def test_fewer_threads_meanwhile_and_for_the_calling_thread_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    frame_swap.configure(when="never")
    free: list[int | None] = [None, 2, 1, 5]
    compiled = torch.compile(lambda x: note(x) + 1, backend="frame_swap")
    compiled(torch.ones(3))
    NOTED.clear()
    for threads in free:
        monkeypatch.setattr(pair.service, "threads_for_program", lambda: threads)
        compiled(torch.ones(3))
        assert torch.get_num_threads() == 3
    assert NOTED == [(3, 3), (2, 3), (1, 3), (3, 3)]
