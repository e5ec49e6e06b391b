"""The program's own operators, in a worker: what a compile asks of them is not in the graph.

The kernel stays where it is: compiled code calls the operator by name, in the calling process. A compile needs
the rest: schema and tags, the fake implementation, the formula of the gradient. Two ways lead there.

- By import (`by_import`): the worker imports the module that defines the operator, or loads its C++ library, and
  compares. An import is believed only if it leads to the same registrations and the same functions, down to what
  these read.
- By value (`by_value`): the functions that define the operator travel with the graph, with what they read. That
  serves what `__main__`, a notebook or the inside of a function defines, and what has changed since it was
  imported. Only what `torch.library` keeps can be sent so. A gradient that was registered straight with the
  dispatcher cannot be read back, and leaving it out would give wrong gradients.

Either way the functions are compared in the end, with the globals, closures and settings that they read
(`identity`).

Guarantees:
- In a worker an operator is what it was in the program at capture, or the compile fails and says what to do.
- A definition that changes between two compiles reaches a worker that knows the old one.
- The program's `__main__` is not run.
- Nothing is defined or imported in the calling process, should an executor run the compile there.
- A definition has the same bytes in each process that runs the same program.
"""

from __future__ import annotations

from .definition import Definition, Definitions, definitions
from .known import MissingOperator, is_custom, overloads

__all__ = ["Definition", "Definitions", "MissingOperator", "definitions", "is_custom", "overloads"]
