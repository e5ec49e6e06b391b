"""On a CUDA device: values and gradients equal eager's, before, during and after the swap; workers' GPU memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Subject, Wrap, live, through_swap, until
from torch import Tensor, nn

import frame_swap
from frame_swap import State
from frame_swap.farm.local import pool
from frame_swap.farm.workers import workers
from frame_swap.internals import gpu

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("unpadded")]

TOLERANCE = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2},
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
}
"""Inductor computes chains of operators in float32, and rounds less often than eager."""


def convolutions() -> nn.Module:
    """Without the bias before the normalisation: its gradient is nothing but rounding."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten(), nn.Linear(8 * 36, 5)
    )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_training_in_each_precision(dtype: torch.dtype, channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def make(wrap: Wrap) -> Subject:
        model = convolutions().to(dtype).to(memory_format=layout)  # type: ignore[call-overload]
        inputs = [lambda: (torch.rand(4, 3, 8, 8, dtype=dtype).to(memory_format=layout).requires_grad_(),)]
        return Subject(wrap(model), inputs, model, TOLERANCE[dtype])

    through_swap(make, device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    def make(wrap: Wrap) -> Subject:
        model = convolutions()
        compiled = wrap(model)

        def call(x: Tensor) -> Tensor:
            with torch.autocast("cuda", dtype):
                out: Tensor = compiled(x)
                return out

        return Subject(call, [lambda: (torch.rand(4, 3, 8, 8, requires_grad=True),)], model, TOLERANCE[dtype])

    through_swap(make, device="cuda")


def test_calls_on_several_streams_with_kernels_in_flight_at_the_swap() -> None:
    """Nothing is synchronised between calls: the swap comes while kernels of eager code run."""
    model = nn.Sequential(nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 512)).cuda()
    compiled = torch.compile(model, backend="frame_swap")
    streams = [torch.cuda.Stream() for _ in range(3)]
    inputs = [torch.rand(512, 512, device="cuda") for _ in streams]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
    torch.cuda.synchronize()
    results: list[tuple[int, Tensor]] = []

    def swapped() -> bool:
        for at, stream in enumerate(streams):
            with torch.cuda.stream(stream), torch.no_grad():
                y = inputs[at]
                results.append((at, compiled(y)))
        del results[:-300]
        return bool(live(frame_swap.report())[0].state is State.INSTALLED)

    until(swapped)
    for _ in range(20):
        swapped()
    torch.cuda.synchronize()
    for at, result in results:
        torch.testing.assert_close(result, expected[at], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs; one or none is here")
def test_a_second_gpu_is_handled_as_by_stock() -> None:
    def function(x: Tensor) -> Tensor:
        return (x.sin() * 2).softmax(-1)

    compiled = torch.compile(function, backend="frame_swap")
    for _ in range(2):
        for index in (0, 1):
            x = torch.rand(64, 64, device=f"cuda:{index}")
            torch.testing.assert_close(compiled(x), function(x))
        frame_swap.wait()
    assert {region.state for region in live(frame_swap.report())} == {State.INSTALLED}


SCRIPT = """
import torch, triton, triton.language as tl, frame_swap

SCALE: tl.constexpr = tl.constexpr(3)

@triton.jit
def scaled(a):
    return a * SCALE

@triton.autotune(configs=[triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 256})], key=["n"])
@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, scaled(tl.load(x + at, at < n)) + tl.load(y + at, at < n), at < n)

@triton.jit
def times(x, out, n, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, at < n) * factor, at < n)

class Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        out = torch.empty_like(x)
        add[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, y, out, x.numel())
        return out

    @staticmethod
    def backward(ctx, grad):
        dx = torch.empty_like(grad)
        times[(triton.cdiv(grad.numel(), 128),)](grad, dx, grad.numel(), 3.0, BLOCK=128)
        return dx, grad

def model(x, y):
    return Add.apply(x.sin(), y.cos()) * 2

def check(call):
    x, y = (torch.rand(1000, device="cuda", requires_grad=True) for _ in range(2))
    call(x, y).sum().backward()
    torch.testing.assert_close(x.grad, 6 * x.cos())
    torch.testing.assert_close(y.grad, -2 * y.sin())
    torch.testing.assert_close(call(x, y), (3 * x.sin() + y.cos()) * 2)

if __name__ == "__main__":
    compiled = torch.compile(model, backend="frame_swap", fullgraph=True)
    check(compiled)
    report = frame_swap.wait()
    check(compiled)
    print(*((region.state, region.reason) for region in report.regions))
"""


def test_triton_kernels_of_main_are_shipped_forward_and_backward(tmp_path: Path) -> None:
    """Autotuned ones too, and those that they call."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "(<State.INSTALLED: 'installed'>, '')"


def test_an_idle_worker_holds_no_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "GPU_IDLE", 0.5)
    frame_swap.configure(workers=1)
    compiled = torch.compile(lambda x: x.sin() + 1, backend="frame_swap")
    compiled(torch.rand(8, device="cuda"))
    frame_swap.wait()
    (busy,) = workers.pids()
    until(lambda: workers.pids() not in ([busy], []))
    assert not workers.submit(gpu.is_in_use).result(), "the one that took its place has not compiled"


def test_both_tiers(no_warnings: None) -> None:
    model = nn.Linear(256, 256).cuda().half()
    compiled: Any = torch.compile(model, backend="frame_swap", mode="max-autotune")
    x = torch.rand(64, 256, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        for _ in range(1000):
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(x), model(x), **TOLERANCE[torch.float16])
            frame_swap.wait()
            (region,) = live(frame_swap.report())
            if region.compiles[-1].state in (State.INSTALLED, State.REJECTED) and len(region.compiles) == 2:
                break
    assert [one.autotuned for one in region.compiles] == [False, True]
    assert [one.state for one in region.compiles] in (
        [State.REPLACED, State.INSTALLED],
        [State.INSTALLED, State.REJECTED],
    )
