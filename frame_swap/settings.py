"""The user's settings: `configure()` and the `FRAME_SWAP_*` environment variables.

A setting is one field of `Settings`: its type, default, description, check and parser. The signature of
`configure`, the environment variables, the checks and the documentation are derived from the fields. To add a
setting, add a field, and its page to docs/settings/.
"""
# ruff: noqa: RUF009  `_setting` returns a dataclasses.field

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import textwrap
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any, Literal, ParamSpec, get_args

from .errors import nearest
from .runtime.machine import default_workers

When = Literal["ready", "wait", "manual", "never"]
First = Literal["graph", "pair"]
Capture = Literal["call", "background"]
Tiers = Literal["auto", "one"]
Artifact = Literal["inductor", "aoti"]


# --- How a field is described ---

_Check = Callable[[str, Any], None]
"""Raises ValueError or TypeError if the setting of this name cannot have this value."""


@dataclasses.dataclass(frozen=True)
class _About:
    """Everything about a setting that its annotation does not say."""

    description: str
    check: _Check
    parse: Callable[[str], Any] | None
    default: str


def _setting(
    default: Any,
    description: str,
    check: _Check,
    parse: Callable[[str], Any] | None,
    default_text: str = "",
) -> Any:
    """A field of `Settings`.

    Args:
        default: the default value, or a function that returns it.
        description: what the setting does, for the documentation.
        check: refuses a value that cannot be used.
        parse: reads the value from an environment variable; None if there is no variable for this setting.
        default_text: the default in the documentation, by default its repr.
    """
    metadata = {"about": _About(" ".join(description.split()), check, parse, default_text or repr(default))}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _is_workers(name: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}: give a whole number of processes, 1 or more")


def _is_one_of(*choices: str) -> _Check:
    def check(name: str, value: Any) -> None:
        if value not in choices:
            known = ", ".join(map(repr, choices))
            raise ValueError(f"{name}={value!r}: choose one of {known}{nearest(str(value), choices)}")

    return check


def _is_delay(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name}={value!r}: give a number of seconds, 0 or more")


def _is_limit_in(unit: str) -> _Check:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"{name}={value!r}: give a number of {unit} above 0; math.inf sets no limit")

    return check


def _is_calls(name: str, value: Any) -> None:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}={value!r}: give a number of calls to compare, 0 for none")


def _is_switch(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: give True or False")


def _is_verbosity(name: str, value: Any) -> None:
    if value not in (0, 1):
        raise ValueError(f"{name}={value!r}: give 0 or 1")


def _is_folder(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name}={value!r}: give a folder, or None for the temporary one")


def _is_store(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise ValueError(f'{name}={value!r}: give "on", "off" or a folder')


def _is_executor(name: str, value: Any) -> None:
    if value is not None and not callable(getattr(value, "submit", None)):
        raise TypeError(
            f"{name}={value!r} has no submit(): give a concurrent.futures.Executor, "
            "or None for frame-swap's own worker processes"
        )


def _parse_switch(text: str) -> Any:
    return {"0": False, "1": True}.get(text, text)  # other text fails the check


# --- The settings ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """One consistent set of settings. `help(frame_swap.configure)` and docs/settings.md describe them.

    Raises:
        ValueError, TypeError: a value cannot be used.
    """

    workers: int = _setting(
        default_workers,
        """How many worker processes compile at a time. A change takes effect with the next graph; compiles that
        have started stay in their workers.""",
        _is_workers,
        int,
        "half of the usable CPUs, from 1 to 4",
    )
    when: When = _setting(
        "ready",
        """When compiled code is installed. "ready": as soon as it is loaded. "wait": the first call waits for the
        compile and runs compiled code. "manual": when the program calls `frame_swap.swap()`. "never": nothing is
        compiled, and the eager code serves all calls.""",
        _is_one_of(*get_args(When)),
        str,
    )
    first: First = _setting(
        "graph",
        """What serves the calls of a graph until compiled code does. "graph": Dynamo's graph as it is, with
        PyTorch's autograd. "pair": a forward and a backward of eager operators, which AOTAutograd traces in the
        call that captures the graph. A graph that one of the two cannot serve, or not as well, takes the other.
        `torch.compile`'s `options` and `opt_in` take this setting, too.""",
        _is_one_of(*get_args(First)),
        str,
    )
    capture: Capture = _setting(
        "call",
        """Where Dynamo captures a frame. "call": in the call, which waits for that. "background" (experimental; for
        serving on a CPU): the call runs as plain Python, a thread captures its frame, and a later call takes it
        over. With `when="wait"`, with `fullgraph=True` and where it would not be sound, frames are captured in the
        call all the same.""",
        _is_one_of(*get_args(Capture)),
        str,
    )
    delay: float = _setting(
        0.0,
        "Seconds between the end of a compile and the loading of its result; for tests.",
        _is_delay,
        float,
    )
    executor: Executor | None = _setting(
        None,
        """Where compiles run: any `concurrent.futures.Executor` whose workers are other processes. None stands for
        frame-swap's own workers. `job_timeout`, `memory_limit` and `idle_timeout` apply only to these. Graphs that
        wait for them come in the order of calls so far × size; another executor gets each graph at once, and has
        its own order.""",
        _is_executor,
        None,
    )
    job_timeout: float = _setting(
        1800.0,
        """The most seconds that a compile may take in a worker, including the worker's start if it has yet to
        start. A worker that takes longer is ended, and the eager code goes on serving the graph. Another process
        that compiles the same is not waited for any longer, either.""",
        _is_limit_in("seconds"),
        float,
    )
    memory_limit: float = _setting(
        math.inf,
        """The most gigabytes (10^9 bytes) of resident memory for a worker together with the compilers that it runs.
        A worker that takes more is ended, and the eager code goes on serving its graph. A worker needs half a
        gigabyte before it compiles anything.""",
        _is_limit_in("gigabytes"),
        float,
        "math.inf",
    )
    idle_timeout: float = _setting(
        300.0,
        """Seconds after which an idle worker ends. The next compile starts it again, which takes seconds. Compiled
        code that was loaded ahead of its first call is dropped after as many.""",
        _is_limit_in("seconds"),
        float,
    )
    store: str = _setting(
        "on",
        """Where compiled code is kept for the next run of the program, which then runs it from its first call on.
        "on": below Inductor's cache folder. "off": nowhere, and nothing is taken from earlier runs. A URL such as
        "redis://host:6379/0", "s3://bucket/folder" or "file:///folder" is a place that machines share, with this
        machine's store in front; its entries are signed with the key in `FRAME_SWAP_STORE_KEY`. Anything else is a
        folder; "~" stands for the home. `TORCHINDUCTOR_FORCE_DISABLE_CACHES=1` turns it off, too.""",
        _is_store,
        str,
    )
    keep_frames: bool = _setting(
        False,
        """Whether Dynamo's code and guards of a frame are kept in the store, too (experimental; on a CPU, from
        torch 2.13 on). The next run makes the guards again from its own values, and traces the frame only where
        one of them sees something else, or where the code of a function that was traced has changed.""",
        _is_switch,
        _parse_switch,
    )
    store_limit: float = _setting(
        5.0,
        """The most gigabytes (10^9 bytes) that the store takes. What was not used for longest is removed first.""",
        _is_limit_in("gigabytes"),
        float,
    )
    verify: int = _setting(
        0,
        """How many calls of each graph run twice before compiled code serves the graph: in the eager code and in
        compiled code, on copies of the inputs. Outputs, gradients and changed inputs are compared as PyTorch's
        accuracy checks compare them. If they differ, the eager code goes on serving the graph. Such a call takes
        about four times as long, and memory for copies of inputs and parameters.""",
        _is_calls,
        int,
    )
    repro_dir: str | None = _setting(
        None,
        """The folder for everything that is needed to repeat a difference found by `verify`. None stands for the
        temporary folder.""",
        _is_folder,
        str,
    )
    profit: bool = _setting(
        False,
        """Whether the first calls that compiled code could serve are timed, on the eager code and on compiled code
        by turns. If compiled code is slower by more than the noise, the eager code goes on serving the graph.""",
        _is_switch,
        _parse_switch,
    )

    tiers: Tiers = _setting(
        "auto",
        """What is compiled where autotuning is asked for: by the modes "max-autotune" and
        "max-autotune-no-cudagraphs", or in Inductor's config. "auto": code without it, which is ready sooner, and
        then autotuned code, which replaces it only where it is measured to be faster. "one": autotuned code alone,
        as with `when="wait"`.""",
        _is_one_of(*get_args(Tiers)),
        str,
    )

    artifact: Artifact = _setting(
        "inductor",
        """What compiled code is. "inductor": the Python that Inductor generates, and its kernels. "aoti": a package
        of AOTInductor's, which is called without Python code and which `frame_swap.export` hands out. Graphs with a
        backward or on a GPU, and those that AOTInductor cannot lower, become Python all the same, and the report
        says why.""",
        _is_one_of(*get_args(Artifact)),
        str,
    )
    verbose: int = _setting(
        0,
        """1 prints a line on stderr for each step of a compile: seconds since the program began, graph, tier, step,
        how long it took, size. 0 prints none.""",
        _is_verbosity,
        int,
    )
    log_dir: str | None = _setting(
        None,
        """The folder in which each worker keeps its log, `worker-PID.log`: what it does, and what it and its
        compilers print. None stands for the worker's temporary folder, which is removed when the worker ends.""",
        _is_folder,
        str,
    )

    def __post_init__(self) -> None:
        for name, about in _SETTINGS.items():
            about.check(name, getattr(self, name))

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Read `FRAME_SWAP_WORKERS`, `FRAME_SWAP_WHEN`, and so on: the setting's name in capitals.

        Raises:
            ValueError: naming the variable whose value cannot be used.
        """
        values: dict[str, Any] = {}
        for name, about in _SETTINGS.items():
            variable = _variable(name)
            text = environ.get(variable)
            if not text or about.parse is None:
                continue
            try:
                values[name] = about.parse(text)
                about.check(name, values[name])
            except ValueError as error:
                raise ValueError(f"{variable}={text!r} cannot be used: {error}") from None
        return cls(**values)


_SETTINGS: dict[str, _About] = {field.name: field.metadata["about"] for field in dataclasses.fields(Settings)}


def _variable(name: str) -> str:
    return f"FRAME_SWAP_{name.upper()}"


def variables() -> dict[str, str]:
    """The variables that settings are read from, each with the name of its setting."""
    return {_variable(name): name for name, about in _SETTINGS.items() if about.parse is not None}


def disabled() -> bool:
    """Whether the variable `FRAME_SWAP_DISABLE` asks for stock Inductor."""
    return os.environ.get("FRAME_SWAP_DISABLE", "0") not in ("", "0")


_current: Settings | None = None


def current() -> Settings:
    """The settings in force."""
    global _current
    if _current is None:
        _current = Settings.from_environment()
    return _current


def with_options(options: Mapping[str, Any] | None) -> tuple[Settings, dict[str, Any] | None]:
    """The settings in force, with `first` as `options` may have it, and the options that remain for Inductor.

    Raises:
        ValueError: a setting cannot have this value.
    """
    others = dict(options or {})
    settings = dataclasses.replace(current(), first=others.pop("first")) if "first" in others else current()
    return settings, others or None


_P = ParamSpec("_P")


def _takes_fields_of(settings: Callable[_P, Settings]) -> Callable[[Callable[..., None]], Callable[_P, None]]:
    """Give a function the parameters of `Settings`: for type checkers, in its signature and in its docstring."""

    def apply(function: Callable[..., None]) -> Callable[_P, None]:
        fields = inspect.signature(Settings).parameters.values()
        described = "".join(_described(name, about) for name, about in _SETTINGS.items())
        function.__signature__ = inspect.Signature(list(fields), return_annotation=None)  # type: ignore[attr-defined]
        function.__doc__ = inspect.cleandoc(function.__doc__ or "").replace("Args:\n", f"Args:\n{described}")
        return function

    return apply


def _described(name: str, about: _About) -> str:
    text = f"{name}: {about.description} Default: {about.default}."
    return textwrap.fill(text, 108, initial_indent=" " * 4, subsequent_indent=" " * 8) + "\n"


@_takes_fields_of(Settings)
def configure(**changes: Any) -> None:
    """Change settings for graphs captured from now on. A setting that is not named stays as it is.

    Args:

    Raises:
        ValueError, TypeError: a value cannot be used, or there is no such setting. Nothing has changed then.
    """
    global _current
    for name in changes:
        if name not in _SETTINGS:
            raise TypeError(f"{name!r} is no setting of frame-swap{nearest(name, _SETTINGS)}")
    _current = dataclasses.replace(current(), **changes)
