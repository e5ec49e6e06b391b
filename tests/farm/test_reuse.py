"""What the last run of a program has used is loaded ahead; the program's own needs come first."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import frame_swap
from frame_swap import State, settings
from frame_swap.artifacts import load
from frame_swap.artifacts.compiled import Compiled
from frame_swap.artifacts.store import chosen, profile
from frame_swap.artifacts.store.disk import Disk
from frame_swap.artifacts.store.entry import Entry
from frame_swap.errors import FrameSwapWarning
from frame_swap.farm import reuse
from frame_swap.internals import logs
from frame_swap.shipping.process_state import ProcessState

pytestmark = pytest.mark.quick

KEYS = [f"{n:064x}" for n in range(3)]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    """The store in force; the last run of this program has used three artifacts of it."""
    monkeypatch.setenv("FRAME_SWAP_STORE", str(tmp_path / "store"))
    settings._current = None
    found = chosen.disk(settings.current())
    assert found is not None
    for key in KEYS:
        found.put(key, Entry(key.encode(), b"", pickle.dumps((ProcessState.capture(set()), {}))))
    profile.write(found, [profile.Use(key, "f", 1) for key in KEYS], [])
    return found


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The artifacts that are loaded, in order."""
    seen: list[str] = []
    monkeypatch.setattr(load, "prepare", lambda: None)
    monkeypatch.setattr(load, "load", lambda artifact, *a, **k: seen.append(artifact.decode()) or artifact)
    return seen


Soon = list[Callable[[], None]]


def test_all_of_it_is_loaded_in_order_and_taken_once(store: Disk, loaded: list[str]) -> None:
    uses, soon = reuse.Uses(), Soon()
    assert uses.prepare(soon.append)
    assert uses.prepare(soon.append), "a second question has the same answer"
    assert len(soon) == 3
    for one in soon:
        one()
    assert loaded == KEYS
    place = reuse.Place(store, KEYS[1])
    assert uses.take(place) == KEYS[1].encode()
    assert uses.take(place) is None


def test_nothing_more_is_loaded_once_the_program_asks(store: Disk, loaded: list[str]) -> None:
    uses, soon = reuse.Uses(), Soon()
    uses.prepare(soon.append)
    soon[0]()
    uses.begins()
    soon[1]()
    assert loaded == KEYS[:1]


def test_what_is_missing_is_told(store: Disk, loaded: list[str]) -> None:
    store.remove(KEYS[2])
    uses, soon = reuse.Uses(), Soon()
    assert not uses.prepare(soon.append)
    assert len(soon) == 2


def test_what_cannot_be_loaded_is_passed_over(
    store: Disk, loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no")

    monkeypatch.setattr(load, "load", fail)
    uses, soon = reuse.Uses(), Soon()
    assert uses.prepare(soon.append)
    soon[0]()
    assert uses.take(reuse.Place(store, KEYS[0])) is None


def test_code_for_a_gpu_waits_until_the_program_has_initialised_it(store: Disk, loaded: list[str]) -> None:
    loading = pickle.dumps((ProcessState.capture({"cuda"}), {}))
    store.put(KEYS[0], Entry(b"of a GPU", b"", loading))
    uses, soon = reuse.Uses(), Soon()
    uses.prepare(soon.append)
    for one in soon:
        one()
    assert loaded == [*(["of a GPU"] if torch.cuda.is_initialized() else []), *KEYS[1:]]


@pytest.mark.parametrize(
    "note",
    [b"", b"{", b"[]", b"3", b'{"uses": 3}', b'{"uses": [["key"]]}', b'{"uses": [["key", "f", "many"]]}', b"\xff"],
)
def test_a_damaged_profile_is_none(store: Disk, note: bytes) -> None:
    store.keep_note(profile._name(), note)
    assert profile.read(store) == profile.Profile("", [], [])
    assert not reuse.Uses().prepare(Soon().append)


def test_a_content_is_taken_once_and_only_whole(store: Disk) -> None:
    profile.keep_content(store, KEYS[0], b"content", {"s0": 7})
    assert profile.take_content(store, KEYS[0]) == (b"content", {"s0": 7})
    assert profile.take_content(store, KEYS[0]) is None
    profile.keep_content(store, KEYS[0], b"content", {})
    whole = store.note(KEYS[0])
    assert whole is not None
    store.keep_note(KEYS[0], whole[:-1])
    assert profile.take_content(store, KEYS[0]) is None
    store.keep_note(KEYS[1], whole)
    assert profile.take_content(store, KEYS[1]) is None, "it is another's"


# --- In the life of a frame ---


def nobody_reads_code() -> Any:
    """Take away pytest's handlers, which listen to all that PyTorch traces."""
    return mock.patch.object(logs.trace_log, "handlers", [])


@pytest.fixture
def warm(store: Disk) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function whose compiled code is in the store; Dynamo has forgotten it."""

    def function(x: torch.Tensor) -> torch.Tensor:
        return x.sin() * 3

    with nobody_reads_code():
        torch.compile(function, backend="frame_swap")(torch.ones(3))
    frame_swap.wait()
    torch._dynamo.reset()
    return function


def rows(settings_: dict[str, Any], function: Callable[..., Any]) -> list[tuple[State, str]]:
    frame_swap.configure(**settings_)
    compiled = torch.compile(function, backend="frame_swap")
    x = torch.ones(3)
    with nobody_reads_code():
        assert torch.allclose(compiled(x), x.sin() * 3)
    return [(row.state, row.store) for row in frame_swap.report().regions][1:]


@pytest.mark.parametrize(
    ("wished", "expected"),
    [
        ({"when": "ready"}, (State.INSTALLED, "found")),
        ({"when": "wait"}, (State.INSTALLED, "found")),
        ({"when": "never"}, (State.EAGER, "")),
        ({"when": "ready", "store": "off"}, (State.PENDING, "")),
        ({"when": "ready", "verify": 1}, (State.INSTALLED, "found")),
    ],
)
def test_what_a_first_call_finds(
    warm: Callable[..., Any], wished: dict[str, Any], expected: tuple[State, str]
) -> None:
    assert rows(wished, warm) == [expected]


def test_when_manual_the_program_says_when(warm: Callable[..., Any]) -> None:
    assert rows({"when": "manual"}, warm)[0][0] in (State.PENDING, State.READY)
    frame_swap.wait()
    assert [(row.state, row.store) for row in frame_swap.report().regions][1:] == [(State.READY, "found")]
    frame_swap.swap()
    assert frame_swap.report().regions[1].state is State.INSTALLED


def test_code_that_computes_something_else_is_not_kept(
    warm: Callable[..., Any], store: Disk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`verify` has found it; a run without `verify` would take it from the store."""
    usual = load.load

    def wrong(*args: Any, **keywords: Any) -> Compiled:
        compiled = usual(*args, **keywords)
        return compiled._replace(call=lambda *inputs: [out + 1 for out in compiled.call(*inputs)], boxed=None)

    kept = {one.key for one in store.artifacts()} - set(KEYS)
    assert len(kept) == 1
    monkeypatch.setattr(load, "load", wrong)
    with pytest.warns(FrameSwapWarning, match="not what eager code computes"):
        assert rows({"verify": 1, "repro_dir": str(tmp_path)}, warm) == [(State.REJECTED, "found")]
    assert {one.key for one in store.artifacts()} == set(KEYS)
