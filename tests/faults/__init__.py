"""Faults, each injected at a chosen moment.

A fault in a worker: `harness.plant` has the workers that start from then on run `inject.py` in place of their own
entry. What happens there, when and how often, is a `Fault`.

This file is imported in the worker, too, before anything else: it imports nothing of torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

VARIABLE = "FRAME_SWAP_TESTS_FAULT"
"""The environment variable that takes a `Fault`, as JSON, to the worker."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong in workers.

    Attributes:
        when: "importing" torch, "compiling", "loading" what was compiled, "sending" it; or "packing", where `what`
            changes the artifact.
        what: the name of a function in inject.py.
        marks: a folder, where each attempt that was hit leaves a file.
        times: how many attempts are hit, whichever worker they come to.
        only: hits compiles whose parcel holds this text.
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
        """Whether this attempt is to be hit; counts it."""
        for number in range(self.times):
            try:
                Path(self.marks, f"hit-{number}").open("x").close()
            except FileExistsError:
                continue
            return True
        return False
