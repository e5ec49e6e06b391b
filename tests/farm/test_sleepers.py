"""While workers compile, the program's threads sleep where they wait for each other."""

from __future__ import annotations

import pytest
import torch
from faults.moments import Moment

import frame_swap
from frame_swap.errors import FrameSwapWarning
from frame_swap.farm.local.pool import Pool
from frame_swap.farm.service import service

pytestmark = pytest.mark.fast


def no_more_sleepers() -> None:
    if (sleepers := service._sleepers) is not None:
        sleepers.thread.join()  # compiles that earlier tests have begun may have to end
    assert not service.compiling
    assert service._sleepers is None


def test_sleepers_are_there_from_the_first_compile_to_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    frame_swap.configure(workers=1)
    with Moment(monkeypatch, Pool, "_run_once") as moment:
        compiled = torch.compile(lambda x: x.sin() + 1, backend="frame_swap")
        compiled(torch.ones(3))
        moment.wait()
        sleepers = service._sleepers
        assert service.compiling
        assert sleepers is not None
        assert sleepers.thread.is_alive()
        other = torch.compile(lambda x: x.cos() + 1, backend="frame_swap")
        other(torch.ones(3))
        assert service._sleepers is sleepers
    frame_swap.wait()
    no_more_sleepers()
    assert not sleepers.thread.is_alive()


def test_a_compile_that_fails_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(pool: Pool, *_: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(Pool, "_run_once", fail)
    compiled = torch.compile(lambda x: x.sin() + 2, backend="frame_swap")
    with pytest.warns(FrameSwapWarning, match="planted"):
        compiled(torch.ones(3))
        frame_swap.wait()
    no_more_sleepers()
