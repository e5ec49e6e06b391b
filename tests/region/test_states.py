"""The table of states and transitions, and random sequences of what may happen to a region."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import frame_swap
from frame_swap.artifacts.compiled import Compiled
from frame_swap.checking.trial import Sides, Trial
from frame_swap.region import Attempt, Event, IllegalTransition, Purpose, Record, State
from frame_swap.region.states import TRANSITIONS, following, leading
from frame_swap.serving.plan import Offer, Served
from frame_swap.serving.trampoline import Trampoline

ENDS = {State.REPLACED, State.FAILED, State.REJECTED, State.STALE, State.FOREGROUND, State.EAGER}


def test_the_table_has_each_state_and_each_event_leads_somewhere() -> None:
    assert set(TRANSITIONS) == set(State)
    assert {event for row in TRANSITIONS.values() for event in row} == set(Event)
    reached = {new for row in TRANSITIONS.values() for new in row.values()}
    assert reached == set(State) - {State.PENDING}, "no event leads to some state"


def test_what_has_ended_stays_ended() -> None:
    left = {(old, new) for old in ENDS for new in TRANSITIONS[old].values() if new is not old}
    assert left == {(State.FAILED, State.FOREGROUND)}


@pytest.mark.parametrize("state", State)
def test_an_event_that_the_table_lacks_is_illegal(state: State) -> None:
    for event in set(Event) - set(TRANSITIONS[state]):
        with pytest.raises(IllegalTransition, match=f"that is {state} cannot be {event}"):
            following(state, event)


def test_an_illegal_transition_raises_in_tests_and_is_logged_in_programs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempt = Attempt(Record(None, "0/0"))
    with pytest.raises(IllegalTransition):
        attempt.move(Event.INSTALLED)
    monkeypatch.delenv("FRAME_SWAP_STRICT")
    assert not attempt.move(Event.INSTALLED)
    assert attempt.state is State.PENDING
    assert "a mistake in frame-swap" in caplog.text


@pytest.mark.parametrize(
    ("states", "of_the_region"),
    [
        ((), State.PENDING),
        ((State.PENDING,), State.PENDING),
        ((State.INSTALLED, State.PENDING), State.INSTALLED),
        ((State.INSTALLED, State.FAILED), State.INSTALLED),
        ((State.FAILED, State.PENDING), State.PENDING),
        ((State.REJECTED, State.STALE), State.REJECTED),
        ((State.REPLACED, State.INSTALLED), State.INSTALLED),
        ((State.REPLACED, State.REJECTED), State.REJECTED),
    ],
)
def test_the_state_of_a_region_follows_from_those_of_its_compiles(
    states: tuple[State, ...], of_the_region: State
) -> None:
    assert leading(states) is of_the_region


def test_rows_are_frozen_and_keep_what_they_said() -> None:
    record = Record(None, "0/0")
    row = record.row()
    record.attempts[0].move(Event.FAILED, "no compiler")
    assert (row.state, row.reason, record.row().reason) == (State.PENDING, "", "no compiler")
    for value in (row, row.compiles[0]):
        with pytest.raises(dataclasses.FrozenInstanceError):
            value.state = State.INSTALLED  # type: ignore[misc]
    assert not any(callable(getattr(row, name)) for name in dir(row) if not name.startswith("_"))


def test_each_compile_has_a_row_of_its_own() -> None:
    record = Record(None, "0/0")
    record.attempts[0].compiled(1.0, 2.0, 5.0, 10)
    more = Attempt(record, Purpose.SIZES)
    record.begin(more)
    more.compiled(6.0, 6.5, 7.0, 11)
    first, second = record.row().compiles
    assert (first.queue_s, first.compile_s, first.worker_pid) == (1.0, 3.0, 10)
    assert (second.queue_s, second.compile_s, second.worker_pid) == (0.5, 0.5, 11)
    assert record.row().compile_s == 0.5, "the region's is the latest one's"
    assert "sizes" in str(frame_swap.Report([record.row()]))


# --- Random walks ------------------------------------------------------------------------------------------


class Scripted(Trial):
    """A trial that serves by eager code until it is told its verdict."""

    def call(self, sides: Sides, args: Any) -> Any:
        return sides.current(*args)


class Raised(Exception):
    """What compiled code raises when it is told to."""


class Walk(RuleBasedStateMachine):
    """One region with a real trampoline, which no frame calls, and code that says which compile it came of."""

    @initialize()
    def capture(self) -> None:
        self.record = Record(None, "0/0")
        self.trampoline = Trampoline(self.record, lambda x: ("eager", x), "ready")
        self.ended: dict[int, State] = {}
        self.trials: list[Scripted] = []
        self.raising = False

    def _code(self, attempt: Attempt) -> Compiled:
        def call(x: int) -> tuple[Any, int]:
            if self.raising:
                raise Raised
            return attempt, x

        return Compiled(call, None, (), repeatable=True)

    def _pending(self) -> list[Attempt]:
        return [a for a in self.record.attempts if a.state is State.PENDING]

    @rule(better=st.booleans())
    def ask_for_another(self, better: bool) -> None:
        self.record.begin(Attempt(self.record, Purpose.BETTER if better else Purpose.SIZES))

    @precondition(lambda self: self._pending())
    @rule(data=st.data(), trial=st.booleans(), narrow=st.booleans())
    def offer(self, data: st.DataObject, trial: bool, narrow: bool) -> None:
        attempt = data.draw(st.sampled_from(self._pending()))
        in_place = [served.attempt for served in self.trampoline._plan]
        waiting = [offer.attempt for offer in self.trampoline._offers]
        everywhere = any(s.fits is None for s in self.trampoline._plan) or waiting
        replaces = data.draw(st.sampled_from(in_place)) if in_place and attempt.purpose is Purpose.BETTER else None
        if replaces is None and everywhere:
            narrow = True  # two codes for all calls are a mistake of whoever offers the second
        fits: Callable[..., bool] | None = (lambda x: x == 1) if narrow else None
        condition: Any = (object(),) if narrow else None
        trials = (Scripted(),) if trial else ()
        self.trials += trials
        self.trampoline.offer(Offer(Served(attempt, self._code(attempt), condition, fits), trials, replaces))

    @precondition(lambda self: self._pending())
    @rule(data=st.data(), event=st.sampled_from([Event.FAILED, Event.REJECTED]))
    def do_not_come(self, data: st.DataObject, event: Event) -> None:
        data.draw(st.sampled_from(self._pending())).fail(event, "for the test")

    @rule(x=st.sampled_from([0, 1]))
    def call(self, x: int) -> None:
        by, got = self.trampoline(x)
        assert got == x
        # The call that ends a trial is served by the code that is replaced at its end.
        assert by == "eager" or by.state in (State.INSTALLED, State.REPLACED), f"{by} served a call"

    @rule(x=st.sampled_from([0, 1]))
    def call_what_raises(self, x: int) -> None:
        self.raising = True
        try:
            assert self.trampoline(x) == ("eager", x)
        finally:
            self.raising = False

    @precondition(lambda self: self.trials)
    @rule(data=st.data(), verdict=st.sampled_from(["", "it is wrong"]))
    def decide(self, data: st.DataObject, verdict: str) -> None:
        data.draw(st.sampled_from(self.trials)).verdict = verdict

    @rule()
    def reject(self) -> None:
        self.trampoline.reject("for the test")
        in_use = (State.PENDING, State.READY, State.TRIAL, State.INSTALLED)
        assert not any(attempt.state in in_use for attempt in self.record.attempts)
        assert self.trampoline(1) == ("eager", 1)

    @rule()
    def reset(self) -> None:
        self.record.abandon()

    @rule()
    def fork(self) -> None:
        for attempt in self.record.attempts:
            attempt.forked()

    @rule(at=st.integers(0, 12))
    def install_with_an_interrupt(self, at: int) -> None:
        """At each of the moves and drops of an install."""
        steps = iter(range(at))

        def interrupting(method: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                if next(steps, None) is None and not done:
                    done.append(True)
                    raise KeyboardInterrupt
                return method(*args, **options)

            return call

        done: list[bool] = []
        first = self.trampoline._offers.first
        names = ("_put_in_place", "_prepare", "_let_go", "_drop")
        for name in names:
            setattr(self.trampoline, name, interrupting(getattr(self.trampoline, name)))
        try:
            self.trampoline.install()
        except KeyboardInterrupt:
            assert first.attempt.state is not State.READY, "the install was not done to its end"
        finally:
            for name in names:
                delattr(self.trampoline, name)

    @invariant()
    def the_table_holds(self) -> None:
        for at, attempt in enumerate(self.record.attempts):
            if at in self.ended:
                assert attempt.state is self.ended[at], f"{attempt} was {self.ended[at]}"
            if attempt.state in ENDS:
                self.ended[at] = attempt.state

    @invariant()
    def what_is_installed_is_in_the_plan(self) -> None:
        plan = self.trampoline._plan
        installed = [a for a in self.record.attempts if a.state is State.INSTALLED]
        assert {id(a) for a in installed} == {id(s.attempt) for s in plan if s.attempt.state is State.INSTALLED}
        assert not any(s.attempt.state is State.REPLACED for s in plan)
        assert sum(s.fits is None for s in plan) <= 1, "two codes for all calls"
        assert not any(s.fits is None for s in plan[:-1]), "code for all calls comes last"


@pytest.mark.filterwarnings("ignore::frame_swap.FrameSwapWarning")
def test_random_sequences_of_events_keep_to_the_table() -> None:
    run_state_machine_as_test(
        Walk,
        settings=settings(
            max_examples=300, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
