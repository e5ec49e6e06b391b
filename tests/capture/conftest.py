"""Which tests of capture in the background can run here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from frame_swap.internals import read_log

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not read_log.is_possible():
        reason = (
            f"capture in the background needs the guards' predicates of torch 2.13; this is {torch.__version__}"
        )
    elif torch.cuda.is_available():
        reason = "Dynamo initialises CUDA where there is a GPU, and then frames are captured in their calls"
    else:
        return
    for item in items:
        if item.path.parent == HERE and item.path.name != "test_read_log.py":
            item.add_marker(pytest.mark.skip(reason=reason))
