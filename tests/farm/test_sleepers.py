"""While workers compile, the program's threads sleep where they wait for each other."""

from __future__ import annotations

import pytest
import torch
from faults.moments import Moment

import frame_swap
from frame_swap.errors import FrameSwapWarning
from frame_swap.farm.local.pool import Pool, busy
from frame_swap.farm.service import service
from frame_swap.runtime import openmp

pytestmark = [
    pytest.mark.fast,
    pytest.mark.skipif(openmp.library() is None, reason="for GNU's OpenMP"),
]


def no_more_sleepers() -> None:
    while (sleepers := busy.sleepers) is not None:  # compiles that earlier tests have begun may have to end
        sleepers.thread.join(0.1)
    assert not service.compiling


def test_sleepers_are_there_from_the_first_compile_to_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    frame_swap.configure(workers=1)
    with Moment(monkeypatch, Pool, "_run_once") as moment:
        compiled = torch.compile(lambda x: x.sin() + 1, backend="frame_swap")
        compiled(torch.ones(3))
        moment.wait()
        sleepers = busy.sleepers
        assert service.compiling
        assert sleepers is not None
        assert sleepers.thread.is_alive()
        other = torch.compile(lambda x: x.cos() + 1, backend="frame_swap")
        other(torch.ones(3))
        assert busy.sleepers is sleepers
    frame_swap.wait()
    no_more_sleepers()
    sleepers.thread.join()


def test_a_compile_that_fails_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(pool: Pool, *_: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(Pool, "_run_once", fail)
    compiled = torch.compile(lambda x: x.sin() + 2, backend="frame_swap")
    with pytest.warns(FrameSwapWarning, match="planted"):
        compiled(torch.ones(3))
        frame_swap.wait()
    no_more_sleepers()
