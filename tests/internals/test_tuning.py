"""Compile-time tuning of Triton kernels, as far as it goes without a GPU; the rest is in program/test_gpu.py."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.utils import IndentedBuffer
from torch._subclasses import fake_tensor

from frame_swap.internals import gpu, tuning

pytestmark = pytest.mark.fast

ran: list[str] = []
async_compile = SimpleNamespace(wait=lambda scope: None)  # Inductor's code ends with a call of it


def wrapper(calls: str) -> SimpleNamespace:
    """Stands for a graph's wrapper code, with code that tunes its kernels."""
    defs, run = IndentedBuffer(), IndentedBuffer()
    defs.writeline(f"from {__name__} import async_compile, ran")
    run.writeline(calls)
    return SimpleNamespace(kernel_autotune_defs=defs, kernel_autotune_calls=run)


@pytest.mark.parametrize("calls", ["ran.append('tuned')", "ran.append('tuned'); len(3)"], ids=["works", "fails"])
def test_tuning_is_no_part_of_the_code_and_may_fail(calls: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "torch._inductor.codegen.wrapper.V", SimpleNamespace(graph=SimpleNamespace(autotuning_inputs=None))
    )
    ran.clear()
    code = wrapper(calls)
    with tuning.apart_from_the_code():
        PythonWrapperCodegen.generate_and_run_autotune_block(code)  # type: ignore[arg-type]
    assert ran == ["tuned"]
    assert code.kernel_autotune_defs.getvalue() + code.kernel_autotune_calls.getvalue() == ""


def test_outside_it_is_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "torch._inductor.codegen.wrapper.V", SimpleNamespace(graph=SimpleNamespace(autotuning_inputs=None))
    )
    with tuning.apart_from_the_code():
        pass
    with pytest.raises(RuntimeError, match="Failed to run autotuning code block"):
        PythonWrapperCodegen.generate_and_run_autotune_block(wrapper("len(3)"))  # type: ignore[arg-type]


def test_without_a_gpu_nothing_is_given_back() -> None:
    gpu.give_back_cached(tuning.MOST_CACHED)


class Kernel:
    """Stands for a kernel of Inductor's: its configs are numbers, and to load it is to forget its binaries."""

    def __init__(self, *configs: int) -> None:
        self.compile_results = [self.result(config) for config in configs]
        self.launchers: list[SimpleNamespace] = []
        self.inductor_meta = {"kernel_name": "k"}
        self.raw = True

    @staticmethod
    def result(config: int) -> SimpleNamespace:
        return SimpleNamespace(
            config=config, kernel=SimpleNamespace(hash=f"hash {config}", binary=f"binary {config}")
        )

    def load(self, tuned: tuning.Tuned) -> None:
        tuned.is_to_be_loaded(self)
        for result in self.compile_results:
            result.kernel.binary = None
        self.launchers = [SimpleNamespace(config=result.config) for result in self.compile_results]

    def prepare_for_caching(self) -> None:
        self.raw = False


def serialised(tuned: tuning.Tuned, kernel: Kernel) -> SimpleNamespace:
    entry = SimpleNamespace(cache_key="source", kernel_name="k", kernel=copy.deepcopy(kernel))
    tuned.is_serialised_as(kernel, entry)
    return entry


@pytest.mark.parametrize("winner", [1, 3], ids=["one of the first", "one that was added"])
def test_a_kernel_has_the_config_that_won_when_it_was_compiled_first(winner: int) -> None:
    tuned = tuning.Tuned(lambda config: config)
    kernel = Kernel(1, 2)
    entries = [serialised(tuned, kernel)]
    kernel.load(tuned)
    kernel.compile_results.append(Kernel.result(3))  # the first spilled registers
    kernel.load(tuned)
    kernel.launchers = [one for one in kernel.launchers if one.config == winner]  # it is tuned

    again = Kernel(1, 2)  # the code is tried out
    entries.append(serialised(tuned, again))
    again.load(tuned)

    chosen, lost = tuned.winners(entries)
    (entry,) = chosen
    assert [(r.config, r.kernel.binary) for r in entry.kernel.compile_results] == [(winner, f"binary {winner}")]
    assert lost == {"hash 1", "hash 2", "hash 3"} - {f"hash {winner}"}
    assert not entry.kernel.inductor_meta["dynamic_scale_rblock"]
    assert not entry.kernel.raw


def test_a_kernel_that_was_not_tuned_keeps_its_configs(caplog: pytest.LogCaptureFixture) -> None:
    tuned = tuning.Tuned(lambda config: config)
    kernel = Kernel(1, 2)
    entries = [serialised(tuned, kernel)]
    kernel.load(tuned)
    chosen, lost = tuned.winners(entries)
    assert chosen == entries
    assert not lost
    assert [result.config for result in chosen[0].kernel.compile_results] == [1, 2]
    assert "k was not tuned" in caplog.text


def test_a_context_is_kept_small_as_soon_as_a_fake_tensor_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[object] = []
    monkeypatch.setattr("torch._subclasses.fake_tensor.init_gpu_context", happened.append)
    monkeypatch.setattr(gpu, "keep_context_small", happened.append)
    usual = fake_tensor.init_gpu_context
    with gpu.small_contexts():
        fake_tensor.init_gpu_context(torch.device("cuda", 1))
    assert happened == [torch.device("cuda", 1), 1]
    assert fake_tensor.init_gpu_context is usual
