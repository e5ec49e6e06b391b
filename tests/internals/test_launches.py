"""The launch of a kernel by its own `run`: what the driver is handed is what Inductor's `run` hands it."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from frame_swap.internals import launches

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(launches._heuristics() is None, reason="needs Triton, and a torch before 2.13"),
]


class Driver:
    """In place of the functions in C: keeps what it is to launch."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []

    def _launch_kernel(self, *args: Any) -> None:
        self.launched.append(args)


@pytest.fixture
def driver() -> Driver:
    return Driver()


def kernel_of(driver: Driver, scratches: int = 2, **changes: Any) -> Any:
    """A kernel as it is after its load: `out = x + k`, of `xnumel` times `ynumel`, in blocks of 8 by 4."""
    from torch._inductor.runtime import static_triton_launcher, triton_heuristics
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._inductor.runtime.triton_compat import Config

    static = object.__new__(static_triton_launcher.StaticallyLaunchedCudaKernel)
    names = ["x", "out", "k", "ynumel", "xnumel", "YBLOCK", "XBLOCK"]
    vars(static).update(
        C_impl=driver,
        name="add",
        hash="1f" * 32,
        cubin_path="there",
        function=77,
        arg_names=names,
        declared_constexprs=(5, 6),
        full_constexprs=[5, 6],
        arg_tys="OOlii",
        num_warps=2,
        shared=16,
        n_regs=8,
        n_spills=0,
        has_global_scratch=scratches > 0,
        has_profile_scratch=scratches > 1,
    )
    blocks = {"YBLOCK": 4, "XBLOCK": 8}
    signature = {**dict.fromkeys(names, "i32"), **dict.fromkeys(blocks, "constexpr")}
    meta = {"signature": signature, "constants": blocks, "device": 0, "configs": [], "device_type": "cuda"}
    config = Config(blocks, num_warps=2)
    inductor = {"grid_type": "Grid2D", "kernel_name": "add", **changes.pop("inductor", {})}
    result = triton_heuristics.StaticTritonCompileResult(static, config, meta, inductor)
    kernel = object.__new__(triton_heuristics.CachingAutotuner)
    vars(kernel).update(
        fn=SimpleNamespace(__name__="add"),
        launchers=[result.make_launcher()],
        inductor_meta=inductor,
        triton_meta=meta,
        device_props=DeviceProperties(type="cuda", index=0, multi_processor_count=1, cc=90),
        triton_interpret=False,
        dump_launch_params=False,
        dump_launch_tensors=False,
        configs=[config],
    )
    vars(kernel).update(changes)
    return kernel


def module_of(kernel: Any) -> ModuleType:
    module = ModuleType("generated")
    vars(module).update(kernel=kernel, other=5)
    launches.launch_directly(module)
    return module


@pytest.mark.parametrize("scratches", [0, 1, 2])
def test_what_is_launched(driver: Driver, scratches: int) -> None:
    with launches.noted():
        kernel = kernel_of(driver, scratches)
    usual = kernel.run
    run = module_of(kernel).kernel.run
    assert run != usual
    for ynumel, xnumel in ((4, 8), (5, 9), (1, 1000), (0, 0)):
        usual("x", "out", 1.5, ynumel, xnumel, stream=3)
        run("x", "out", 1.5, ynumel, xnumel, stream=3)
        expected, launched = driver.launched[-2:]
        assert launched == expected
    arguments = ("x", "out", 1.5, 5, 9, *[None] * scratches)
    assert driver.launched[2] == (77, 2, 2, 1, 2, 16, "OOlii" + "O" * scratches, arguments, 3)


def test_who_looks_sees_each_launch(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.runtime import triton_heuristics

    with launches.noted():
        kernel = kernel_of(driver)
    seen: list[str] = []

    def note(kernel: Any, *args: Any, stream: int, **options: Any) -> None:
        seen.append(kernel.fn.__name__)

    monkeypatch.setattr(triton_heuristics.CachingAutotuner, "run", note)
    run = module_of(kernel).kernel.run
    run("x", "out", 1, 4, 8, stream=3)
    assert (seen, len(driver.launched)) == ([], 1)
    with torch.profiler.profile():
        run("x", "out", 1, 4, 8, stream=3)
    run("x", "out", 1, 4, 8, stream=3, benchmark_run=True)
    assert (seen, len(driver.launched)) == (["add", "add"], 1)


@pytest.mark.parametrize(
    "left",
    [
        {"launchers": []},
        {"dump_launch_params": True},
        {"dump_launch_tensors": True},
        {"triton_interpret": True},
        {"inductor": {"coordinate_descent_tuning": True}},
    ],
    ids=str,
)
def test_who_has_more_to_do_keeps_inductors(driver: Driver, left: dict[str, Any]) -> None:
    with launches.noted():
        kernel = kernel_of(driver, **left)
    assert "run" not in vars(module_of(kernel).kernel)


def test_launchers_made_elsewhere_keep_inductors(driver: Driver) -> None:
    with launches.noted():
        pass
    assert "run" not in vars(module_of(kernel_of(driver)).kernel)
