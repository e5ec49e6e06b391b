"""Of several processes that want one artifact, one compiles it, and the others wait for that one."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
from helpers import until
from store.holder import KEY, Holder, holding, store_in

from frame_swap.artifacts.store.disk import Disk
from frame_swap.artifacts.store.entry import Entry
from frame_swap.farm.protocol import Outcome
from frame_swap.farm.reuse import Place
from frame_swap.farm.single_flight import SingleFlight, Wanted

pytestmark = pytest.mark.quick

COMPILED = Outcome(b"compiled here", b"", "", "", 0.0, 0.0, 0.0, 1)
WAIT = 100
Make = Callable[..., Wanted]


def is_free(store: Disk) -> bool:
    """Whether nobody has the claim."""
    claim = store.claim(KEY)
    if claim is not None:
        claim.release()
    return claim is not None


class Compiles:
    """What would start compiles here: each is a future that the test ends."""

    def __init__(self) -> None:
        self.begun: list[Future[Outcome]] = []

    def start(self) -> Future[Outcome]:
        self.begun.append(Future())
        return self.begun[-1]


@pytest.fixture
def store(tmp_path: Path) -> Disk:
    return store_in(tmp_path / "store")


@pytest.fixture
def holder(store: Disk) -> Iterator[Holder]:
    """Another process that has the claim."""
    with holding(store) as process:
        yield process


@pytest.fixture
def compiles() -> Compiles:
    return Compiles()


@pytest.fixture
def wanted(store: Disk, compiles: Compiles) -> Make:
    def make(still: Callable[[], bool] = lambda: True, timeout: float = math.inf) -> Wanted:
        return Wanted(Place(store, KEY), lambda: b"loading", compiles.start, still, timeout)

    return make


def test_a_result_is_in_the_store_when_it_is_told(store: Disk, compiles: Compiles, wanted: Make) -> None:
    future = SingleFlight().begin(wanted())
    assert not is_free(store)
    seen: list[tuple[Entry | None, bool]] = []
    future.add_done_callback(lambda _: seen.append((store.get(KEY), is_free(store))))
    compiles.begun[0].set_result(COMPILED)
    assert future.result(WAIT).store == "kept"
    assert seen == [(Entry(b"compiled here", b"", b"loading"), True)]


def test_what_another_process_compiles_is_waited_for(holder: Holder, compiles: Compiles, wanted: Make) -> None:
    future = SingleFlight().begin(wanted())
    assert not future.done()
    holder.release(put=True)
    outcome = future.result(WAIT)
    assert (outcome.artifact, outcome.store) == (b"compiled there", "found")
    assert compiles.begun == []


@pytest.mark.parametrize("how", ["it dies", "its compile fails"])
def test_a_process_takes_over_where_the_other_does_not_deliver(
    holder: Holder, store: Disk, compiles: Compiles, wanted: Make, how: str
) -> None:
    flight = SingleFlight()
    future = flight.begin(wanted())
    assert compiles.begun == []
    if how == "it dies":
        holder.kill()
    else:
        holder.release()
    until(lambda: bool(compiles.begun))  # the thread that waits begins it
    assert not future.done()
    compiles.begun[0].set_result(COMPILED)
    assert future.result(WAIT).artifact == b"compiled here"
    assert store.get(KEY) is not None


@pytest.mark.usefixtures("holder")
def test_nobody_waits_for_ever(compiles: Compiles, wanted: Make) -> None:
    future = SingleFlight().begin(wanted(timeout=0.0))
    assert len(compiles.begun) == 1, "it compiles beside the other"
    compiles.begun[0].set_result(COMPILED)
    assert future.result(WAIT).artifact == b"compiled here"


@pytest.mark.usefixtures("holder")
def test_what_nobody_wants_any_more_is_not_waited_for(compiles: Compiles, wanted: Make) -> None:
    flight, still = SingleFlight(), [True]
    future = flight.begin(wanted(lambda: still[0]))
    still[0] = False
    until(future.cancelled)
    until(lambda: flight._thread is None)
    assert compiles.begun == []


def test_a_failure_is_told_and_frees_the_claim(store: Disk, compiles: Compiles, wanted: Make) -> None:
    flight = SingleFlight()
    future = flight.begin(wanted())
    compiles.begun[0].set_exception(ValueError("no"))
    assert isinstance(future.exception(WAIT), ValueError)
    assert store.get(KEY) is None
    again = flight.begin(wanted())
    compiles.begun[1].set_result(Outcome(None, b"", "it failed", "", 0.0, 0.0, 0.0, 1))
    assert again.result(WAIT).error == "it failed"
    assert list(Path(store.folder).iterdir()) == []


def test_a_compile_that_is_dropped_is_cancelled_or_else_kept(store: Disk, compiles: Compiles, wanted: Make) -> None:
    flight = SingleFlight()
    queued = flight.begin(wanted())
    queued.cancel()
    assert compiles.begun[0].cancelled()
    under_way = flight.begin(wanted())
    compiles.begun[1].set_running_or_notify_cancel()
    under_way.cancel()
    compiles.begun[1].set_result(COMPILED)
    assert store.get(KEY) is not None
    assert is_free(store)


def test_the_same_wanted_twice_in_a_process_is_compiled_once(compiles: Compiles, wanted: Make) -> None:
    flight = SingleFlight()
    first, second = flight.begin(wanted()), flight.begin(wanted())
    compiles.begun[0].set_result(COMPILED)
    assert first.result(WAIT).store == "kept"
    assert second.result(WAIT).store == "found"
    assert len(compiles.begun) == 1


def test_a_forked_child_compiles_for_itself_once_its_parent_is_done(
    store: Disk, compiles: Compiles, wanted: Make
) -> None:
    flight = SingleFlight()
    flight.begin(wanted())
    told, tell = os.pipe()
    if (child := os.fork()) == 0:
        flight.forget()
        os.write(tell, b"free" if store.claim(KEY) is not None else b"held")
        os._exit(0)
    assert os.read(told, 4) == b"held", "the parent still compiles"
    os.waitpid(child, 0)
    compiles.begun[0].set_result(COMPILED)
    assert is_free(store)
