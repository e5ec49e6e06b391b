"""Which process this is, in a form that other processes and other machines can compare.

Process ids repeat: on another host, in another container, and over time.

Guarantees:
- Two processes never have the same identity; a forked child has its own from its first instruction on.
"""

from __future__ import annotations

import os
import uuid

_identity = uuid.uuid4().hex


def this_process() -> str:
    """The identity of the calling process: 32 hexadecimal digits."""
    return _identity


def _renew() -> None:
    global _identity
    _identity = uuid.uuid4().hex


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
