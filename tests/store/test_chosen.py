"""Which store is in force."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from frame_swap import settings
from frame_swap.artifacts import folders
from frame_swap.artifacts.store import chosen
from frame_swap.errors import FrameSwapWarning

pytestmark = pytest.mark.quick


def test_it_is_below_inductors_cache_folder_unless_a_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(folders.INDUCTOR, str(tmp_path / "cache"))
    on = chosen.store(settings.Settings(store="on"))
    assert on is not None
    assert on.folder == str(tmp_path / "cache" / "frame_swap")  # type: ignore[attr-defined]
    monkeypatch.setenv("HOME", str(tmp_path))
    named = chosen.disk(settings.Settings(store="~/named"))
    assert named is not None
    assert named.folder == str(tmp_path / "named")
    assert chosen.store(settings.Settings(store="off")) is None


def test_there_is_none_where_the_program_wants_no_caches(tmp_path: Path) -> None:
    named = settings.Settings(store=str(tmp_path / "store"))
    assert chosen.store(named) is not None
    with torch._inductor.config.patch(force_disable_caches=True):
        assert chosen.store(named) is None


@pytest.mark.parametrize("value", ["", 3, None])
def test_a_value_that_names_no_store_is_an_error(value: object) -> None:
    with pytest.raises(ValueError, match='give "on", "off" or a folder'):
        settings.Settings(store=value)  # type: ignore[arg-type]


def unsafe(tmp_path: Path, spoil: Callable[[Path], object]) -> str:
    folder = tmp_path / "unsafe"
    folder.mkdir(mode=0o700)
    spoil(folder)
    return str(folder)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_can_write_to_is_no_store(tmp_path: Path, mode: int) -> None:
    folder = unsafe(tmp_path, lambda folder: folder.chmod(mode))
    with pytest.warns(FrameSwapWarning, match="is writable for others; set FRAME_SWAP_STORE"):
        assert chosen.in_folder(folder, 1e9) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away")
def test_a_folder_of_another_user_is_no_store(tmp_path: Path) -> None:
    folder = unsafe(tmp_path, lambda folder: os.chown(folder, 12345, -1))
    with pytest.warns(FrameSwapWarning, match="belongs to user 12345"):
        assert chosen.in_folder(folder, 1e9) is None
