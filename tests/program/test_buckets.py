"""DDP splits a graph at its gradient buckets while Dynamo holds the frame: each part swaps, when its code comes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed

PROGRAM = """
import copy, tempfile, torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import frame_swap

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512))

    def forward(self, x):
        return self.layers(x)

with tempfile.NamedTemporaryFile() as file:
    dist.init_process_group("gloo", init_method="file://" + file.name, rank=0, world_size=1)
    torch.manual_seed(0)
    plain = Model()
    models = [DistributedDataParallel(one, bucket_cap_mb=1) for one in (plain, copy.deepcopy(plain))]
    models[0] = torch.compile(models[0], backend="frame_swap")
    for step in range(3):
        x = torch.randn(8, 512)
        for model in models:
            model.zero_grad()
            model(x).sum().backward()
        for ours, theirs in zip(*(model.parameters() for model in models)):
            torch.testing.assert_close(ours.grad, theirs.grad)
        report = frame_swap.wait(progress=False)
    print(*((region.state, region.store or "-") for region in report.regions))
    dist.destroy_process_group()
"""

needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)


def swapped(store: str) -> str:
    return f"('installed', '{store}') ('installed', '{store}')".replace(
        "'installed'", "<State.INSTALLED: 'installed'>"
    )


@pytest.mark.thorough
@needs_gloo
def test_each_bucket_swaps_in_a_first_run_and_in_a_second(run_program: Callable[..., Any], tmp_path: Path) -> None:
    for store in ("kept", "found"):
        assert run_program(PROGRAM, FRAME_SWAP_STORE=str(tmp_path)).stdout.strip() == swapped(store)


@needs_gloo
@pytest.mark.parametrize(
    "setting",
    [
        pytest.param({"FRAME_SWAP_WHEN": "wait"}, marks=pytest.mark.thorough),
        pytest.param({"FRAME_SWAP_FIRST": "pair"}, marks=pytest.mark.long),
    ],
    ids=["wait", "pair"],
)
def test_each_bucket_swaps_as_it_is_told_to(setting: dict[str, str], run_program: Callable[..., Any]) -> None:
    assert run_program(PROGRAM, FRAME_SWAP_STORE="off", **setting).stdout.strip() == swapped("-")
