"""The state of the process that a compile depends on, besides the graph: a worker applies it before it compiles."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from ..internals import eager, inductor
from ..runtime.patching import patched_environment

_SHIPPED = (
    ("TORCHINDUCTOR_", "TORCHDYNAMO_", "TORCH_COMPILE_", "TRITON_", "CUDA_", "CUTLASS_", "PYTORCH_ROCM_ARCH")
    + ("ATEN_CPU_CAPABILITY", "ENABLE_PERSISTENT_TMA_MATMUL", "ENABLE_TEMPLATE_TMA_STORE")
    + ("CXX", "CC", "PATH", "TMPDIR", "CONDA_PREFIX", "OMP_PREFIX")
)
"""Prefixes of the environment variables that a compile reads."""

# Those that name folders and devices of a machine, or limit how much of it a process uses. Variables that choose a
# compiler (CXX, TRITON_PTXAS_PATH) are not among them: the code depends on it.
_OF_MACHINE = frozenset(
    ("PATH", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS", "TORCH_COMPILE_DEBUG_DIR")
    + ("TRITON_CACHE_DIR", "TRITON_HOME", "TRITON_DUMP_DIR", "TRITON_OVERRIDE_DIR", "TRITON_LIBCUDA_PATH")
    + ("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "CUDA_PATH", "CUDA_CACHE_PATH", "CUDA_MPS_PIPE_DIRECTORY")
    + ("CUDA_MPS_LOG_DIRECTORY", "CCACHE_DIR", "CCACHE_TEMPDIR", "CONDA_PREFIX", "OMP_PREFIX")
)


def environment(*, of_machine: bool) -> dict[str, str]:
    """The environment variables that a compile reads, sorted by name.

    Args:
        of_machine: those that mean something on this machine only, or all others.
    """
    names = sorted(name for name in os.environ if name.startswith(_SHIPPED))
    return {name: os.environ[name] for name in names if (name in _OF_MACHINE) == of_machine}


# (owner, attribute): backend flags that tracing, decompositions or code generation read.
_FLAGS: tuple[tuple[Any, str], ...] = (
    (torch.backends.cudnn, "enabled"),
    (torch.backends.cudnn, "benchmark"),
    (torch.backends.cudnn, "deterministic"),
    (torch.backends.cudnn, "allow_tf32"),
    (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction"),
    (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"),
    (torch.backends.mkldnn, "enabled"),
)
_backends: Any = torch.backends
# Owners of `fp32_precision`: the general one first, since those below take its value until they have their own.
_PRECISIONS: tuple[Any, ...] = (
    _backends,
    _backends.cuda.matmul,
    _backends.cudnn,
    _backends.cudnn.conv,
    _backends.cudnn.rnn,
    _backends.mkldnn,
    _backends.mkldnn.matmul,
    _backends.mkldnn.conv,
    _backends.mkldnn.rnn,
)
_deterministic: Any = torch.utils.deterministic
_ATTENTION = ("flash", "mem_efficient", "math", "cudnn")


T = TypeVar("T")


def _unless_replaced(read: Callable[[], T]) -> T | None:
    """What `read` returns; None where `fp32_precision` says something that the older setting has no word for."""
    try:
        return read()
    except RuntimeError:  # PyTorch refuses to answer
        return None


@dataclasses.dataclass(frozen=True)
class ProcessState:
    """A picklable copy of the calling thread's and process's state at capture."""

    grad: bool
    inference: bool
    autocast: dict[str, tuple[bool, torch.dtype]]
    autocast_cache: bool
    deterministic: tuple[bool, bool]
    fill_uninitialized_memory: bool
    matmul_precision: str | None
    default_dtype: torch.dtype
    threads: int
    flags: tuple[bool | None, ...]
    precisions: tuple[str, ...]
    attention: tuple[bool, ...]
    configs: dict[str, dict[str, Any]]
    environment: dict[str, str]

    @classmethod
    def capture(cls, devices: set[str]) -> ProcessState:
        """The state of the calling thread.

        Args:
            devices: types of device, such as "cuda", whose autocast is captured; the CPU's always is.
        """
        configs = inductor.changed_configs()
        configs["inductor"].pop("compile_threads", None)  # the worker decides how many compilers it runs
        if "cuda" in devices and configs["inductor"].get(tune := "triton.autotune_at_compile_time") is None:
            # Otherwise the first compiled call would time each kernel's variants: 980 ms for BERT-base on an H200,
            # against 44 ms for a first call of kernels that the worker has tuned. None is the default.
            configs["inductor"][tune] = True
            configs["inductor"] = dict(sorted(configs["inductor"].items()))
        return cls(
            grad=torch.is_grad_enabled(),
            inference=torch.is_inference_mode_enabled(),
            autocast={
                d: (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in sorted(devices | {"cpu"})
            },
            autocast_cache=torch.is_autocast_cache_enabled(),
            deterministic=(
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            fill_uninitialized_memory=bool(_deterministic.fill_uninitialized_memory),
            matmul_precision=_unless_replaced(torch.get_float32_matmul_precision),
            default_dtype=torch.get_default_dtype(),
            threads=torch.get_num_threads(),
            flags=tuple(_unless_replaced(functools.partial(getattr, *flag)) for flag in _FLAGS),
            precisions=tuple(owner.fp32_precision for owner in _PRECISIONS),
            attention=tuple(getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in _ATTENTION),
            configs=configs,
            environment=environment(of_machine=False),
        )

    def inductor_config(self, options: dict[str, Any]) -> dict[str, Any]:
        """What differs from the defaults of Inductor's config in a compile with these changes."""
        return {**self.configs["inductor"], **options}

    @contextlib.contextmanager
    def applied_to_thread(self) -> Iterator[None]:
        """Within the block, the calling thread has the captured grad mode, inference mode and autocast."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for device, (enabled, dtype) in self.autocast.items():
                stack.enter_context(
                    torch.autocast(device, dtype, enabled=enabled, cache_enabled=self.autocast_cache)
                )
            yield

    @contextlib.contextmanager
    def applied_to_process(self) -> Iterator[None]:
        """Within the block, the process has all of the captured state. Only for a worker.

        Settings of the thread, configs and environment are restored afterwards; the rest stays for the next
        compile to overwrite.
        """
        torch.use_deterministic_algorithms(self.deterministic[0], warn_only=self.deterministic[1])
        _deterministic.fill_uninitialized_memory = self.fill_uninitialized_memory
        if self.matmul_precision is not None:
            torch.set_float32_matmul_precision(self.matmul_precision)
        torch.set_default_dtype(self.default_dtype)
        # Generated loops are split for this number of threads, and a convolution's layout depends on whether it is
        # more than one. A compile runs nothing large enough to use them.
        torch.set_num_threads(self.threads)
        with eager.backend_flags_unlocked():
            for (owner, name), flag in zip(_FLAGS, self.flags, strict=True):
                if flag is not None:
                    setattr(owner, name, flag)
            for owner, precision in zip(_PRECISIONS, self.precisions, strict=True):
                owner.fp32_precision = precision
        for kind, value in zip(_ATTENTION, self.attention, strict=True):
            getattr(torch.backends.cuda, f"enable_{kind}_sdp")(value)
        with (
            patched_environment(self.environment),
            inductor.patch_configs(self.configs),
            self.applied_to_thread(),
        ):
            yield
