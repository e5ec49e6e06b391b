"""An operator's definition as bytes: the functions that define it, with what they read.

Guarantees:
- The bytes are the same in each process that runs the same program: sets are sorted, and classes carry no random
  numbers.
- A set that two functions share is one set in a worker, too.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import cloudpickle
import torch

from ...errors import Unshippable, first_line
from ...internals import dispatcher
from .. import triton_kernels
from .by_import import is_importable, is_torch, module_of
from .identity import PLAIN, OperatorReference, functions, names
from .known import ADVICE, TORCH_NAMESPACES, MissingOperator, is_custom, lookup, overloads

# Dispatch keys whose kernels compute; the fake implementation stands in for them during a compile.
_COMPUTING = frozenset(
    ("CPU", "CUDA", "XPU", "MPS", "HPU", "MTIA", "XLA", "IPU", "VE", "PrivateUse1", "CompositeExplicitAutograd")
)


def pack(operator: dispatcher.OpOverload) -> tuple[bytes, list[dispatcher.OpOverload]]:
    """A recipe that defines an operator, pickled, and the custom operators that its functions name.

    Raises:
        Unshippable: a part of the definition cannot be read back, or cannot be pickled.
    """
    recipe = _recipe(operator)
    with io.BytesIO() as stream, ExitStack() as stack:
        for name in {module_of(function) for _, function in functions(operator)}:
            if is_importable(name) and not is_torch(name):
                stack.enter_context(_pickled_by_value(sys.modules[name]))
        pickler = _Pickler(stream)
        try:
            pickler.dump(recipe)
        except Unshippable:
            raise
        except Exception as error:
            raise Unshippable(f"its definition cannot be pickled: {first_line(error)}") from error
        return stream.getvalue(), list(pickler.named_operators())


def unpack(recipe: bytes) -> CustomOp | LibraryOp:
    """The recipe that `pack` has pickled."""
    with io.BytesIO(recipe) as stream:
        opened: CustomOp | LibraryOp = _Unpickler(stream).load()
        return opened


@dataclasses.dataclass(frozen=True)
class CustomOp:
    """The arguments of `torch.library.custom_op`, and of the methods of its result, without the kernels."""

    schema: str
    tags: tuple[torch.Tag, ...]
    devices: tuple[str | None, ...]
    fake: Callable[..., Any] | None
    backward: Callable[..., Any] | None
    setup_context: Callable[..., Any] | None
    vmap: Callable[..., Any] | None
    autocast: dict[str, torch.dtype]
    dispatch: dict[type, Callable[..., Any]]
    effect: Any

    def define(self, name: str) -> None:
        """Define the operator; in place of one that an earlier `custom_op` defined."""
        mutated = dispatcher.changed_arguments(name + self.schema)
        named = [device for device in self.devices if device is not None]
        first = named if len(named) == len(self.devices) else None
        operator = torch.library.custom_op(
            name, _no_kernel, mutates_args=mutated, schema=self.schema, tags=self.tags, device_types=first
        )
        if named and first is None:
            operator.register_kernel(named)(_no_kernel)
        if self.fake is not None:
            operator.register_fake(self.fake)
        if self.backward is not None:
            operator.register_autograd(self.backward, setup_context=self.setup_context)
        if self.vmap is not None:
            operator.register_vmap(self.vmap)
        for device_type, dtype in self.autocast.items():
            operator.register_autocast(device_type, dtype)
        for cls, rule in self.dispatch.items():
            operator.register_torch_dispatch(cls, rule)
        if self.effect is not None:
            operator.register_effect(self.effect)


_Library: Any = torch.library.Library  # untyped


@dataclasses.dataclass(frozen=True)
class LibraryOp:
    """An operator of `torch.library.define` or `Library.define` with a fake implementation and no gradient."""

    schema: str
    tags: tuple[torch.Tag, ...]
    keys: tuple[str, ...]
    fake: Callable[..., Any]
    effect: Any

    def define(self, name: str) -> None:
        """Define the operator; in place of one that was defined here."""
        if name in _libraries_here:
            dispatcher.remove(_libraries_here.pop(name))
        library: Any = _Library(name.partition("::")[0], "FRAGMENT")
        library.define(self.schema, tags=self.tags)
        for key in self.keys:
            library.impl(name, _no_kernel, key)
        torch.library.register_fake(name, self.fake, lib=library)
        if self.effect is not None:
            dispatcher.register_effect(name, self.effect, library)
        _libraries_here[name] = library


_libraries_here: dict[str, Any] = {}
"""An operator lives as long as the library that defines it."""


def _no_kernel(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("the program's operators have no kernels in a compile worker of frame-swap")


def _recipe(operator: dispatcher.OpOverload) -> CustomOp | LibraryOp:
    definition = dispatcher.custom_op_def(operator)
    keys = dispatcher.dispatch_keys(operator)
    foreign = [key for key, own in keys if not (own and definition) and key not in _COMPUTING]
    fake = dispatcher.fake_impl(operator)
    if definition is None:
        if not dispatcher.defined_in_python(operator):
            raise Unshippable("it is defined in C++")
        if fake is None:
            raise Unshippable("it has no fake implementation of torch.library.register_fake")
        foreign = [key for key in foreign if key != "Meta"]  # register_fake's, and not asked where there is a fake
    if foreign:
        raise Unshippable(f"its registration for {foreign[0]} cannot be read back from the dispatcher")
    if rules := dispatcher.python_rules(operator):
        raise Unshippable(f"it has a rule for {rules[0]} that cannot be told from PyTorch's own")
    effect = dispatcher.effect(operator)
    if definition is None:
        assert fake is not None
        computing = tuple(key for key, _ in keys if key in _COMPUTING)
        return LibraryOp(dispatcher.schema_of(operator), tuple(operator.tags), computing, fake, effect)
    parts = dispatcher.parts(definition)
    return CustomOp(
        parts.schema,
        parts.tags,
        parts.devices,
        parts.fake,
        parts.backward,
        parts.setup_context,
        parts.vmap,
        dispatcher.autocast_dtypes(definition),
        parts.dispatch,
        effect,
    )


@contextmanager
def _pickled_by_value(module: types.ModuleType) -> Iterator[None]:
    if module.__name__ in cloudpickle.list_registry_pickle_by_value():
        yield
        return
    cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        cloudpickle.unregister_pickle_by_value(module)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Functions by value; the operators that they hold or name, by name."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self._names: set[str] = set()
        self._namespaces: set[str] = set()
        self._held: dict[str, dispatcher.OpOverload] = {}
        self._sets: dict[int, tuple[Any, tuple[bool, tuple[Any, ...]]]] = {}

    def persistent_id(self, obj: Any) -> Any:
        """A set of plain values, in an order that does not depend on their hashes; None for everything else."""
        if type(obj) not in (set, frozenset) or not all(isinstance(item, PLAIN) for item in obj):
            return None
        items = tuple(sorted(obj, key=lambda item: (type(item).__name__, repr(item))))
        # The same object each time, so that the other side can tell which sets are one. It keeps `obj` alive.
        return self._sets.setdefault(id(obj), (obj, (type(obj) is frozenset, items)))[1]

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, dispatcher.CustomOpDef):
            obj = dispatcher.operator_of(obj)
        if isinstance(obj, dispatcher.OpOverload):
            name = dispatcher.name_of(obj)
            if is_custom(obj):
                self._held[name] = obj
            return OperatorByName, (name,)
        if isinstance(obj, dispatcher.OpOverloadPacket):
            namespace, name = dispatcher.packet_name(obj)
            self._namespaces.add(namespace)
            self._names.add(name)
            return _packet, (namespace, name)
        if isinstance(obj, dispatcher.Namespaces):
            return _torch_ops, ()
        if isinstance(obj, dispatcher.Namespace):
            self._namespaces.add(obj.name)
            return getattr, (torch.ops, obj.name)
        if isinstance(obj, torch.Tensor):
            raise Unshippable("its definition holds a tensor, which would be a copy in a worker")
        if type(obj).__module__.startswith("triton.") and hasattr(obj, "fn"):
            return triton_kernels.imported, triton_kernels.module_and_name(obj)
        if isinstance(obj, types.FunctionType):
            self._names.update(names(obj.__code__))
        reduced = super().reducer_override(obj)
        return _without_tracker(reduced) if isinstance(obj, type) else reduced

    def named_operators(self) -> Iterator[dispatcher.OpOverload]:
        """Held as such, or written as `torch.ops.namespace.name` in a function's code."""
        yield from self._held.values()
        written = {n for n in self._names if isinstance(vars(torch.ops).get(n), dispatcher.Namespace)}
        for namespace in sorted((self._namespaces | written) - TORCH_NAMESPACES):
            operators = getattr(torch.ops, namespace)
            for name in sorted(self._names):
                packet = getattr(operators, name, None)
                if isinstance(packet, dispatcher.OpOverloadPacket):
                    yield from overloads(packet)


def _without_tracker(reduced: Any) -> Any:
    """cloudpickle's description of a class, without the random number by which it knows that class again.

    A recipe is unpickled once for each definition, and nothing compares its classes with another recipe's.
    """
    if not isinstance(reduced, tuple) or not reduced[0].__name__.startswith("_make_skeleton_"):
        return reduced
    make, (*arguments, _, extra), *rest = reduced
    return make, (*arguments, None, extra), *rest


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self._sets: dict[int, tuple[Any, Any]] = {}

    def persistent_load(self, described: Any) -> Any:
        frozen, items = described
        made = frozenset(items) if frozen else set(items)
        return self._sets.setdefault(id(described), (described, made))[1]


class OperatorByName(OperatorReference):
    """An operator that a definition holds: looked up at each use, since it may be defined after this, or anew."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._operator()(*args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # asked for by pickle before there is a name
            raise AttributeError(attribute)
        return getattr(self._operator(), attribute)

    def _operator(self) -> dispatcher.OpOverload:
        operator = lookup(self._name)
        if operator is None:
            raise MissingOperator(f"operator {self._name} was not sent along: {ADVICE}")
        return operator


def _packet(namespace: str, name: str) -> Any:
    return getattr(getattr(torch.ops, namespace), name)


def _torch_ops() -> Any:
    return torch.ops
