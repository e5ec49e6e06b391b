"""`enable()`: `torch.compile` with its default backend means frame-swap; everything else stays what it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import live

import frame_swap
from frame_swap import State


def f(x: torch.Tensor) -> torch.Tensor:
    return (x.sin() @ x).relu()


def regions() -> list[Any]:
    return live(frame_swap.wait())


@pytest.mark.parametrize(
    "keywords",
    [{}, {"backend": "inductor"}, {"mode": "max-autotune-no-cudagraphs"}, {"options": {"epilogue_fusion": False}}],
    ids=["default", "inductor", "mode", "options"],
)
def test_the_default_backend_is_frame_swap(keywords: dict[str, Any]) -> None:
    frame_swap.configure(tiers="one")
    x = torch.randn(4, 4)
    with frame_swap.enable():
        compiled = torch.compile(f, **keywords)
    torch.testing.assert_close(compiled(x), f(x))
    (region,) = regions()
    assert region.state is State.INSTALLED
    assert region.compiles[0].autotuned is (keywords.get("mode") == "max-autotune-no-cudagraphs")


def test_dynamic_and_fullgraph_mean_the_same() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + 1

    with frame_swap.enable():
        compiled = torch.compile(f, dynamic=True, fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(broken, fullgraph=True)(torch.randn(3))
    for size in (4, 5, 6):
        compiled(torch.randn(size, size))
    assert len(regions()) == 1


@pytest.mark.fast
def test_other_backends_stay() -> None:
    seen: list[torch.fx.GraphModule] = []

    def own(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append(gm)
        return gm.forward

    with frame_swap.enable():
        torch.compile(f, backend="eager")(torch.randn(4, 4))
        torch.compile(f, backend=own)(torch.randn(5, 5))
    assert len(seen) == 1
    assert regions() == []


@pytest.mark.parametrize(
    "keywords", [{"mode": "none-such"}, {"options": {"none_such": 1}}], ids=["a mode", "an option"]
)
def test_what_inductor_refuses_is_refused_as_by_it(keywords: dict[str, Any]) -> None:
    def message() -> str:
        with pytest.raises(RuntimeError) as raised:
            torch.compile(f, **keywords)
        return str(raised.value)

    stock = message()
    with frame_swap.enable():
        assert message() == stock


@pytest.mark.fast
def test_the_end_of_the_last_block_brings_inductor_back() -> None:
    inductor = torch._TorchCompileInductorWrapper
    before = inductor("default", None, None)
    with frame_swap.enable():
        with frame_swap.enable():
            pass
        assert torch._TorchCompileInductorWrapper is not inductor
        assert before == inductor("default", None, None)  # torch asks with isinstance
    assert torch._TorchCompileInductorWrapper is inductor


@pytest.mark.fast
def test_what_a_block_has_made_stays() -> None:
    with frame_swap.enable():
        compiled = torch.compile(f)
    compiled(torch.randn(4, 4))
    assert [region.state for region in regions()] == [State.INSTALLED]


PROGRAM = """
import sys, torch
torch.compile(lambda x: x.sin() + 1)(torch.ones(3))
print("frame-swap" if "frame_swap.backend" in sys.modules else "stock")
"""


@pytest.mark.parametrize(
    ("value", "printed"),
    [("1", "frame-swap"), *(pytest.param(value, "stock", marks=pytest.mark.thorough) for value in ("0", ""))],
)
def test_the_variable_enables_it(value: str, printed: str, tmp_path: Path) -> None:
    environment = os.environ | {"FRAME_SWAP": value, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    if not value:
        del environment["FRAME_SWAP"]
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == printed
    assert "frame" not in run.stderr  # torch may say something of its own


def test_the_variable_starts_no_worker_before_torch_compile() -> None:
    program = "import torch, psutil; print(len(psutil.Process().children(recursive=True)))"
    environment = os.environ | {"FRAME_SWAP": "1"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (run.stdout.strip(), run.stderr) == ("0", "")


@pytest.mark.parametrize("first", ["torch, frame_swap", "frame_swap, torch"])
def test_an_import_starts_a_worker_whichever_is_first(first: str) -> None:
    program = f"""
import {first}, sys
print([name for name in ("rich", "matplotlib", "IPython") if name in sys.modules])
from frame_swap.farm.workers import workers
print(len(workers.pids()) if workers.pool is not None else "none was started")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.stdout.split("\n")[:2], run.stderr) == (["[]", "1"], "")
