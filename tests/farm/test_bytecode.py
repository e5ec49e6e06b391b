"""A worker keeps bytecode where the program keeps none; elsewhere nothing changes."""

from __future__ import annotations

import importlib.util
import os
import stat
import sys
import types
from pathlib import Path

import pytest

from frame_swap.farm.local import bytecode

pytestmark = pytest.mark.quick


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user whose programs keep no bytecode, with a torch that has none."""
    spec = types.SimpleNamespace(cached=str(tmp_path / "torch" / "__pycache__" / "__init__.pyc"))
    (tmp_path / "torch").mkdir()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", "")
    return tmp_path


def test_it_is_kept_in_a_folder_of_the_users(home: Path) -> None:
    bytecode.keep()
    folder = home / "cache" / "frame_swap" / "bytecode"
    assert sys.pycache_prefix == os.environ["PYTHONPYCACHEPREFIX"] == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not sys.dont_write_bytecode
    assert "PYTHONDONTWRITEBYTECODE" not in os.environ


def test_where_torch_has_its_own_nothing_changes(home: Path) -> None:
    (home / "torch" / "__pycache__").mkdir()
    (home / "torch" / "__pycache__" / "__init__.pyc").touch()
    bytecode.keep()
    assert sys.pycache_prefix is None
    assert sys.dont_write_bytecode


def test_where_it_would_be_written_nothing_changes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    bytecode.keep()
    assert sys.pycache_prefix is None


def test_a_folder_that_others_can_write_to_is_not_used(home: Path) -> None:
    unsafe = home / "cache" / "frame_swap" / "bytecode"
    unsafe.mkdir(parents=True)
    unsafe.chmod(0o777)
    bytecode.keep()
    assert sys.pycache_prefix is None
