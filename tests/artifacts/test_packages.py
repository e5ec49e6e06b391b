"""Packages of AOTInductor's: what they serve, why other graphs are none, and a program in C++ that takes one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Subject, Wrap, is_direct, through_swap, why_no_packages
from torch import Tensor, nn
from torch.library import custom_op
from torch.utils import cpp_extension

import frame_swap
from frame_swap import Region, State
from frame_swap.internals.packages import Unpackaged, inner_compile


@pytest.fixture(autouse=True)
def packages() -> None:
    if reason := why_no_packages():
        pytest.skip(reason)
    frame_swap.configure(artifact="aoti")


@custom_op("packages::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    """An operator in Python."""
    return x * 2


twice.register_fake(torch.empty_like)


class Counting(nn.Module):
    """A layer, a constant, and a buffer that each call changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return twice(self.linear(x)) + torch.tensor([1.0, 2.0, 3.0, 4.0]) * self.calls


def changes_and_aliases(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x.add_(1)
    return x.view(-1), x * 2, x.t()


def casts(x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return x @ x


def rectangle() -> tuple[Tensor]:
    return (torch.rand(3, 4),)


def square() -> tuple[Tensor]:
    return (torch.rand(4, 4),)


def larger() -> tuple[Tensor]:
    return (torch.rand(5, 4),)


def counting(compiled: Wrap) -> Subject:
    model = Counting()
    return Subject(compiled(model), [rectangle], model)


CASES: dict[str, Callable[[Wrap], Subject]] = {
    "a buffer, a constant, an operator in Python": counting,
    "an input that changes, outputs that are its views": lambda c: Subject(c(changes_and_aliases), [square]),
    "autocast": lambda c: Subject(c(casts), [square]),
    "sizes that change": lambda c: Subject(
        c(lambda x: (x * 2).relu() + x.shape[0], dynamic=True), [rectangle, larger]
    ),
    "a late guard": lambda c: Subject(c(lambda x: x.view(-1, 2).sum(0), dynamic=True), [rectangle, larger]),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.thorough if case == "autocast" else ()) for case in CASES]
)
def test_values_before_during_and_after_the_swap(case: str) -> None:
    with torch.no_grad():
        (record,) = through_swap(CASES[case], device="cpu")
    (compile,) = record.attempts
    assert (compile.artifact, compile.artifact_reason) == ("aoti", "")


def region() -> Region:
    """The one that was not dropped."""
    (one,) = [row for row in frame_swap.report().regions if row.state is not State.STALE]
    return one


def swapped(function: Callable[..., Any], *args: Any, **options: Any) -> Callable[..., Any]:
    """`function`, compiled and called through its swap."""
    compiled: Callable[..., Any] = torch.compile(function, backend="frame_swap", **options)
    compiled(*args)
    frame_swap.wait()
    compiled(*args)
    return compiled


def test_a_call_is_the_runner_s() -> None:
    x = torch.rand(3)
    with torch.no_grad():
        opted = frame_swap.opt_in(lambda x: (x * 2).relu())
        opted(x)
        frame_swap.wait()
        opted(x)
        torch.testing.assert_close(opted(x), (x * 2).relu())
        assert region().artifact == "aoti"
        assert is_direct(lambda: opted(x))


def test_several_threads_call_it() -> None:
    def f(x: Tensor) -> Tensor:
        return (x @ x).sin()

    with torch.no_grad():
        compiled = swapped(f, torch.rand(8, 8))

    def calls(seed: int) -> bool:
        x = torch.rand(8, 8, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            return all(torch.allclose(compiled(x), f(x)) for _ in range(200))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(calls, range(4)))
    assert region().artifact == "aoti"


# --- What is no package ---


def test_a_graph_with_a_backward_is_none() -> None:
    swapped(lambda x: (x * 2).sin(), torch.rand(3, requires_grad=True))
    assert (region().state, region().artifact) == (State.INSTALLED, "inductor")
    assert region().artifact_reason == "it has a backward"
    assert "its compiled code is no package: it has a backward" in " ".join(str(frame_swap.report()).split())


def test_a_graph_with_a_number_is_none() -> None:
    with torch.no_grad():
        swapped(lambda x, n: x * 2 + n, torch.rand(3), 7, dynamic=True)
    assert (region().state, region().artifact) == (State.INSTALLED, "inductor")
    assert region().artifact_reason.endswith("is neither a tensor nor a size of one")


def test_frozen_code_is_none() -> None:
    model = nn.Linear(4, 4)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        swapped(model, torch.rand(2, 4))
    assert (region().state, region().artifact) == (State.INSTALLED, "inductor")
    assert region().artifact_reason == "freezing makes constants that travel beside the code"


@pytest.mark.gpu
def test_a_graph_on_a_gpu_is_none() -> None:
    with torch.no_grad():
        swapped(lambda x: (x * 2).sin(), torch.rand(3, device="cuda"))
    assert (region().state, region().artifact) == (State.INSTALLED, "inductor")
    assert region().artifact_reason == "it runs on cuda, and packages are for CPUs"


def test_a_graph_on_another_device_is_refused_at_once() -> None:
    with pytest.raises(Unpackaged, match="it runs on cuda and xpu, and packages are for CPUs"):
        inner_compile(freezes=False, options={}, devices=["cpu", "xpu", "cuda"])


def test_without_the_setting_there_is_none() -> None:
    frame_swap.configure(artifact="inductor")
    with torch.no_grad():
        swapped(lambda x: (x * 2).sin(), torch.rand(3))
    assert (region().artifact, region().artifact_reason) == ("inductor", "")


def printed_twice(program: str, folder: Path) -> list[list[str]]:
    """The lines that a program prints, in each of two processes that share a store."""
    (folder / "program.py").write_text(program)
    command = [sys.executable, "program.py", str(folder / "store")]
    return [
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.splitlines()
        for _ in range(2)
    ]


KINDS = """
import sys
import torch
import frame_swap

def f(x):
    return (x * 3).cos()

frame_swap.configure(store=sys.argv[1])
for kind in ("aoti", "inductor", "aoti", "inductor"):
    frame_swap.configure(artifact=kind)
    torch._dynamo.reset()
    compiled, x = torch.compile(f, backend="frame_swap"), torch.ones(3)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x), f(x))
            report = frame_swap.wait()
    print(report.regions[-1].artifact, report.regions[-1].store)
"""


@pytest.mark.long
def test_kinds_are_not_mixed_up(tmp_path: Path) -> None:
    """Neither by the store nor by PyTorch's caches, nor in another process."""
    printed = printed_twice(KINDS, tmp_path)
    found = ["aoti found", "inductor found"]
    assert printed == [["aoti kept", "inductor kept", *found], [*found, *found]]


SECOND = """
import sys
import torch
import frame_swap

frame_swap.configure(store=sys.argv[1], artifact="aoti")
layer = torch.nn.Linear(4, 4)
compiled, x = torch.compile(layer, backend="frame_swap"), torch.ones(3, 4)
with torch.no_grad():
    for _ in range(2):
        torch.testing.assert_close(compiled(x), layer(x))
        (region,) = frame_swap.wait().regions
print(region.artifact, region.store, region.eager_calls, "torch._inductor.select_algorithm" in sys.modules)
"""


def test_a_second_process_loads_a_package_without_inductor(tmp_path: Path) -> None:
    printed = printed_twice(SECOND, tmp_path)
    assert printed == [["aoti kept 1 False"], ["aoti found 0 False"]]


# --- Export ---

PROGRAM = """
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>
#include <iostream>

int main(int, char** arguments) {
  torch::NoGradGuard no_grad;
  torch::inductor::AOTIModelPackageLoader model(arguments[1]);
  auto weight = torch::full({3, 4}, 0.5), bias = torch::ones({3}), x = torch::ones({5, 4});
  std::vector<at::Tensor> inputs = {weight, bias, x};
  auto outputs = model.run(inputs);
  std::cout << outputs.size() << " " << outputs[0].sizes() << " " << outputs[0].sum().item<float>() << std::endl;
}
"""


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


@pytest.mark.thorough
def test_a_program_in_c_plus_plus_runs_what_is_exported(tmp_path: Path) -> None:
    package = tmp_path / "layer.pt2"
    with torch.no_grad():
        compiled = swapped(Layer(), torch.rand(5, 4))
    assert frame_swap.export(compiled, package) == (
        "L['self']._modules['linear']._parameters['weight']",
        "L['self']._modules['linear']._parameters['bias']",
        "L['x']",
    )
    source, program = tmp_path / "program.cpp", tmp_path / "program"
    source.write_text(PROGRAM)
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    libraries = [flag for path in cpp_extension.library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    libraries += ["-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(["g++", "-std=c++20", "-O0", *includes, str(source), "-o", str(program), *libraries], check=True)
    done = subprocess.run([str(program), str(package)], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("1 [5, 3] 45\n", 0), done.stderr


def test_what_has_left_dynamo_s_cache_is_not_exported(tmp_path: Path) -> None:
    def f(x: Tensor) -> Tensor:
        return x.tan()

    with torch.no_grad():
        compiled = swapped(f, torch.rand(3))
    assert frame_swap.export(compiled, tmp_path / "package.pt2") == ("L['x']",)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="has left Dynamo's cache"):
        frame_swap.export(compiled, tmp_path / "package.pt2")


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    path = tmp_path / "package.pt2"
    x = torch.rand(4, 4)

    def never_called(x: Tensor) -> Tensor:
        return x

    with pytest.raises(RuntimeError, match=r"never_called.* has no compiled code: call it first"):
        frame_swap.export(never_called, path)
    with pytest.raises(TypeError, match="is neither a function nor a module"):
        frame_swap.export(len, path)

    def trains(x: Tensor) -> Tensor:
        return x.sin()

    with pytest.raises(RuntimeError, match=r"trains.* has no package: it has a backward"):
        frame_swap.export(swapped(trains, torch.rand(3, requires_grad=True)), path)
    with torch.no_grad():
        compiled = swapped(changes_and_aliases, x)
        with pytest.raises(RuntimeError, match="is no program by itself: AOTAutograd's wrappers remain for"):
            frame_swap.export(compiled, path)
        frame_swap.configure(artifact="inductor")
        with pytest.raises(RuntimeError, match=r'casts.* has no package: .*configure\(artifact="aoti"\)'):
            frame_swap.export(swapped(casts, x), path)
        frame_swap.configure(artifact="aoti")

        def twice_captured(x: Tensor) -> Tensor:
            return x.cos()

        compiled = swapped(twice_captured, torch.rand(3), dynamic=False)
        compiled(torch.rand(4))
        frame_swap.wait()
        compiled(torch.rand(4))
        with pytest.raises(RuntimeError, match=r"2 packages serve .*twice_captured.*dynamic=True"):
            frame_swap.export(compiled, path)
    assert not path.exists()
