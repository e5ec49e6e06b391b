"""Late guards as Python predicates over a graph's symbolic-int arguments. Imports nothing of frame_swap."""

from .predicate import Inexpressible, source, undecided

__all__ = ["Inexpressible", "source", "undecided"]
