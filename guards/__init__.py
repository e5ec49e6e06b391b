"""Guards that arrive late, as Python predicates over a graph's symbolic-int arguments."""

from guards.predicate import Inexpressible, source, undecided

__all__ = ["Inexpressible", "source", "undecided"]
