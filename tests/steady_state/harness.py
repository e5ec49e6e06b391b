"""Cases: scenarios around something compiled, run with stock `torch.compile` and with frame-swap, and compared.

Each scenario runs with each backend to compile all that it calls, then, frame-swap's code installed, twice, the
second time to be observed. What was observed must be equal: bits, strides, versions, views and aliases, autograd's
nodes, hooks called, types and messages of errors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import pytest
import torch
from helpers import DEVICE, assert_same, live, swap_all
from torch._functorch import config as functorch_config

import frame_swap
from frame_swap.region import Record

from .seen import LOG, WATCHED, Call, ambient

NOTHING_CACHED = functorch_config.patch(enable_autograd_cache=False)
"""Stock caches backwards that were compiled for what another program did with them."""


class Case(NamedTuple):
    """A scenario and its subject.

    Attributes:
        scenario: takes the compiled subject, calls it, and returns the observations to compare.
        subject: the function, or the class of the module, that is compiled.
        within: makes a context for the whole test, compiling included.
        differs: the reason why frame-swap differs from stock, if it does.
        answered: whether calls raise. Eager code then runs, too, to see whether it raises, and adds to the log.
        keywords: for `torch.compile`.
    """

    scenario: Callable[[Call], Any]
    subject: Call
    within: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    differs: str = ""
    answered: bool = False
    keywords: dict[str, Any] = {}  # noqa: RUF012 - a default that nobody changes


class Cases:
    """The cases of one module: `case = Cases()` decorates its scenarios, `case.test` is the test of them all."""

    def __init__(self) -> None:
        self._cases: list[Case] = []

    def __call__(
        self,
        subject: Call,
        within: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
        differs: str = "",
        answered: bool = False,
        **keywords: Any,
    ) -> Callable[[Callable[[Call], Any]], Callable[[Call], Any]]:
        """Add a case, whose scenario is decorated; `Case` says what the arguments are."""

        def add(scenario: Callable[[Call], Any]) -> Callable[[Call], Any]:
            self._cases.append(Case(scenario, subject, within, differs, answered, keywords))
            return scenario

        return add

    @property
    def test(self) -> Callable[..., None]:
        """A test function with the cases added so far as its parameters."""

        @pytest.mark.parametrize("case", self._cases, ids=lambda case: case.scenario.__name__)
        def test_is_as_with_stock(case: Case, request: pytest.FixtureRequest) -> None:
            if case.differs:
                request.applymarker(pytest.mark.xfail(reason=case.differs, strict=True))
            with case.within():
                expected, actual = observe(case, "inductor"), observe(case, "frame_swap")
            assert_same(actual, expected, case.scenario.__name__)

        return test_is_as_with_stock


def compile_all(run: Callable[[], Any]) -> list[Record]:
    """Run a scenario until it has called all that it calls and its code is installed; return the regions.

    Eager code does not raise all that compiled code does, and the scenario ends where it misses an error.
    """
    regions: list[Record] = []
    while True:
        missed = True
        with contextlib.suppress(Exception, pytest.fail.Exception):
            run()
            missed = False
        frame_swap.wait()
        before, regions = regions, swap_all()
        if not missed or len(regions) == len(before):
            return regions


def observe(case: Case, backend: str) -> Any:
    """Run the scenario on compiled code; return its observations, the log, and the thread's state around it."""
    torch._dynamo.reset()
    frame_swap.configure(when="manual")
    torch.manual_seed(0)
    subject = case.subject().to(DEVICE) if isinstance(case.subject, type) else case.subject
    call = torch.compile(subject, backend=backend, **case.keywords)
    regions = []
    with NOTHING_CACHED:
        if backend == "frame_swap":
            regions = compile_all(lambda: case.scenario(call))
        else:
            case.scenario(call)
    eager_calls = [region.eager_calls for region in regions]

    case.scenario(call)  # only the first call of compiled code looks for operators that alias
    LOG.clear()
    WATCHED.clear()
    torch.manual_seed(1)
    before = ambient()
    seen = case.scenario(call)
    assert live(frame_swap.report()) == regions, "it compiled again"
    served = [region.eager_calls for region in regions]
    assert (served != eager_calls) is (case.answered and bool(regions)), "eager code was called, or was to be"
    after, log = ambient(), [] if case.answered else LOG.copy()
    torch.set_grad_enabled(True)  # for later tests
    return seen, log, before, after, torch.get_rng_state(), torch.cuda.get_rng_state_all()
