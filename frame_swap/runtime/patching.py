"""Replace attributes and environment variables for the length of a block.

Process-wide: other threads see the replacement too. A caller that cannot accept this holds a lock, or replaces a
function by one that looks at the calling thread.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

_ABSENT: Any = object()


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within the block, the attribute `name` of `owner` is `value`.

    Raises:
        AttributeError: `owner` has no such attribute; a misspelt name would otherwise patch nothing.
    """
    current = getattr(owner, name)
    own = vars(owner).get(name, _ABSENT)  # the descriptor, where the attribute is a class's method
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is _ABSENT and getattr(owner, name) is not current:
            delattr(owner, name)  # it was inherited
        if own is not _ABSENT:
            setattr(owner, name, own)


@contextmanager
def patched_environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Within the block, the environment has `changes`; afterwards these variables are as they were before.

    Others, which other threads may set meanwhile, are left alone.
    """
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        _restore(before)


@contextmanager
def restored_environment() -> Iterator[None]:
    """After the block, all of the environment is as it was before."""
    before: dict[str, str | None] = dict(os.environ)
    try:
        yield
    finally:
        _restore(dict.fromkeys(os.environ) | before)


def _restore(variables: Mapping[str, str | None]) -> None:
    """Set variables; those with None are removed. There is no moment at which others are not there."""
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        elif os.environ.get(name) != value:
            os.environ[name] = value
