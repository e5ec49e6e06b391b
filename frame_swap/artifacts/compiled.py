"""Compiled code that is ready to be called, and the errors that it raises."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ..settings import Artifact

Boxed = Callable[[list[Any]], Any]
"""Takes the graph's inputs in one list, which it empties."""


class Compiled(NamedTuple):
    """Compiled code.

    Attributes:
        call: takes the graph's inputs, returns the sequence of its outputs.
        boxed: Inductor's own function, if a call of it needs no wrapper at all; else None.
        wrappers: the wrappers of AOTAutograd's that are still called with it, by our names for them.
        kind: "inductor" for generated Python and its kernels, "aoti" for a package of AOTInductor's.
        package: the bytes of such a package, if a call of it needs no wrapper at all; else None.
        taken: indices of the graph's inputs that a package takes; None where it takes all.
        repeatable: whether a call may be made again after it raised, unless `is_repeatable` denies it for the
            error. It may where no input has been changed.
    """

    call: Callable[..., Any]
    boxed: Boxed | None
    wrappers: tuple[str, ...]
    repeatable: bool
    kind: Artifact = "inductor"
    package: bytes | None = None
    taken: tuple[int, ...] | None = None

    def holding(self, tensors: tuple[Tensor, ...]) -> Compiled:
        """The same, for a graph that holds `tensors`: compiled code takes them as its first inputs."""
        return self._replace(call=functools.partial(self.call, *tensors), boxed=None) if tensors else self


def is_repeatable(error: BaseException) -> bool:
    """Whether the call that raised `error` had changed no input yet, as far as its wrapper knows."""
    return not hasattr(error, _MARK)


def mark_unrepeatable(error: BaseException) -> None:
    """The call that raised `error` has changed inputs."""
    setattr(error, _MARK, True)


_MARK = "frame_swap_unrepeatable"
