"""Options, marks and fixtures that all tests share."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import DEVICE

from frame_swap import errors, region, settings
from frame_swap.region import attempt, record

SUBSETS = {"--quick": {"quick"}, "--fast": {"quick", "fast"}}
"""Options that select tests by their marks."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked long or thorough, too")
    parser.addoption("--thorough", action="store_true", help="run the tests marked thorough, too")
    parser.addoption("--quick", action="store_true", help="run only tests marked quick: under two minutes")
    parser.addoption("--fast", action="store_true", help="run only tests marked quick or fast: under eight minutes")
    parser.addoption("--first", choices=("graph", "pair"), help="the setting `first` for tests that do not choose")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    thorough = config.getoption("--thorough") or config.getoption("--long")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none is here"))
        if item.get_closest_marker("long") and not config.getoption("--long"):
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with --long"))
        if item.get_closest_marker("thorough") and not thorough:
            item.add_marker(pytest.mark.skip(reason="a longer way to what others show; run with --thorough"))
    for option, marks in SUBSETS.items():
        if config.getoption(option):
            selected = {item for item in items if any(mark.name in marks for mark in item.iter_markers())}
            config.hook.pytest_deselected(items=[item for item in items if item not in selected])
            items[:] = [item for item in items if item in selected]


@pytest.fixture(autouse=True)
def clean_slate(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> Iterator[None]:
    """Start each test without compiled frames and regions, with default settings and seeded random numbers."""
    for variable in ("DISABLE", *(field.name.upper() for field in dataclasses.fields(settings.Settings))):
        monkeypatch.delenv(f"FRAME_SWAP_{variable}", raising=False)
    monkeypatch.setenv("FRAME_SWAP_STORE", "off")  # a test is to compile what it says
    settings._current = None
    if first := pytestconfig.getoption("--first"):
        monkeypatch.setenv("FRAME_SWAP_FIRST", first)
    monkeypatch.setenv(attempt.STRICT, "1")
    torch._dynamo.reset()
    record.forget_all()
    torch.manual_seed(0)
    yield
    for one in region.records():
        one.abandon("the test is over")
    settings._current = None


@pytest.fixture
def unpadded() -> Iterator[None]:
    """Keep Inductor from padding matmuls, as it does on a GPU if that is faster: padding changes strides."""
    with torch._inductor.config.patch(shape_padding=False):
        yield


@pytest.fixture
def device() -> str:
    """The device of tests that do not choose one."""
    return DEVICE


@pytest.fixture
def run_program() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run source text as a program; unless `check` is false, a program that fails fails the test."""

    def run(source: str, *, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(source)],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, **environment},
        )
        if check and done.returncode != 0:
            pytest.fail(f"the program ended with {done.returncode}:\n{done.stderr[-4000:]}")
        return done

    return run


@pytest.fixture
def no_warnings() -> Iterator[None]:
    """Turn frame-swap's warnings into errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", errors.FrameSwapWarning)
        yield
