"""What a compile is for, its states, the events that change them, and the one table that says which may follow.

A compile for a region is an *attempt*. The state of a region follows from those of its attempts; see `leading`.

Many events can come late: a frame is deleted while its code is being loaded, a process forks, another thread's call
finds that compiled code raises. A state that ends an attempt therefore absorbs them: it stays what it is. An event
that can only come from a mistake in frame-swap is in no row of the table and raises `IllegalTransition`.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable


class State(enum.StrEnum):
    """What has become of a region or of one of its compiles."""

    PENDING = "pending"  # on eager code; a compile is queued, under way or being loaded
    READY = "ready"  # on eager code; compiled code is loaded and waits to be installed
    TRIAL = "trial"  # compiled code is verified against eager code, or timed
    INSTALLED = "installed"  # on compiled code
    REPLACED = "replaced"  # a compile whose code gave way to better code for the same calls; never a region's state
    FAILED = "failed"  # on eager code for good: the compile or the load failed
    REJECTED = "rejected"  # on eager code for good: the compiled code does not fit, or has failed
    STALE = "stale"  # the frame was gone before compiled code came
    FOREGROUND = "foreground"  # could not be shipped: stock Inductor compiled it in the caller
    EAGER = "eager"  # on eager code for good: when="never"


class Purpose(enum.StrEnum):
    """What a compile is for."""

    FIRST = "first"  # the region's first compiled code
    SIZES = "sizes"  # calls that the late guards of earlier code turn away
    BETTER = "better"  # better code for calls that compiled code serves already


class Event(enum.StrEnum):
    """What can happen to an attempt."""

    LOADED = "loaded"  # the artifact is loaded and offered
    TRIED = "tried"  # a trial begins
    PASSED = "passed"  # the trial is over, and the code may be installed or go through the next trial
    INSTALLED = "installed"  # the code is in place; also when an interrupted install is done again
    REPLACED = "replaced"  # better code for the same calls is in place
    FAILED = "failed"  # compiling, loading or installing went wrong
    REJECTED = "rejected"  # the code is not to be used
    ABANDONED = "abandoned"  # nobody will call it
    FORKED = "forked"  # this is a forked child, and the compile is the parent's
    FOREGROUND = "compiled in the foreground"
    DECLINED = "not asked for"  # when="never"


_ABSORBED = (
    Event.LOADED,
    Event.TRIED,
    Event.PASSED,
    Event.INSTALLED,
    Event.FAILED,
    Event.REJECTED,
    Event.ABANDONED,
    Event.FORKED,
)


def _absorbs(state: State, *events: Event) -> dict[Event, State]:
    return dict.fromkeys(events, state)


TRANSITIONS: dict[State, dict[Event, State]] = {
    State.PENDING: {
        Event.LOADED: State.READY,
        Event.FAILED: State.FAILED,
        Event.REJECTED: State.REJECTED,
        Event.ABANDONED: State.STALE,
        Event.FORKED: State.FAILED,
        Event.FOREGROUND: State.FOREGROUND,
        Event.DECLINED: State.EAGER,
    },
    State.READY: {
        Event.TRIED: State.TRIAL,
        Event.INSTALLED: State.INSTALLED,
        Event.FAILED: State.FAILED,
        Event.REJECTED: State.REJECTED,
        Event.ABANDONED: State.STALE,
        **_absorbs(State.READY, Event.FORKED),
    },
    State.TRIAL: {
        Event.PASSED: State.READY,
        Event.REJECTED: State.REJECTED,
        Event.ABANDONED: State.STALE,
        **_absorbs(State.TRIAL, Event.TRIED, Event.FORKED),  # a trial that an interrupt cut short begins again
    },
    State.INSTALLED: {
        Event.REPLACED: State.REPLACED,
        Event.REJECTED: State.REJECTED,
        **_absorbs(State.INSTALLED, Event.INSTALLED, Event.ABANDONED, Event.FORKED),
    },
    State.REPLACED: _absorbs(
        State.REPLACED, Event.REPLACED, Event.INSTALLED, Event.REJECTED, Event.ABANDONED, Event.FORKED
    ),
    # A compile may have failed before the pair does, for which the foreground then steps in.
    State.FAILED: {Event.FOREGROUND: State.FOREGROUND, **_absorbs(State.FAILED, *_ABSORBED)},
    State.REJECTED: _absorbs(State.REJECTED, Event.REPLACED, *_ABSORBED),
    State.STALE: _absorbs(State.STALE, *_ABSORBED),
    State.FOREGROUND: _absorbs(State.FOREGROUND, Event.ABANDONED, Event.REJECTED, Event.FORKED),
    State.EAGER: _absorbs(State.EAGER, Event.ABANDONED, Event.REJECTED, Event.FORKED),
}
"""For each state, the events that it knows and the state that follows."""

_LEADING = (
    State.INSTALLED,
    State.TRIAL,
    State.READY,
    State.PENDING,
    State.REJECTED,
    State.FAILED,
    State.FOREGROUND,
    State.EAGER,
    State.STALE,
    State.REPLACED,
)


class IllegalTransition(Exception):
    """An event came that no correct frame-swap would send in this state."""


def following(state: State, event: Event) -> State:
    """The state after `event` in `state`.

    Raises:
        IllegalTransition: the table has no such row.
    """
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise IllegalTransition(f"a compile that is {state} cannot be {event}") from None


def leading(states: Iterable[State]) -> State:
    """The state of a region whose attempts have `states`: the one that says most about what serves its calls."""
    return min(states, key=_LEADING.index, default=State.PENDING)
