"""Compile-time tuning of Triton kernels, as far as it goes without a GPU; the rest is in program/test_gpu.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.utils import IndentedBuffer

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
