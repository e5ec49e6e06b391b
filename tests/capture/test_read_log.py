"""What a capture has read, and when it differs from what is so later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.source import LocalSource

from frame_swap.internals.read_log import GivenUp, ReadLog

pytestmark = pytest.mark.quick


def log_of(**values: Any) -> ReadLog:
    """The log of a trace that has read these locals, and is over."""
    log = ReadLog(values, {}, lambda: None)
    for name, value in values.items():
        log.read(LocalSource(name), value)
    log.seal()
    return log


@pytest.mark.parametrize(
    ("then", "now"),
    [
        (1.0, 1),
        (torch.ones(2), torch.ones(2, dtype=torch.float64)),
        (torch.ones(2), torch.ones(2, requires_grad=True)),
        (torch.ones(2), torch.ones(2, 2)),
        (torch.ones(2), torch.nn.Parameter(torch.ones(2), requires_grad=False)),
        ([], ()),
        ({}, None),
    ],
)
def test_another_kind(then: Any, now: Any) -> None:
    log = log_of(x=then)
    assert log.differs({"x": then}, {}) is None
    assert log.differs({"x": now}, {}) == "the kind of L['x']"


def test_a_name_that_is_gone() -> None:
    differs = log_of(x=1.0).differs({}, {})
    assert differs is not None
    assert differs.startswith("L['x'] (KeyError")


def test_containers_that_were_one_or_two() -> None:
    one: list[int] = []
    two: list[int] = []
    assert log_of(a=one, b=one).differs({"a": two, "b": two}, {}) is None
    assert log_of(a=one, b=one).differs({"a": one, "b": two}, {}) == "the identity of L['b']"
    assert log_of(a=one, b=two).differs({"a": one, "b": one}, {}) == "containers that are one and the same"


def _grow(value: Any) -> Any:
    value.update({"b": 2}) if isinstance(value, dict) else value.append(2)
    return value


@pytest.mark.parametrize(
    ("first", "change"),
    [
        (1.0, lambda value: 2.0),
        (1, lambda value: True),
        ([1], _grow),
        ({"a": 1}, _grow),
        (torch.ones(2), lambda value: value.double()),
    ],
)
def test_a_value_that_is_read_twice_and_changes_between(first: Any, change: Callable[[Any], Any]) -> None:
    log, source = ReadLog({}, {}, lambda: None), LocalSource("x")
    log.read(source, first)
    log.read(source, first)
    with pytest.raises(GivenUp, match="has changed"):
        log.read(source, change(first))


def test_a_checkpoint_comes_first() -> None:
    def stop() -> None:
        raise GivenUp("it was stopped")

    with pytest.raises(GivenUp, match="stopped"):
        ReadLog({}, {}, stop).read(LocalSource("x"), 1)


def test_what_changes_the_process_is_left_to_calls() -> None:
    for value in (torch.use_deterministic_algorithms, torch.optim.SGD([torch.ones(1)])):
        with pytest.raises(GivenUp) as given_up:
            log_of(x=value)
        assert given_up.value.lasting
