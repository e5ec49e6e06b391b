"""On a CUDA device: compiled code launches its kernels without Inductor's `run`, unless somebody looks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import frame_swap
from frame_swap import State
from frame_swap.internals import launches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(launches._heuristics() is None, reason="needs Triton, and a torch before 2.13"),
]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of kernels that Inductor's `run` has launched."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    names: list[str] = []
    run = CachingAutotuner.run

    def note(kernel: CachingAutotuner, *args: object, **options: object) -> object:
        names.append(kernel.inductor_meta["kernel_name"])
        return run(kernel, *args, **options)

    monkeypatch.setattr(CachingAutotuner, "run", note)
    return names


def function(x: Tensor, w: Tensor) -> Tensor:
    normal = torch.nn.functional.layer_norm((x @ w).softmax(-1) + x.sum(0), w.shape[:1])
    return torch.nn.functional.gelu(normal).square().sum(-1)


def gradients(call: object, x: Tensor, w: Tensor) -> list[Tensor]:
    out = call(x, w)  # type: ignore[operator]
    return [out, *torch.autograd.grad(out.sum(), (x, w))]


def test_training_with_any_number_of_rows(runs: list[str]) -> None:
    w = torch.randn(64, 64, device="cuda", requires_grad=True)
    xs = [torch.randn(rows, 64, device="cuda", requires_grad=True) for rows in (7, 128, 5000, 70001)]
    gradients(torch.compile(function, dynamic=True), xs[0], w)
    assert len(runs) >= 2  # they can be seen
    torch._dynamo.reset()

    compiled = torch.compile(function, dynamic=True, backend="frame_swap")
    gradients(compiled, xs[0], w)
    frame_swap.wait()
    gradients(compiled, xs[0], w)
    runs.clear()
    for x in xs:
        for ours, eager in zip(gradients(compiled, x, w), gradients(function, x, w), strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-3 * float(eager.abs().max()))
    assert runs == []
    assert [r.state for r in frame_swap.report().regions] == [State.INSTALLED]


def test_a_profiler_sees_what_it_sees_of_stock(runs: list[str]) -> None:
    x, w = (torch.randn(64, 64, device="cuda") for _ in range(2))

    def profiled(backend: str) -> list[str]:
        torch._dynamo.reset()
        compiled = torch.compile(function, backend=backend)
        compiled(x, w)
        frame_swap.wait()
        compiled(x, w)
        runs.clear()
        with torch.profiler.profile() as profile:
            compiled(x, w)
        assert runs
        names = sorted(event.name for event in profile.events() if event.name.startswith("triton_"))
        runs.clear()
        compiled(x, w)
        return names

    expected = profiled("inductor")
    assert expected
    assert runs
    assert profiled("frame_swap") == expected
    assert runs == []


def test_a_kernel_with_a_long_name(runs: list[str]) -> None:
    """Triton cuts the name of its file, and PyTorch's launcher would not find it."""

    def long(x: Tensor) -> Tensor:
        for name in (
            "sin",
            "cos",
            "tanh",
            "sigmoid",
            "exp",
            "erf",
            "abs",
            "sqrt",
            "reciprocal",
            "expm1",
            "log1p",
            "atan",
        ):
            x = getattr(torch, name)(x)
        for name in (
            "softplus",
            "hardswish",
            "hardsigmoid",
            "leaky_relu",
            "gelu",
            "silu",
            "mish",
            "hardtanh",
            "logsigmoid",
        ):
            x = getattr(torch.nn.functional, name)(x)
        return x

    x = torch.rand(5, 64, device="cuda")
    torch.compile(long)(x)
    assert len(runs[0]) > 150
    torch._dynamo.reset()

    compiled = torch.compile(long, backend="frame_swap")
    compiled(x)
    frame_swap.wait()
    runs.clear()
    torch.testing.assert_close(compiled(x), long(x), rtol=1e-3, atol=1e-3)
    assert runs == []


def test_a_second_gpu(runs: list[str]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, w = (torch.randn(64, 64, device="cuda:1") for _ in range(2))
    compiled = torch.compile(function, backend="frame_swap")
    compiled(x, w)
    frame_swap.wait()
    torch.testing.assert_close(compiled(x, w), function(x, w), rtol=1e-3, atol=1e-2)
    assert torch.cuda.current_device() == 0
    assert runs == []
