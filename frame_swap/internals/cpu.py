"""What code for a CPU depends on: the CPU's architecture, and the instructions that it has."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Cpu(NamedTuple):
    """A kind of CPU. Inductor's C++ is compiled for the instructions of the machine that compiles it.

    Attributes:
        architecture: "x86_64" or "aarch64", say.
        instructions: names of sets of instructions, as PyTorch knows them, sorted.
    """

    architecture: str | None
    instructions: tuple[str, ...]

    def beyond(self, other: Cpu) -> str:
        """Why code that is compiled on this one may not run on `other`, in words that fit behind "a CPU that ".

        "" where it may.
        """
        if self.architecture != other.architecture:
            return f"is of architecture {self.architecture}"
        more = sorted({*self.instructions} - {*other.instructions})
        return f"has {', '.join(more)}" if more else ""


def this_cpu() -> Cpu:
    """That of the calling process."""
    capabilities = torch.cpu.get_capabilities()
    names = sorted(name for name, there in capabilities.items() if there is True)
    return Cpu(capabilities.get("architecture"), tuple(names))
