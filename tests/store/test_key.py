"""The key of an artifact changes with what its compile depends on, and with nothing else.

tests/shipping has what changes the content of a parcel; the digest of that is a part of the key.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from frame_swap.artifacts.store import key
from frame_swap.shipping.parcel import Parcel
from frame_swap.shipping.process_state import ProcessState

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    """What is looked up once for a process is looked up anew."""
    key.installation.cache_clear()
    yield
    key.installation.cache_clear()


@pytest.fixture
def parcel() -> Parcel:
    return Parcel(b"content", b"envelope", ProcessState.capture(set()), {}, "digest of the content")


Change = Callable[[pytest.MonkeyPatch], None]
CHANGES: dict[str, Change] = {
    "torch": lambda patch: patch.setattr(torch, "__version__", "2.99"),
    "torch's build": lambda patch: patch.setattr(torch.version, "git_version", "0"),
    "CUDA": lambda patch: patch.setattr(torch.version, "cuda", "99"),
    "Triton, SymPy or NumPy": lambda patch: patch.setattr(key, "_version", lambda name: "99"),
    "Python": lambda patch: patch.setattr(key.sys, "version", "3.99"),
    "the C library": lambda patch: patch.setattr(os, "confstr", lambda name: "glibc 99"),
    "instructions": lambda patch: patch.setattr(torch.cpu, "get_capabilities", lambda: {"avx99": True}),
    "frame-swap": lambda patch: patch.setattr(key, "_own_code", lambda: "another"),
    "the compiler": lambda patch: patch.setattr(key.inductor, "cpp_compilers", lambda: ["sh"]),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_compiles_is_part_of_the_key(parcel: Parcel, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key.key_of(parcel)
    CHANGES[what](monkeypatch)
    key.installation.cache_clear()
    assert key.key_of(parcel) != before
    monkeypatch.undo()
    key.installation.cache_clear()
    assert key.key_of(parcel) == before


def test_the_gpu_is_part_of_the_key_where_an_input_is_on_one(
    parcel: Parcel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key, "_gpu", lambda: ["one", 9, 0, 132])
    on_cpu = key.key_of(parcel)
    of_gpu = parcel._replace(state=ProcessState.capture({"cuda"}))
    on_gpu = key.key_of(of_gpu)
    monkeypatch.setattr(key, "_gpu", lambda: ["another", 8, 0, 108])
    assert key.key_of(parcel) == on_cpu
    assert key.key_of(of_gpu) != on_gpu


def test_content_and_settled_sizes_are_part_of_the_key(parcel: Parcel) -> None:
    keys = [key.key_of(parcel), key.key_of(parcel._replace(digest="another"))]
    keys += [key.key_of(parcel, sizes) for sizes in ({"s0": 7}, {"s0": 8}, {"s1": 7})]
    assert len(set(keys)) == len(keys)
    assert key.key_of(parcel, {}) == keys[0]


def test_who_asks_is_no_part_of_the_key(parcel: Parcel) -> None:
    assert key.key_of(parcel._replace(envelope=b"another")) == key.key_of(parcel)


def test_a_compiler_that_was_replaced_changes_the_key(
    parcel: Parcel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("one")
    compiler.chmod(0o700)
    monkeypatch.setattr(key.inductor, "cpp_compilers", lambda: [str(compiler)])
    before = key.key_of(parcel)
    compiler.write_text("another")
    assert key.key_of(parcel) != before
    compiler.unlink()
    assert key.key_of(parcel) != before


def test_a_change_of_any_file_of_frame_swap_changes_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "frame_swap"
    (package / "artifacts" / "store").mkdir(parents=True)
    (package / "backend.py").write_text("x = 1")
    monkeypatch.setattr(key, "__file__", str(package / "artifacts" / "store" / "key.py"))
    before = key._own_code()
    (package / "backend.py").write_text("x = 2")
    assert key._own_code() != before
