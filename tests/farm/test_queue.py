"""The order in which waiting calls are taken."""

from __future__ import annotations

import itertools
import math
import threading
from concurrent import futures

import pytest

from frame_swap.farm.queue import TURNS, Demand, Entry, Queue

pytestmark = pytest.mark.quick


class Graph:
    """A graph that waits in a queue, and its calls."""

    def __init__(self, queue: Queue, name: str, size: int = 1, awaited: bool = False, calls: int = 0) -> None:
        self.calls = calls
        self.entry = Entry(name.encode(), math.inf, lambda: True, Demand(lambda: self.calls, size, awaited))
        queue.put(self.entry)


def taken(queue: Queue, most: int = 100) -> str:
    """The names of what `queue` yields, `most` of them."""
    return "".join(entry.call.decode() for entry in itertools.islice(iter(queue.take, None), most))


def test_most_calls_times_size_first() -> None:
    queue = Queue()
    Graph(queue, "a", size=10, calls=2)
    Graph(queue, "b", size=100, calls=1)
    Graph(queue, "c", size=1, calls=30)
    assert taken(queue) == "bca"


def test_calls_are_compared_when_a_worker_is_free() -> None:
    queue = Queue()
    graphs = {name: Graph(queue, name) for name in "abc"}
    graphs["c"].calls = 2
    assert taken(queue, 1) == "c"
    graphs["b"].calls = 1
    assert taken(queue) == "ba"


def test_of_equal_worth_the_first_first() -> None:
    queue = Queue()
    for name in "abcd":
        Graph(queue, name, size=3, calls=2)
    assert taken(queue) == "abcd"


def test_what_somebody_waits_for_comes_first() -> None:
    queue = Queue()
    Graph(queue, "a", size=1000, calls=1000)
    Graph(queue, "b", awaited=True)
    assert taken(queue) == "ba"


def go_on(*graphs: Graph) -> None:
    """Call each of `graphs` so often that the program needs those no more that were not called."""
    for graph in graphs:
        graph.calls += TURNS


def test_what_is_called_no_more_comes_last_and_is_not_lost() -> None:
    queue = Queue()
    stale, large, small = Graph(queue, "s", 1000, calls=1000), Graph(queue, "l", 3), Graph(queue, "m")
    Graph(queue, "0", awaited=True)
    go_on(small, large)
    assert taken(queue, 1) == "0"  # the graphs' calls are counted
    go_on(small, large)
    assert stale.entry.worth > large.entry.worth
    assert taken(queue) == "lms"


def test_what_is_called_again_is_worth_what_it_was() -> None:
    queue = Queue()
    back, other = Graph(queue, "b", 10, calls=10), Graph(queue, "o")
    for name in "01":
        Graph(queue, name, awaited=True)
    go_on(other)
    assert taken(queue, 1) == "0"
    go_on(other)
    assert taken(queue, 1) == "1"
    assert back.entry.worth < other.entry.worth
    back.calls += 1
    assert back.entry.worth > other.entry.worth
    assert taken(queue) == "bo"


def test_while_nothing_else_goes_on_nothing_is_called_no_more() -> None:
    """A program that traces for a minute in its first step calls nothing twice."""
    queue = Queue()
    Graph(queue, "a", size=100, calls=1)
    for name in "0123":
        Graph(queue, name, awaited=True)
        assert taken(queue, 1) == name
    late = Graph(queue, "b")
    late.calls = TURNS - 1
    assert taken(queue) == "ab"


def test_what_has_just_come_counts_as_called() -> None:
    queue = Queue()
    old = Graph(queue, "o", calls=1)
    Graph(queue, "0", awaited=True)
    go_on(old)
    assert taken(queue, 1) == "0"
    go_on(old)
    new = Graph(queue, "n", size=10 * TURNS)
    Graph(queue, "1", awaited=True)
    assert taken(queue, 1) == "1"
    new.calls = 1
    assert taken(queue) == "no"


def test_cancelled_ones_are_passed_over_and_let_go() -> None:
    queue = Queue()
    graphs = [Graph(queue, name) for name in "abc"]
    for graph in graphs[:2]:
        graph.entry.future.cancel()
    entry = queue.take()
    assert entry is graphs[2].entry
    assert entry.future.running()
    assert not futures.wait([graph.entry.future for graph in graphs[:2]], timeout=0).not_done
    assert not queue._waiting
    assert queue.take() is None


def test_cancel_cancels_all_that_wait() -> None:
    queue = Queue()
    first, second = Graph(queue, "a"), Graph(queue, "b")
    assert taken(queue, 1) == "a"
    queue.cancel()
    assert (first.entry.future.cancelled(), second.entry.future.cancelled()) == (False, True)
    assert queue.take() is None


def test_each_is_taken_once() -> None:
    queue = Queue()
    names: list[bytes] = []
    begin = threading.Barrier(5)

    def take() -> None:
        begin.wait()
        while entry := queue.take():
            names.append(entry.call)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for number in range(200):
        Graph(queue, str(number), calls=number % 7)
    for thread in threads:
        thread.start()
    begin.wait()
    for thread in threads:
        thread.join()
    assert sorted(names, key=int) == [str(number).encode() for number in range(200)]
