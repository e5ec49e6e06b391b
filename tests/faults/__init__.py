"""Faults, each injected at a chosen moment.

`harness.plant` makes new workers run `inject.initialize` in place of their own entry point. A `Fault` says what
happens there, when and how often.

A worker imports this module before anything else, so it must not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

VARIABLE = "FRAME_SWAP_TESTS_FAULT"
"""The environment variable that carries a `Fault`, as JSON, to the worker."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong in workers.

    Attributes:
        when: "importing" torch, "compiling", "packing" the artifact, "loading" or "sending" it.
        what: the name of a function in inject.py.
        marks: a folder; each attempt that was hit leaves a file there.
        times: how many attempts are hit, over all workers.
        only: hit only compiles whose parcel contains this text.
    """

    when: str
    what: str
    marks: str
    times: int = 99
    only: str = ""

    @property
    def hits(self) -> int:
        """How many attempts were hit."""
        return len(list(Path(self.marks).glob("hit-*")))

    def strike(self) -> bool:
        """Whether to hit this attempt; if so, count it."""
        for number in range(self.times):
            try:
                Path(self.marks, f"hit-{number}").open("x").close()
            except FileExistsError:
                continue
            return True
        return False
