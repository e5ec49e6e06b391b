"""Artifacts that are damaged, made for another environment, or kept too long."""

from __future__ import annotations

import dataclasses
import gc
import json
import pickle
import re
import sys
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from helpers import live

import frame_swap
from frame_swap import State, delivery, errors
from frame_swap.artifacts import load, seal
from frame_swap.farm.protocol import Outcome
from frame_swap.farm.workers import workers

from .harness import survives

pytestmark = pytest.mark.fast


class Damaging:
    """An executor that damages the artifacts that the workers send."""

    def __init__(self, damage: Callable[[bytes], bytes]) -> None:
        self._damage = damage

    def submit(self, call: Callable[[], Outcome]) -> Future[Outcome]:
        damaged: Future[Outcome] = Future()

        def pass_on(done: Future[Outcome]) -> None:
            outcome = done.result()
            assert outcome.artifact is not None
            damaged.set_result(dataclasses.replace(outcome, artifact=self._damage(outcome.artifact)))

        workers.submit(call).add_done_callback(pass_on)
        return damaged


def made_for(**changes: Any) -> Callable[[bytes], bytes]:
    """Change the environment that an artifact's header names."""

    def change(sealed: bytes) -> bytes:
        header, _, content = sealed.partition(b"\n")
        return json.dumps(json.loads(header) | changes).encode() + b"\n" + content

    return change


HERE = seal.made_for()

DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (lambda sealed: sealed[:-1], r"is not whole: \d+ of \d+ bytes; the next run compiles it again"),
    "truncated at the start": (lambda sealed: sealed[:20], "has no valid header"),
    "empty": (lambda sealed: b"", "has no valid header"),
    "corrupted": (
        lambda sealed: sealed[:-9] + bytes([sealed[-9] ^ 1]) + sealed[-8:],
        "was changed after it was made",
    ),
    "no artifact": (lambda sealed: pickle.dumps([1]), "has no valid header"),
    "another frame-swap": (made_for(**{"frame-swap artifact": 0}), "of another frame-swap"),
    "another torch": (made_for(torch="2.6.0"), r"made for torch 2\.6\.0, here is .*executor=None"),
    "another Python": (made_for(python="cpython-39"), "made for python cpython-39"),
    "another architecture": (made_for(architecture="riscv64"), "made on a CPU that is of architecture riscv64"),
    "another instruction set": (
        made_for(instructions=[*HERE["instructions"], "avx1024"]),
        "made on a CPU that has avx1024, unlike this one; .*executor=None",
    ),
}


GPUS = {"0": "sm_90"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"GPUs": {"0": "sm_80"}}, "GPU 0 with architecture sm_80, here is sm_90; .*executor=None"),
        ({"GPUs": {"1": "sm_90"}}, "GPU 1 with architecture sm_90, here is none"),
        ({"driver": "12040"}, "GPU driver 12040, here is 13000; .*executor=None"),
    ],
)
def test_code_for_another_gpu_or_driver_is_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str
) -> None:
    monkeypatch.setattr(seal.gpu, "architecture", lambda index: GPUS.get(str(index), "none"))
    monkeypatch.setattr(seal.gpu, "driver", lambda: "13000")
    sealed = seal.seal(pickle.dumps(Bomb()), gpus=[0])
    with pytest.raises(pytest.fail.Exception):
        pickle.loads(seal.unseal(sealed))
    with pytest.raises(errors.UnusableArtifact, match=words):
        seal.unseal(made_for(**changes)(sealed))


class Bomb:
    """Raises when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("it was unpickled",)


@pytest.mark.parametrize("damage", DAMAGES)
def test_nothing_of_a_damaged_artifact_is_unpickled(damage: str) -> None:
    spoil, words = DAMAGES[damage]
    sealed = seal.seal(pickle.dumps(Bomb()))
    with pytest.raises(pytest.fail.Exception):
        pickle.loads(seal.unseal(sealed))
    with pytest.raises(errors.UnusableArtifact, match=words):
        seal.unseal(spoil(sealed))


def test_code_for_fewer_instructions_than_there_are_is_accepted() -> None:
    sealed = made_for(instructions=[])(seal.seal(b"content"))
    assert bytes(seal.unseal(sealed)) == b"content"


@pytest.mark.parametrize("damage", ["truncated", "corrupted", "another torch", "another instruction set"])
def test_a_damaged_artifact_leaves_the_pair(damage: str) -> None:
    spoil, words = DAMAGES[damage]
    frame_swap.configure(executor=Damaging(spoil))
    region = survives(lambda x: x.sin() + 20, "its artifact", "; ", state=State.REJECTED)
    assert re.search(words, region.reason)


@pytest.mark.parametrize("when", ["ready", "wait"])
@pytest.mark.parametrize("delay", [0.0, 0.01])
def test_the_bytes_of_an_artifact_go_when_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, when: Any, delay: float
) -> None:
    """They go without the garbage collector."""
    seen = []
    usual = load.load
    monkeypatch.setattr(load, "load", lambda sealed, *a, **k: (seen.append(sealed), usual(sealed, *a, **k))[1])
    frame_swap.configure(when=when, delay=delay)
    x = torch.randn(4, requires_grad=True)
    compiled = torch.compile(lambda x: (x.sin() + 21).sum(), backend="frame_swap")
    gc.collect()
    gc.disable()
    try:
        compiled(x).backward()
        (region,) = live(frame_swap.wait())
        idle()
    finally:
        gc.enable()
    assert region.state is State.INSTALLED
    (sealed,) = seen
    del seen[:]
    assert region.artifact_bytes == len(sealed)
    assert sys.getrefcount(sealed) == 2, [type(one) for one in gc.get_referrers(sealed)]


def idle() -> None:
    """Wait until no thread is at work on a compile."""
    loader = delivery.service._loader
    if loader is not None:
        loader.submit(int).result()
    frame_swap.configure(executor=None)
    workers.submit(int).result()
