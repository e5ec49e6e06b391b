"""Which process and which machine this is, in a form that other processes and other machines can compare.

Process ids repeat: on another host, in another container, and over time.

Guarantees:
- Two processes never have the same identity; a forked child has its own from its first instruction on.
- Two processes with the same machine see the same files under the same paths, as long as neither changes its root
  folder. Two containers on one host are two machines.
"""

from __future__ import annotations

import functools
import os
import platform
import uuid
from pathlib import Path

_identity = uuid.uuid4().hex


def this_process() -> str:
    """The identity of the calling process: 32 hexadecimal digits."""
    return _identity


@functools.cache
def this_machine() -> str:
    """The identity of the machine that the calling process runs on."""
    try:  # Linux: this boot of the kernel, and what is mounted for this process
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/mnt')}"
    except OSError:
        return f"{platform.node()} {uuid.getnode():x}"


def _renew() -> None:
    global _identity
    _identity = uuid.uuid4().hex


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
