"""Inductor's autotuning of Triton kernels, in a worker.

A kernel is compiled in several configs, and the first call that runs it times them. Where Inductor tunes at compile
time, it keeps the winners to itself: what it serialises was copied before. Here the winners are what is kept, so
that the program neither loads the others nor tunes once more, in a call of the user's.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import time
from collections.abc import Iterator
from typing import Any


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
