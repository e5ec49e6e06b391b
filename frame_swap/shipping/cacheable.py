"""Whether the result of a compile may be kept for another process: whether the content says all that it depends on.

A content holds the graph, settings, options, and a program's operators and kernels with their code. What it holds
by name only, such as a function that the program has added to Inductor's passes, may be another thing tomorrow.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..internals import eager
from .echo import Audience
from .operators import Definitions
from .operators.by_import import is_torch
from .operators.identity import PLAIN

Settings = Mapping[str, Mapping[str, Any]]
"""Settings by name, by the name of their config."""


def why_not(
    inputs: Iterable[Any], settings: Settings, audience: Audience, definitions: Definitions | None, *, frozen: bool
) -> str:
    """Why the result must not be kept; "" where it may be.

    Args:
        frozen: whether the values of parameters are part of it.
    """
    if frozen:
        return "freezing makes values part of the code, and no key holds them"
    if audience.reads_code:
        return "somebody reads graphs or generated code, which come from a compile"
    if settings.get("inductor", {}).get("trace.enabled") or settings.get("options", {}).get("trace.enabled"):
        return "somebody debugs compiles (trace.enabled)"
    for definition in definitions.operators if definitions is not None else ():
        if not definition.digests:
            return f"nobody knows which file defines operator {definition.name}"
    for config, values in settings.items():
        for name, value in values.items():
            if any(_uuid(part) is None for part in _objects(value)):
                return f"{config} config {name} is code of the program's without a uuid()"
    for value in inputs:
        cls = type(value)
        if eager.is_traceable_wrapper_subclass(value) and not is_torch(cls.__module__):
            return f"an input is a {cls.__qualname__}, a tensor subclass of the program's, whose code no key holds"
    return ""


def custom_uuids(settings: Settings) -> tuple[str, ...]:
    """What sets apart settings that are code of the program's: the `uuid()` of Inductor's custom passes."""
    return tuple(
        f"{config} {name} {_uuid(part)!r}"
        for config, values in settings.items()
        for name, value in values.items()
        for part in _objects(value)
    )


def _objects(value: Any) -> Iterator[Any]:
    """The parts of a setting that are not plain values."""
    if isinstance(value, (list, tuple, set, frozenset)):
        for part in value:
            yield from _objects(part)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _objects(key)
            yield from _objects(part)
    elif not isinstance(value, PLAIN):
        yield value


def _uuid(value: Any) -> Any:
    """What a custom pass of Inductor's says of its code; None where it says nothing."""
    uuid = getattr(value, "uuid", None)
    said = uuid() if callable(uuid) and not isinstance(value, type) else None
    return said if isinstance(said, (str, bytes, int)) else None
