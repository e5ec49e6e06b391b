"""Describe the operators that a graph needs, and define them in a worker."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from ...errors import Unshippable, first_line
from ...internals import dispatcher
from . import by_import, by_value, sources
from .identity import Identity, functions, identity
from .known import ADVICE, MissingOperator, lookup


@dataclasses.dataclass(frozen=True)
class Definitions:
    """The operators that a graph needs. Picklable."""

    operators: tuple[Definition, ...]

    def define(self) -> None:
        """In a worker: define them, or see that they are defined. Not for the process that described them.

        Raises:
            MissingOperator: one cannot be defined here.
        """
        for operator in self.operators:
            operator.define()


def definitions(operators: Iterable[dispatcher.OpOverload]) -> Definitions:
    """What a worker needs for `operators`, and for those that their gradients and fakes call.

    Raises:
        Unshippable: one of them can be neither sent nor imported.
    """
    found: dict[str, Definition] = {}
    for operator in operators:
        _describe(operator, found, ())
    return Definitions(tuple(found.values()))


@dataclasses.dataclass(frozen=True)
class Definition:
    """One operator: how to get it, and how to tell that it is the one.

    Attributes:
        name: "namespace::operator", with ".overload" where it has one.
        identity: all that `torch.library` and the dispatcher know of it.
        modules, libraries: imported and loaded, one after the other, until the operator is here.
        recipe: its definition by value, pickled, for where they do not suffice; or why there is none.
        digests: of all files that the definition can depend on; none where they are not known. For the digest of a
            content only: a worker does not read them.
    """

    name: str
    identity: Identity
    modules: tuple[str, ...]
    libraries: tuple[str, ...]
    recipe: bytes | str
    digests: tuple[str, ...]

    def define(self) -> None:
        """Define this operator in this process, or see that it is defined.

        Raises:
            MissingOperator: neither can be done.
        """
        tried = []
        for what, step in self._imports():
            if self._is_here():
                return
            try:
                step(what)
                tried.append(f"{what} does not define it as it is in the program")
            except BaseException as error:  # a module that ends its program, too
                tried.append(f"{what} cannot be imported ({first_line(error)})")
        if self._is_here():
            return
        if isinstance(self.recipe, str):
            raise MissingOperator(f"operator {self.name}: {'; '.join((*tried, self.recipe))}: {ADVICE}")
        try:
            by_value.unpack(self.recipe).define(self.name)
        except Exception as error:
            reason = "; ".join((*tried, first_line(error)))
            raise MissingOperator(f"operator {self.name} cannot be defined here: {reason}: {ADVICE}") from error
        operator = lookup(self.name)
        if operator is None or identity(operator).functions != self.identity.functions:
            reason = "its functions read what is different in a worker, such as a setting of a module"
            raise MissingOperator(f"operator {self.name} cannot be defined here: {reason}")
        _defined[self.name] = self.recipe, operator

    def _imports(self) -> Iterator[tuple[str, Callable[[str], Any]]]:
        yield from ((name, importlib.import_module) for name in self.modules)
        yield from ((path, torch.ops.load_library) for path in self.libraries)

    def _is_here(self) -> bool:
        operator = lookup(self.name)
        recipe, defined = _defined.get(self.name, (b"", None))
        if operator is None or operator is not defined:
            return operator is not None and identity(operator) == self.identity
        return recipe == self.recipe


_defined: dict[str, tuple[bytes, dispatcher.OpOverload | None]] = {}
"""In a worker: the operators that were defined by value, with their recipes."""


def _describe(operator: dispatcher.OpOverload, found: dict[str, Definition], within: tuple[str, ...]) -> None:
    """Add an operator to `found`, and those that it needs; not those whose descriptions it is part of."""
    name = dispatcher.name_of(operator)
    if name in found or name in within:  # an operator may occur in its own gradient
        return
    local = by_import.is_local(operator)  # then importing its module would not define it
    modules = () if local else tuple(by_import.modules(operator))
    libraries = () if local else tuple(by_import.libraries(operator))
    needed: dict[str, Definition] = dict(found)
    recipe: bytes | str
    try:
        recipe, others = by_value.pack(operator)
        for other in others:
            _describe(other, needed, (*within, name))
        found.update(needed)
    except Unshippable as error:
        if not (modules or libraries):
            raise Unshippable(f"a custom operator that a worker cannot be given, {name}: {error}") from error
        recipe = str(error)
    found[name] = Definition(
        name, identity(operator), modules, libraries, recipe, _digests(operator, modules, libraries)
    )


def _digests(
    operator: dispatcher.OpOverload, modules: tuple[str, ...], libraries: tuple[str, ...]
) -> tuple[str, ...]:
    if not dispatcher.defined_in_python(operator) and not modules and not libraries:
        return ()
    named = {by_import.module_of(function) for _, function in functions(operator)} - {""}
    return sources.digest({*modules, *named}), *map(by_import.digest, libraries)
