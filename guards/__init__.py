"""Guards that arrive late, as Python predicates over a graph's symbolic-int arguments."""

from .predicate import Inexpressible, source, undecided

__all__ = ["Inexpressible", "source", "undecided"]
