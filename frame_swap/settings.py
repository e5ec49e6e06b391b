"""What the user may set: `configure()`, `FRAME_SWAP_*` variables, and `torch.compile`'s mode and options."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Executor
from typing import Any, Literal, get_args

When = Literal["ready", "wait", "manual", "never"]


def usable_cpus() -> int:
    """How many CPUs this process may use: its affinity mask, not what the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclasses.dataclass(frozen=True)
class Settings:
    """One consistent set of settings; see `frame_swap.configure` for what each means."""

    workers: int
    when: When = "ready"
    delay: float = 0.0
    executor: Executor | None = None
    job_timeout: float = 1800.0
    memory_limit: float = math.inf
    idle_timeout: float = 300.0
    verify: int = 0
    repro_dir: str | None = None
    profit: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.workers, int) or self.workers < 1:
            raise ValueError(f"workers={self.workers!r}: give a whole number of processes, 1 or more")
        if self.when not in get_args(When):
            known = get_args(When)
            choices = ", ".join(map(repr, known))
            raise ValueError(f"when={self.when!r}: choose one of {choices}{_nearest(str(self.when), known)}")
        if not isinstance(self.delay, (int, float)) or not 0 <= self.delay < math.inf:
            raise ValueError(f"delay={self.delay!r}: give a number of seconds, 0 or more")
        for name, unit in (("job_timeout", "seconds"), ("memory_limit", "gigabytes"), ("idle_timeout", "seconds")):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"{name}={value!r}: give a number of {unit} above 0; math.inf sets no limit")
        if not isinstance(self.verify, int) or self.verify < 0:
            raise ValueError(f"verify={self.verify!r}: give a number of calls to compare, 0 for none")
        if not isinstance(self.profit, bool):
            raise ValueError(f"profit={self.profit!r}: give True or False")
        if self.repro_dir is not None and not isinstance(self.repro_dir, (str, os.PathLike)):
            raise TypeError(f"repro_dir={self.repro_dir!r}: give a folder, or None for the temporary one")
        if self.executor is not None and not callable(getattr(self.executor, "submit", None)):
            raise TypeError(
                f"executor={self.executor!r} has no submit(): give a concurrent.futures.Executor, "
                "or None for frame-swap's own worker processes"
            )

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read `FRAME_SWAP_WORKERS`, `FRAME_SWAP_WHEN`, and so on: the setting's name in capitals.

        Raises:
            ValueError: naming the variable whose value cannot be used.
        """
        values: dict[str, Any] = {"workers": default_workers()}
        for name, parse in _IN_ENVIRONMENT.items():
            variable = f"FRAME_SWAP_{name.upper()}"
            text = environ.get(variable)
            if not text:
                continue
            try:
                values[name] = parse(text)
                cls(**values)
            except ValueError as error:
                raise ValueError(f"{variable}={text!r} cannot be used: {error}") from None
        return cls(**values)


_IN_ENVIRONMENT: dict[str, Callable[[str], Any]] = {
    "workers": int,
    "when": str,
    "delay": float,
    "job_timeout": float,
    "memory_limit": float,
    "idle_timeout": float,
    "verify": int,
    "repro_dir": str,
    "profit": lambda text: {"0": False, "1": True}.get(text, text),
}


def default_workers() -> int:
    """Worker processes for this machine: half of the usable CPUs, at least 1 and at most 4.

    The other half is the program's own, and each worker's compilers run beside it. Each worker takes half a
    gigabyte, 1.6 more of a GPU's memory where it compiles for one, and seconds to start.
    """
    return max(1, min(4, usable_cpus() // 2))


def disabled() -> bool:
    """Whether `FRAME_SWAP_DISABLE` asks for plain stock Inductor."""
    return os.environ.get("FRAME_SWAP_DISABLE", "0") not in ("", "0")


_current: Settings | None = None


def current() -> Settings:
    """The settings in force."""
    global _current
    if _current is None:
        _current = Settings.from_environment()
    return _current


_UNSET: Any = object()


def configure(
    *,
    workers: int = _UNSET,
    when: When = _UNSET,
    delay: float = _UNSET,
    executor: Executor | None = _UNSET,
    job_timeout: float = _UNSET,
    memory_limit: float = _UNSET,
    idle_timeout: float = _UNSET,
    verify: int = _UNSET,
    repro_dir: str | None = _UNSET,
    profit: bool = _UNSET,
) -> None:
    """Change settings for graphs captured from now on; what is not named stays as it is.

    Args:
        workers: how many worker processes compile at a time. Takes effect with the next graph; compiles under
            way end where they are.
        when: "ready" (default) installs compiled code as soon as it is loaded; "wait" makes the first call
            wait and run compiled code; "manual" installs on `frame_swap.swap()`; "never" compiles nothing and
            stays on the eager pair.
        delay: seconds for which a finished compile is held back before it is loaded, for tests.
        executor: where compiles run: any `concurrent.futures.Executor` whose workers are other processes.
            None (default) is frame-swap's own workers, which alone heed the next three settings.
        job_timeout: seconds that a compile may take in a worker, where that has yet to start its start included;
            1800 by default. A worker that takes longer is ended and its graph stays on the pair.
        memory_limit: gigabytes (10^9 bytes) of resident memory that a worker may take together with the compilers
            that it runs; math.inf by default. One that takes more is ended and its graph stays on the pair.
            A worker needs half a gigabyte before it compiles anything.
        idle_timeout: seconds after which a worker with nothing to do ends; 300 by default. The next compile
            starts it again, which takes seconds.
        verify: how many calls of each graph to make twice before compiled code serves it, by the pair and by
            compiled code, on copies of the inputs (default 0). Outputs, gradients and changed inputs are compared
            as PyTorch's accuracy checks do; a graph for which they differ stays on its pair. Such a call takes
            about four times as long, and memory for copies of inputs and parameters.
        repro_dir: where to write what it takes to repeat a difference that `verify` finds; by default below the
            temporary folder.
        profit: time the first calls that compiled code could serve, on the pair and on compiled code by turns, and
            stay on the pair where compiled code is slower by more than the noise (default False).

    Raises:
        ValueError, TypeError: a value cannot be used; nothing has changed then.
    """
    global _current
    given: dict[str, Any] = {
        "workers": workers,
        "when": when,
        "delay": delay,
        "executor": executor,
        "job_timeout": job_timeout,
        "memory_limit": memory_limit,
        "idle_timeout": idle_timeout,
        "verify": verify,
        "repro_dir": repro_dir,
        "profit": profit,
    }
    _current = dataclasses.replace(current(), **{k: v for k, v in given.items() if v is not _UNSET})


def inductor_options(mode: str | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """What `torch.compile`'s `mode` and `options` mean, as changes to Inductor's config.

    Raises:
        ValueError: an unknown mode or option, naming the nearest known one, or a value of the wrong type.
    """
    import torch._inductor
    from torch._inductor import config

    changes: dict[str, Any] = {}
    if mode and mode != "default":
        try:
            changes |= torch._inductor.list_mode_options(mode)
        except (KeyError, RuntimeError):
            known = torch._inductor.list_mode_options()
            raise ValueError(f"unknown mode {mode!r}{_nearest(mode, known)}") from None
    known_options = config.get_config_copy()
    for key, value in (options or {}).items():
        name = key.replace("-", "_")
        if name not in known_options:
            raise ValueError(f"unknown option {key!r}{_nearest(name, known_options)}")
        expected = config.get_type(name)  # type: ignore[attr-defined]
        if isinstance(expected, type) and not isinstance(value, expected):
            raise ValueError(f"option {key!r}: got {type(value).__name__}, expected {expected.__name__}")
        changes[name] = value
    return changes


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""
