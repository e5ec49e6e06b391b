"""Fixtures of the tests of stores."""

from __future__ import annotations

from pathlib import Path

import pytest

from frame_swap.artifacts.store.disk import Disk

from .holder import store_in


@pytest.fixture
def store(tmp_path: Path) -> Disk:
    """An empty store."""
    return store_in(tmp_path / "store")
