"""The policy by which program and workers share the machine."""

from __future__ import annotations

import sys
import threading

import pytest

from frame_swap.runtime import machine

pytestmark = pytest.mark.quick


@pytest.fixture(params=[1, 2, 8])
def cpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    count: int = request.param
    monkeypatch.setattr(machine, "usable_cpus", lambda: count)
    return count


def test_compilers_of_all_workers_fit_the_cpus(cpus: int) -> None:
    for workers in range(1, 10):
        each = machine.compilers_per_worker(workers)
        assert each >= 1
        assert each == 1 or each * workers <= cpus


def test_courteous_calls_at_a_time_put_the_interval_back() -> None:
    usual = sys.getswitchinterval()
    begun, first_ended = threading.Event(), threading.Event()
    seen: list[float] = []

    def second() -> None:
        begun.set()
        assert first_ended.wait(100)
        seen.append(sys.getswitchinterval())

    def first() -> None:
        other.start()
        assert begun.wait(100)

    other = threading.Thread(target=machine.run_courteously, args=(second,))
    machine.run_courteously(first)
    first_ended.set()
    other.join()
    assert seen == [machine.SWITCH_INTERVAL]
    assert sys.getswitchinterval() == usual


def test_a_courteous_call_sees_a_short_switch_interval_which_ends_with_it() -> None:
    usual = sys.getswitchinterval()
    seen: list[float] = []

    def fail() -> None:
        seen.append(sys.getswitchinterval())
        raise ValueError

    with pytest.raises(ValueError):
        machine.run_courteously(fail)
    assert seen == [pytest.approx(min(usual, machine.SWITCH_INTERVAL))]
    assert sys.getswitchinterval() == usual
