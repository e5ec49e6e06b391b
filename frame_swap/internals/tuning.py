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
from collections.abc import Callable, Iterator
from typing import Any

from . import gpu, launches

log = logging.getLogger(__name__)


@contextlib.contextmanager
def for_the_program(*, autotunes: bool) -> Iterator[None]:
    """Within the block, kernels are made and tuned as it suits a program that runs beside this worker.

    Args:
        autotunes: whether the compile times many kernels for one.
    """
    changes = [apart_from_the_code()]
    if gpu.has_triton():
        changes += [launches.named_shortly(), winners_kept(), in_little_memory()]
    if autotunes:
        changes.append(in_slices())
    with contextlib.ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)
        yield


@contextlib.contextmanager
def winners_kept() -> Iterator[None]:
    """Within the block, a compile's result has, of each kernel that was tuned, the winning config alone.

    Process-wide; needs Triton.
    """
    heuristics: Any = importlib.import_module("torch._inductor.runtime.triton_heuristics")
    bundler: Any = importlib.import_module("torch._inductor.triton_bundler").TritonBundler
    path_key: Any = importlib.import_module("torch._inductor.runtime.runtime_utils").triton_hash_to_path_key
    autotuner = heuristics.CachingAutotuner
    put, collect = (vars(bundler)[name] for name in ("put_static_autotuner", "collect"))
    make_launchers = autotuner._make_launchers
    tuned = Tuned(heuristics.triton_config_to_hashable)

    def put_and_note(cls: Any, key: str, kernel: Any) -> None:
        put.__func__(cls, key, kernel)
        if cls._static_autotuners:
            tuned.is_serialised_as(kernel, cls._static_autotuners[-1])

    def copy_and_make_launchers(kernel: Any) -> None:
        if len(kernel.launchers) != len(kernel.compile_results) and kernel.is_statically_launchable():
            tuned.is_to_be_loaded(kernel)
        make_launchers(kernel)

    def collect_winners(cls: Any) -> Any:
        if cls._static_autotuners:
            cls._static_autotuners, lost = tuned.winners(cls._static_autotuners)
            binaries = {path_key(one) for one in lost}
            cls._entries = [e for e in dict.fromkeys(cls._entries or ()) if e.kernel_hash not in binaries]
            cls._winners = None  # a newer PyTorch's own choice, of the kernels that it has seen running
        return collect.__func__(cls)

    bundler.put_static_autotuner = classmethod(put_and_note)
    bundler.collect = classmethod(collect_winners)
    autotuner._make_launchers = copy_and_make_launchers
    try:
        yield
    finally:
        bundler.put_static_autotuner, bundler.collect = put, collect
        autotuner._make_launchers = make_launchers


class Tuned:
    """What the kernels of one compile were compiled to, and which of their configs won.

    Inductor compiles a kernel twice: to tune it, and to try out the code. The second time it looks up the winner;
    in torch 2.11 it finds none that it has added itself, since the first configs took too many registers.
    """

    def __init__(self, name_of: Callable[[Any], Any]) -> None:
        """With a function that returns a config's name, which can be compared."""
        self._name_of = name_of
        self._kernels: dict[int, Any] = {}  # by the id of the entry in which a copy is serialised
        self._compiled: dict[int, tuple[Any, dict[Any, Any]]] = {}  # by a kernel's id: it, and results by config

    def is_serialised_as(self, kernel: Any, entry: Any) -> None:
        """A copy of `kernel` goes into `entry` of the bundle."""
        self._kernels[id(entry)] = kernel

    def is_to_be_loaded(self, kernel: Any) -> None:
        """Copy what `kernel` was compiled to. To load it is to forget where its binaries are."""
        _, results = self._compiled.setdefault(id(kernel), (kernel, {}))
        for result in kernel.compile_results:
            name = self._name_of(result.config)
            if name not in results:
                results[name] = copy.deepcopy(result)

    def winners(self, entries: list[Any]) -> tuple[list[Any], set[str]]:
        """One entry for each kernel, with the config that won alone; and the hashes of what has lost."""
        chosen: dict[str, Any] = {}
        for entry in entries:
            if self._narrowed(entry):
                chosen[entry.cache_key] = entry
            else:
                chosen.setdefault(entry.cache_key, entry)
        hashes = {result.kernel.hash for _, results in self._compiled.values() for result in results.values()}
        for entry in chosen.values():
            results = entry.kernel.compile_results
            hashes -= {result.kernel.hash for result in results}
            if len(results) > 1:
                log.info("frame-swap: %s was not tuned: its first call will do it", entry.kernel_name)
        return list(chosen.values()), hashes

    def _narrowed(self, entry: Any) -> bool:
        """Leave the winner alone in an entry; False if none is known."""
        kernel = self._kernels.get(id(entry))
        if kernel is None or len(kernel.launchers) != 1:
            return False
        _, results = self._compiled.get(id(kernel), (None, {}))
        winner = results.get(self._name_of(kernel.launchers[0].config))
        if winner is None:
            return False
        entry.kernel.compile_results = [winner]
        # Or the program would look for further configs.
        entry.kernel.inductor_meta = {**entry.kernel.inductor_meta, "dynamic_scale_rblock": False}
        entry.kernel.prepare_for_caching()
        return True


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


MOST_CACHED = 16 << 20
"""Bytes of a GPU that a worker keeps from one kernel's tuning to the next."""


@contextlib.contextmanager
def in_little_memory() -> Iterator[None]:
    """Within the block, this process takes less of a GPU's memory: for its context, and beside what a tuning needs.

    Process-wide; needs Triton.
    """
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
