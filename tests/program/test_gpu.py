"""On a CUDA device: Triton kernels, CUDA graphs and a real model's training through its swap."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faulty
import pytest
import torch
from faults import Fault
from faults.harness import fresh_workers, plant, survives, works
from helpers import Subject, Wrap, is_direct, live, swap_all, through_swap, wait_for_all
from torch import Tensor
from torch.library import custom_op

import frame_swap
from frame_swap import FrameSwapWarning, State
from frame_swap.region import records

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def honest() -> Iterator[None]:
    """Reset `faulty.lying` after each test."""
    yield
    faulty.lying = False


def test_bert_base_trains_in_bfloat16_through_its_swap() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra frame-swap[models]")
    config = transformers.BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = transformers.BertForMaskedLM(config).cuda().bfloat16()
    twin = copy.deepcopy(model)
    ids = torch.randint(1000, (8, 64), device="cuda")
    frame_swap.configure(when="manual")
    compiled = torch.compile(model, backend="frame_swap")
    optimizers = [torch.optim.SGD(m.parameters(), lr=5e-2) for m in (model, twin)]

    def step() -> tuple[float, float]:
        losses = []
        for call, optimizer in zip((compiled, twin), optimizers, strict=True):
            optimizer.zero_grad()
            loss = call(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses[0], losses[1]

    losses = [step() for _ in range(5)]
    frame_swap.wait()
    frame_swap.swap()
    regions = live(frame_swap.report())
    assert [(r.state, r.reason) for r in regions] == [(State.INSTALLED, "")] * len(regions)
    calls = [r.eager_calls for r in regions]
    losses += [step() for _ in range(15)]
    assert [r.eager_calls for r in frame_swap.report().regions] == calls

    ours, eager = losses[-1]
    assert eager < losses[0][1] - 1  # it learns
    # bfloat16 keeps 8 bits: two trainings that round differently stay this close for 20 steps.
    for a, b in losses:
        assert a == pytest.approx(b, rel=2e-2)
    assert ours == pytest.approx(eager, rel=2e-2)


def test_the_first_compiled_call_tunes_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    tuned = []
    benchmark = CachingAutotuner.benchmark_all_configs
    monkeypatch.setattr(
        CachingAutotuner,
        "benchmark_all_configs",
        lambda self, *a, **k: tuned.append(self.fn.__name__) or benchmark(self, *a, **k),
    )

    def function(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() * 3).softmax(-1).sum(0)  # reductions have several variants to choose from

    x = torch.randn(512, 3000, device="cuda")
    with torch._inductor.utils.fresh_cache():
        torch.compile(function)(x)
    assert tuned  # stock does it in the first call: it can be seen
    tuned.clear()
    torch._dynamo.reset()
    for f in (function, lambda x: function(x.cos())):  # before anything was loaded here, and after
        compiled = torch.compile(f, backend="frame_swap")
        with torch._inductor.utils.fresh_cache():
            compiled(x)
            frame_swap.wait()
            torch.testing.assert_close(compiled(x), f(x))
    assert [(r.state, r.eager_calls) for r in frame_swap.report().regions] == [(State.INSTALLED, 1)] * 2
    assert not tuned


def step_of(model: torch.nn.Module, call: torch.nn.Module, x: Tensor, train: bool) -> list[Tensor]:
    """Copies of what one step of `call`, which is `model` or compiled from it, puts out: output, then gradients."""
    model.zero_grad()
    torch.compiler.cudagraph_mark_step_begin()
    with torch.set_grad_enabled(train):
        out = call(x)
    if train:
        out.square().mean().backward()
    return [t.detach().clone() for t in (out, *(p.grad for p in model.parameters() if p.grad is not None))]


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_cuda_graphs_of_reduce_overhead(train: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 8)).cuda()
    compiled = torch.compile(model, backend="frame_swap", mode="reduce-overhead")
    x = torch.randn(16, 64, device="cuda")

    def run(call: torch.nn.Module) -> list[torch.Tensor]:
        return step_of(model, call, x, train)

    expected = run(model)
    torch.testing.assert_close(run(compiled), expected)
    frame_swap.wait()
    for _ in range(5):  # warms up, records, replays
        torch.testing.assert_close(run(compiled), expected, rtol=1e-3, atol=1e-4)
    assert [r.state for r in frame_swap.report().regions] == [State.INSTALLED]


def replays_noted(monkeypatch: pytest.MonkeyPatch) -> list[torch.cuda.CUDAGraph]:
    """A list that each later replay of a CUDA graph appends to."""
    replays: list[torch.cuda.CUDAGraph] = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph) or replay(graph))
    return replays


class Mlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(64, 64), torch.nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.nn.functional.gelu(self.first(x)))


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_cuda_graphs_of_what_is_opted_in(train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `torch.compile`'s wrapper, too, each call is a step: its replay overwrites the last one's outputs."""
    frame_swap.configure(when="manual")
    replays = replays_noted(monkeypatch)

    def steps(model: torch.nn.Module) -> tuple[list[Tensor], list[tuple[int, str]]]:
        """Outputs, then parameters; and of each step, how often it replays and what becomes of the last output."""
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        values: list[Tensor] = []
        seen = []
        last = None
        for _ in range(6):  # warms up, records, replays
            with torch.set_grad_enabled(train):
                out = model(torch.randn(16, 64, device="cuda"))
            values.append(out.detach().clone())
            if train:
                out.square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            seen.append((len(replays), "" if last is None else fate(last, *values[-2:])))
            replays.clear()
            last = out
        return [*values, *(p.detach().clone() for p in model.parameters())], seen

    def fate(output: Tensor, its_value: Tensor, next_value: Tensor) -> str:
        try:
            now = output.detach().clone()
        except RuntimeError as error:
            return str(error)
        return "kept" if torch.equal(now, its_value) else "overwritten" if torch.equal(now, next_value) else "lost"

    model = Mlp().cuda()
    x = torch.randn(16, 64, device="cuda")
    opted = frame_swap.opt_in(mode="reduce-overhead")(copy.deepcopy(model))
    stock = torch.compile(copy.deepcopy(model), mode="reduce-overhead")
    expected, _ = steps(model)
    stocks, seen_with_stock = steps(stock)
    torch._dynamo.reset()  # ends stock's graphs
    with torch.set_grad_enabled(train):
        opted(x)
    wait_for_all()
    (region,) = swap_all()
    ours, seen = steps(opted)

    assert seen == seen_with_stock
    assert any("has been overwritten by a subsequent run" in what for _, what in seen)
    assert [what for _, what in seen[3:]] == ["overwritten"] * 3
    assert all(count > train for count, _ in seen[2:])  # the backward's, too
    torch.testing.assert_close(stocks, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    assert region.eager_calls == 1
    with torch.set_grad_enabled(train):
        assert is_direct(lambda: opted(x))


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_cuda_graphs_are_recorded_when_no_other_graph_is_awaited(
    train: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame_swap.configure(when="manual")
    replays = replays_noted(monkeypatch)
    model = Mlp().cuda()
    compiled = torch.compile(model, backend="frame_swap", mode="reduce-overhead")
    aligned = torch.randn(16, 64, device="cuda")
    shifted = torch.empty(16 * 64 + 1, device="cuda")[1:].view(16, 64).copy_(aligned)

    def step(call: torch.nn.Module, x: Tensor) -> list[Tensor]:
        return step_of(model, call, x, train)

    expected = step(model, aligned)
    step(compiled, aligned)
    wait_for_all()
    swap_all()
    frame_swap.configure(when="manual", delay=3600)
    with torch.no_grad():
        torch.compile(sine, backend="frame_swap", mode="reduce-overhead")(aligned)
    for x in (aligned, shifted, aligned):
        torch.testing.assert_close(step(compiled, x), expected, rtol=1e-3, atol=1e-4)
    assert not replays
    said = frame_swap.report().regions[0].cuda_graphs
    assert said == "not yet recorded, since other graphs are awaited: 3 calls without"

    records()[1].abandon("it is not awaited any more")
    for _ in range(4):  # warms up, records, replays
        torch.testing.assert_close(step(compiled, aligned), expected, rtol=1e-3, atol=1e-4)
    assert len(replays) >= 2 * (1 + train)
    assert frame_swap.report().regions[0].cuda_graphs.startswith("recorded after 3 calls without, within calls of ")


@custom_op("gpu_test::uncapturable", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def uncapturable(x: Tensor) -> Tensor:
    """Copies `x`; must not be called while a CUDA graph is recorded."""
    return x.clone()


uncapturable.register_fake(torch.empty_like)


class OnlyForwardInGraphs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return uncapturable(grad)


def test_cuda_graphs_of_a_forward_whose_backward_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    frame_swap.configure(when="manual")
    replays = replays_noted(monkeypatch)
    compiled = torch.compile(OnlyForwardInGraphs.apply, backend="frame_swap", mode="reduce-overhead")

    def step() -> Tensor:
        x = torch.rand(8, device="cuda", requires_grad=True)
        compiled(x).sum().backward()
        assert x.grad is not None
        return x.grad

    step()
    wait_for_all()
    swap_all()
    for _ in range(2):  # warms up, records
        step()
    replays.clear()
    for _ in range(3):
        torch.testing.assert_close(step(), torch.ones(8, device="cuda"))
    assert len(replays) == 3  # no forward has waited for a backward


KERNELS = """
import torch
import triton
from triton import language as tl

@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, at < n) + tl.load(y + at, at < n), at < n)

def added(x, y):
    out = torch.empty_like(x)
    add[(triton.cdiv(x.numel(), 128),)](x, y, out, x.numel(), BLOCK=128)
    return out
"""


def test_a_triton_kernel_of_the_programs_is_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kernels_of_the_program.py").write_text(KERNELS)
    monkeypatch.syspath_prepend(tmp_path)
    added = importlib.import_module("kernels_of_the_program").added

    def make(compiled: Wrap) -> Subject:
        inputs = [lambda: (torch.rand(1000), torch.rand(1000))]
        return Subject(compiled(lambda x, y: added(x.sin(), y) * 2), inputs)

    through_swap(make, device="cuda")


def sine(x: Tensor) -> Tensor:
    return x.sin() * 2


def test_a_miscompile_is_found(tmp_path: Path) -> None:
    frame_swap.configure(when="manual", verify=2, repro_dir=str(tmp_path))
    x = torch.rand(3, 4, device="cuda", requires_grad=True)
    wrong = faulty.Miscompile("aten.cos.default", "aten.sin.default")
    with torch._inductor.config.patch(post_grad_custom_post_pass=wrong):
        compiled = torch.compile(sine, backend="frame_swap")
        compiled(x)
        wait_for_all()
        frame_swap.swap()
        with pytest.warns(FrameSwapWarning, match="gradient 0: up to"):
            compiled(x).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.cos())
    (region,) = live(frame_swap.report())
    assert region.state is State.REJECTED
    (folder,) = tmp_path.iterdir()
    assert (folder / "difference.txt").read_text().startswith("gradient 0")


def test_verifying_draws_no_random_numbers_and_keeps_no_memory() -> None:
    frame_swap.configure(when="manual", verify=2)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 8)).cuda()
    compiled = torch.compile(model, backend="frame_swap")
    x = torch.randn(256, 64, device="cuda")

    def step() -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(3)
        model.zero_grad()
        out = compiled(x)
        out.square().mean().backward()
        grad = model[0].weight.grad
        assert grad is not None
        return out.detach().clone(), grad.clone(), torch.cuda.get_rng_state()

    by_pair = step()
    wait_for_all()
    frame_swap.swap()
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        for is_now, was in zip(step(), by_pair, strict=True):
            assert torch.equal(is_now, was)
    assert torch.cuda.memory_allocated() <= before
    (region,) = live(frame_swap.report())
    assert (region.state, region.verified) == (State.INSTALLED, 2)
    assert "it draws random numbers" in region.reason


def test_slower_code_is_turned_away() -> None:
    frame_swap.configure(when="manual", profit=True)
    x = torch.rand(3, device="cuda", requires_grad=True)
    with torch._inductor.config.patch(post_grad_custom_post_pass=faulty.SlowDown("aten.cos.default")):
        compiled = torch.compile(sine, backend="frame_swap")
        compiled(x)
        wait_for_all()
    frame_swap.swap()
    (region,) = live(frame_swap.report())
    with pytest.warns(FrameSwapWarning, match="it is slower than what serves now"):
        while region.state is State.TRIAL:
            compiled(x).sum().backward()
    assert region.state is State.REJECTED
    assert "(forward and backward, medians" in region.profit


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_compiled_code_that_raises_is_answered(train: bool) -> None:
    def relays(x: Tensor) -> Tensor:
        return faulty.relaid(x.sin()).cos().sum(-1)

    frame_swap.configure(when="manual")
    compiled = torch.compile(relays, backend="frame_swap")
    x = torch.rand(3, 4, device="cuda", requires_grad=train)
    compiled(x)
    wait_for_all()
    (region,) = swap_all()
    faulty.lying = True
    expected = relays(x)
    with pytest.warns(FrameSwapWarning, match="compiled code raised AssertionError"):
        torch.testing.assert_close(compiled(x), expected)
    assert region.state is State.REJECTED
    if train:
        (grad,) = torch.autograd.grad(compiled(x).sum(), x)
        torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), x)[0])


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[int], Fault]]:
    """Workers that are killed while they compile, as often as it is called with."""
    yield lambda times: plant(monkeypatch, Fault("compiling", "killed", str(tmp_path), times=times))
    fresh_workers()


def test_a_worker_that_is_killed(killer: Callable[[int], Fault]) -> None:
    killer(1)
    works(lambda x: x.sin() + 3, device="cuda")
    fault = killer(99)
    survives(lambda x: x.sin() + 4, "was killed by SIGKILL while compiling", "(tried twice)", device="cuda")
    assert fault.hits == 3
