"""Graphs that hold tensors: constants, parameters that Dynamo has not made inputs, parameters that are frozen."""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import faulty
import pytest
import torch
from helpers import Subject, Twins, Wrap, live, through_swap
from torch import Tensor, nn

import frame_swap
from frame_swap import Region, State
from frame_swap.checking import repro

pytestmark = pytest.mark.fast


@torch._dynamo.assume_constant_result
def weights(device: torch.device) -> Tensor:
    return torch.tensor([1.0, 2.0, 3.0, 4.0], device=device)


def weighted(x: Tensor) -> Tensor:
    return x * weights(x.device)


class Block(nn.Module):
    """Parameters, one of them under two names, and buffers that training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.rand(4))
        self.same = self.scale
        self.register_buffer("shift", torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)) * self.scale + self.same * self.shift


class Image(nn.Module):
    """Layers whose parameters oneDNN and MKL pack, in layouts of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.linear = nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.rand(16))

    def forward(self, image: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(self.conv(image)).relu(), self.linear(x) * self.scale


@contextlib.contextmanager
def held_parameters() -> Iterator[None]:
    """Within the block, Dynamo leaves parameters in the graph."""
    with torch._dynamo.config.patch(prepare_freezing=True):
        yield


@contextlib.contextmanager
def freezing() -> Iterator[None]:
    with torch._inductor.config.patch(freezing=True):
        yield


def region() -> Region:
    (one,) = live(frame_swap.report())
    return one


def rows() -> tuple[Tensor]:
    return (torch.rand(6, 4, requires_grad=True),)


# Held tensors are inputs of compiled code


def test_a_constant(device: str) -> None:
    (record,) = through_swap(lambda compiled: Subject(compiled(weighted), [rows]), device=device)
    assert record.attempts[0].wrappers == ()


def test_parameters_and_buffers_that_training_changes(device: str) -> None:
    def make(compiled: Wrap) -> Subject:
        torch.manual_seed(0)
        model = Block()
        return Subject(compiled(model), [rows], model, {"rtol": 1e-4, "atol": 1e-5})

    with held_parameters():
        through_swap(make, device=device)


def test_a_parameter_changes_after_the_swap() -> None:
    model = Block().eval()
    x = torch.rand(6, 4)
    with held_parameters(), torch.no_grad():
        compiled = torch.compile(model, backend="frame_swap")
        compiled(x)
        frame_swap.wait()
        compiled(x)
        assert region().state is State.INSTALLED
        model.scale.mul_(2)
        torch.testing.assert_close(compiled(x), model(x))
    assert region().state is State.INSTALLED


def test_while_it_is_verified_buffers_change_once() -> None:
    frame_swap.configure(verify=2)
    torch.manual_seed(0)
    model, twin = Block(), Block()
    twin.load_state_dict(model.state_dict())
    with held_parameters():
        compiled = torch.compile(model, backend="frame_swap")
        for _ in range(5):
            (x,) = rows()
            torch.testing.assert_close(compiled(x), twin(x))
            frame_swap.wait()
    assert (region().state, region().verified) == (State.INSTALLED, 2)
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_difference_can_be_repeated(tmp_path: Path) -> None:
    """With the held tensors, which the graph does not hold any more."""
    frame_swap.configure(verify=1, repro_dir=str(tmp_path))
    miscompiled = torch._inductor.config.patch(
        post_grad_custom_post_pass=faulty.Miscompile("aten.mul.Tensor", "aten.add.Tensor")
    )
    compiled = torch.compile(weighted, backend="frame_swap")
    with miscompiled, pytest.warns(frame_swap.FrameSwapWarning, match="it is not what eager code computes"):
        for _ in range(2):
            compiled(torch.full((6, 4), 2.0))
            frame_swap.wait()
    (folder,) = tmp_path.iterdir()
    faulty.lying = False
    assert repro.difference(folder).startswith("output 0: up to ")


# Freezing


def frozen(dtype: torch.dtype) -> Image:
    torch.manual_seed(0)
    return Image().to(dtype).eval()


def images(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.rand(2, 3, 8, 8, dtype=dtype), torch.rand(32, 16, dtype=dtype)


@pytest.mark.parametrize("when", ["ready", "wait"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_code_computes_what_stock_s_computes(dtype: torch.dtype, when: Literal["ready", "wait"]) -> None:
    """With "wait" constants arrive while the frame is captured, when PyTorch would make fake ones."""
    frame_swap.configure(when=when)
    model, inputs = frozen(dtype), images(dtype)
    with freezing(), torch.no_grad():
        compiled = torch.compile(model, backend="frame_swap")
        torch.testing.assert_close(compiled(*inputs), model(*inputs))
        frame_swap.wait()
        served = compiled(*inputs)
        assert (region().state, region().eager_calls) == (State.INSTALLED, int(when == "ready"))
        stock = torch.compile(model)(*inputs)
    torch.testing.assert_close(served, stock, rtol=0, atol=0)


class Masked(nn.Module):
    """Its parameter becomes a constant with gaps between its rows, and many rows in one place."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.rand(1, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (x + nn.functional.pad(self.mask, (0, 1))[..., :3].expand(5, 4, 3)).sin()


def test_a_folded_constant_keeps_its_strides() -> None:
    frame_swap.configure(when="wait")
    model, x = Masked(), torch.rand(5, 4, 3)
    with freezing(), torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="frame_swap")(x), model(x))
    assert (region().state, region().eager_calls) == (State.INSTALLED, 0)


def test_frozen_values_are_constants_and_no_store_keeps_them(tmp_path: Path) -> None:
    frame_swap.configure(store=str(tmp_path))
    model, inputs = frozen(torch.float32), images(torch.float32)
    with freezing(), torch.no_grad():
        compiled = torch.compile(model, backend="frame_swap")
        before = compiled(*inputs)
        frame_swap.wait()
        compiled(*inputs)
        model.scale.zero_()
        torch.testing.assert_close(compiled(*inputs), before)
    assert region().store == "not kept: freezing makes values part of the code, and no key holds them"


def test_no_file_with_values_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    frame_swap.configure(when="manual")
    model, inputs = frozen(torch.float32), images(torch.float32)
    with freezing(), torch.no_grad():
        compiled = torch.compile(model, backend="frame_swap")
        compiled(*inputs)
        assert len([*tmp_path.glob("frame-swap-values-*/values")]) == 1  # while it is compiled
        frame_swap.wait()
        frame_swap.swap()
        assert region().state is State.INSTALLED
        gc.collect()
        assert [*tmp_path.glob("frame-swap-values-*")] == []
        torch.testing.assert_close(compiled(*inputs), model(*inputs))


def test_an_executor_of_the_user_s_gets_the_values_too() -> None:
    with ThreadPoolExecutor(1) as executor:
        frame_swap.configure(executor=executor)
        model, inputs = frozen(torch.float32), images(torch.float32)
        with freezing(), torch.no_grad():
            compiled = torch.compile(model, backend="frame_swap")
            compiled(*inputs)
            frame_swap.wait()
            torch.testing.assert_close(compiled(*inputs), model(*inputs))
        assert region().state is State.INSTALLED


def test_a_parameter_that_changes_before_the_swap_is_not_frozen() -> None:
    frame_swap.configure(when="manual", delay=0.3)
    model, inputs = frozen(torch.float32), images(torch.float32)
    with freezing(), torch.no_grad():
        compiled = torch.compile(model, backend="frame_swap")
        compiled(*inputs)
        model.scale.zero_()
        with pytest.warns(frame_swap.FrameSwapWarning, match="a parameter has changed"):
            frame_swap.wait()
        torch.testing.assert_close(compiled(*inputs), model(*inputs))
    assert region().state is State.REJECTED


def test_where_gradients_are_recorded_nothing_is_frozen() -> None:
    def make(compiled: Wrap) -> Subject:
        torch.manual_seed(0)
        model = Block()
        return Subject(compiled(model), [rows], model, {"rtol": 1e-4, "atol": 1e-5})

    with freezing():
        through_swap(make, device="cpu")


def test_frozen_code_is_verified() -> None:
    frame_swap.configure(verify=1)
    inputs = images(torch.float32)
    with freezing(), torch.no_grad():
        twins = Twins(lambda compiled: Subject(compiled(frozen(torch.float32)), [lambda: inputs]), "cpu")
        twins.check("before")
        frame_swap.wait()
        twins.check("on trial")
        twins.check("after")
    assert (region().state, region().verified) == (State.INSTALLED, 1)
