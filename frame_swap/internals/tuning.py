"""Inductor's autotuning of Triton kernels, in a worker.

A kernel is compiled in several configs, and the first call that runs it times them. Where Inductor tunes at compile
time, it keeps the winners to itself: what it serialises was copied before. Here the winners are what is kept, so
that the program neither loads the others nor tunes once more, in a call of the user's.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import time
from collections.abc import Iterator
from typing import Any

from . import gpu

log = logging.getLogger(__name__)


@contextlib.contextmanager
def for_the_program(*, autotunes: bool) -> Iterator[None]:
    """Within the block, kernels are tuned as it suits a program that runs beside this worker.

    Args:
        autotunes: whether the compile times many kernels for one.
    """
    slices = in_slices() if autotunes else contextlib.nullcontext()
    with winners_kept(), apart_from_the_code(), in_little_memory(), slices:
        yield


@contextlib.contextmanager
def winners_kept() -> Iterator[None]:
    """Within the block, a compile's result has, of each kernel that was tuned, the winning config alone.

    Process-wide; nothing happens where Triton is not installed.
    """
    if not importlib.import_module("torch._inductor.runtime.triton_compat").HAS_TRITON:
        yield
        return
    heuristics: Any = importlib.import_module("torch._inductor.runtime.triton_heuristics")
    bundler: Any = importlib.import_module("torch._inductor.triton_bundler").TritonBundler
    path_key: Any = importlib.import_module("torch._inductor.runtime.runtime_utils").triton_hash_to_path_key
    autotuner = heuristics.CachingAutotuner
    put, collect = (vars(bundler)[name] for name in ("put_static_autotuner", "collect_static_autotuners"))
    make_launchers = autotuner._make_launchers
    tuned: dict[int, Any] = {}  # kernels by the id of the copy that is serialised
    compiled: dict[int, tuple[Any, list[Any]]] = {}  # by a kernel's id: it, and what it was compiled to

    def put_and_note(cls: Any, key: str, kernel: Any) -> None:
        put.__func__(cls, key, kernel)
        if cls._static_autotuners:
            tuned[id(cls._static_autotuners[-1].kernel)] = kernel

    def copy_and_make_launchers(kernel: Any) -> None:
        # To load a kernel is to forget where its binary is.
        if len(kernel.launchers) != len(kernel.compile_results) and kernel.is_statically_launchable():
            compiled[id(kernel)] = kernel, copy.deepcopy(kernel.compile_results)
        make_launchers(kernel)

    def collect_winners(cls: Any) -> Any:
        for entry in cls._static_autotuners or ():
            kernel = tuned.get(id(entry.kernel))
            if kernel is None or len(kernel.launchers) != 1:
                log.info("frame-swap: %s was not tuned: its first call will do it", entry.kernel.fn.__name__)
                continue
            winner = heuristics.triton_config_to_hashable(kernel.launchers[0].config)
            _, results = compiled.get(id(kernel), (None, []))
            if len(results) < 2:
                continue
            for result in results:
                if heuristics.triton_config_to_hashable(result.config) == winner:
                    entry.kernel.compile_results = [result]
                    # Or the program would look for further configs.
                    entry.kernel.inductor_meta = {**entry.kernel.inductor_meta, "dynamic_scale_rblock": False}
                    entry.kernel.prepare_for_caching()
                    bundler.put(path_key(result.kernel.hash), entry.kernel.triton_meta.get("device", 0))
                    break
        return collect.__func__(cls)

    bundler.put_static_autotuner = classmethod(put_and_note)
    bundler.collect_static_autotuners = classmethod(collect_winners)
    autotuner._make_launchers = copy_and_make_launchers
    try:
        yield
    finally:
        bundler.put_static_autotuner, bundler.collect_static_autotuners = put, collect
        autotuner._make_launchers = make_launchers


@contextlib.contextmanager
def apart_from_the_code() -> Iterator[None]:
    """Within the block, what runs kernels to tune them is no part of the generated code, and may fail.

    Inductor puts it into a comment, so that whoever reads the code finds each kernel twice. Kernels that could not
    be tuned are tuned in their first call, as without it.
    """
    wrapper: Any = importlib.import_module("torch._inductor.codegen.wrapper").PythonWrapperCodegen
    usual = wrapper.generate_and_run_autotune_block

    def tune(self: Any) -> None:
        try:
            usual(self)
        except RuntimeError:
            log.info("frame-swap: kernels could not be tuned: their first call will do it", exc_info=True)
        self.kernel_autotune_defs.clear()
        self.kernel_autotune_calls.clear()

    wrapper.generate_and_run_autotune_block = tune
    try:
        yield
    finally:
        wrapper.generate_and_run_autotune_block = usual


MOST_CACHED = 64 << 20
"""Bytes of a GPU that a worker keeps from one kernel's tuning to the next."""


@contextlib.contextmanager
def in_little_memory() -> Iterator[None]:
    """Within the block, this process takes less of a GPU's memory: for its context, and beside what a tuning needs.

    Process-wide; nothing happens where Triton is not installed.
    """
    if not importlib.import_module("torch._inductor.runtime.triton_compat").HAS_TRITON:
        yield
        return
    autotuner: Any = importlib.import_module("torch._inductor.runtime.triton_heuristics").CachingAutotuner
    usual = autotuner.autotune_to_one_config

    def tune(self: Any, *args: Any, **kwargs: Any) -> None:
        gpu.keep_context_small()
        usual(self, *args, **kwargs)
        gpu.give_back_cached(MOST_CACHED)

    autotuner.autotune_to_one_config = tune
    try:
        yield
    finally:
        autotuner.autotune_to_one_config = usual


@contextlib.contextmanager
def in_slices() -> Iterator[None]:
    """Within the block, a timing on the GPU is followed by a pause of the same length: the program runs there, too.

    A timing takes 25 ms at most, after it was compiled.
    """
    benchmarking: Any = importlib.import_module("torch._inductor.runtime.benchmarking")
    benchmarker = benchmarking.benchmarker
    usual = type(benchmarker).benchmark_gpu

    def benchmark_and_pause(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return usual(benchmarker, *args, **kwargs)
        finally:
            time.sleep(time.perf_counter() - start)

    benchmarker.benchmark_gpu = benchmark_and_pause
    try:
        yield
    finally:
        del benchmarker.benchmark_gpu
