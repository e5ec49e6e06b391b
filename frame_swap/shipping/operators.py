"""The program's own operators, in a worker: what a compile asks of them is not in the graph.

The kernel stays where it is: compiled code calls the operator by name, in the calling process. A compile needs
the rest: schema and tags, the fake implementation, the formula of the gradient. Two ways lead there.

- By import: the worker imports the module that defines the operator, or loads its C++ library, and compares. An
  import is believed only if it leads to the same registrations and the same functions, down to what these read.
- By value: the functions that define the operator travel with the graph, with what they read. That serves what
  `__main__`, a notebook or the inside of a function defines, and what has changed since it was imported. Only what
  `torch.library` keeps can be sent so. A gradient that was registered straight with the dispatcher cannot be read
  back, and leaving it out would give wrong gradients.

Either way the functions are compared in the end, with the globals, closures and settings that they read.

Guarantees:
- In a worker an operator is what it was in the program at capture, or the compile fails and says what to do.
- A definition that changes between two compiles reaches a worker that knows the old one.
- The program's `__main__` is not run.
- Nothing is defined or imported in the calling process, should an executor run the compile there.
"""

from __future__ import annotations

import dataclasses
import dis
import hashlib
import importlib
import io
import pickle
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import cloudpickle
import torch
from torch._ops import OpOverload, OpOverloadPacket

from ..errors import Unshippable, first_line
from ..internals import dispatcher
from . import triton_kernels

# Operators that every process has which has imported torch.
_TORCH_NAMESPACES = frozenset(
    ("aten", "prim", "prims", "higher_order", "inductor", "quantized", "_quantized", "quantized_decomposed")
    + ("mkldnn", "onednn", "mkl", "profiler", "debugprims", "fsdp", "_c10d_functional", "_dtensor", "streams")
)

_Library: Any = torch.library.Library  # untyped

# Dispatch keys whose kernels compute; the fake implementation stands in for them during a compile.
_COMPUTING = frozenset(
    ("CPU", "CUDA", "XPU", "MPS", "HPU", "MTIA", "XLA", "IPU", "VE", "PrivateUse1", "CompositeExplicitAutograd")
)

_ADVICE = "define it with torch.library.custom_op, or all of it in one module that can be imported"


class MissingOperator(RuntimeError):
    """A worker cannot be given an operator of the program's; the message says which, and what to do."""


def is_custom(operator: OpOverload | OpOverloadPacket) -> bool:
    """Whether an operator is the program's own, or a library's, rather than PyTorch's."""
    return str(operator).partition(".")[0].partition("::")[0] not in _TORCH_NAMESPACES


def overloads(operator: OpOverload | OpOverloadPacket) -> list[OpOverload]:
    """An operator with its overloads, or the one overload that it is."""
    if isinstance(operator, OpOverload):
        return [operator]
    names: list[str] = operator.overloads()  # type: ignore[no-untyped-call]
    return [getattr(operator, name) for name in names]


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


def definitions(operators: Iterable[OpOverload]) -> Definitions:
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
        recipe: its definition by value, pickled, where they are not enough; or why there is none.
    """

    name: str
    identity: Identity
    modules: tuple[str, ...]
    libraries: tuple[str, ...]
    recipe: bytes | str

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
            raise MissingOperator(f"operator {self.name}: {'; '.join((*tried, self.recipe))}: {_ADVICE}")
        try:
            pickle.loads(self.recipe).define(self.name)
        except Exception as error:
            reason = "; ".join((*tried, first_line(error)))
            raise MissingOperator(f"operator {self.name} cannot be defined here: {reason}: {_ADVICE}") from error
        operator = _lookup(self.name)
        if operator is None or _identity(operator).functions != self.identity.functions:
            reason = "its functions read what is different in a worker, such as a setting of a module"
            raise MissingOperator(f"operator {self.name} cannot be defined here: {reason}")
        _defined[self.name] = self.recipe, operator

    def _imports(self) -> Iterator[tuple[str, Callable[[str], Any]]]:
        yield from ((name, importlib.import_module) for name in self.modules)
        yield from ((path, torch.ops.load_library) for path in self.libraries)

    def _is_here(self) -> bool:
        operator = _lookup(self.name)
        recipe, defined = _defined.get(self.name, (b"", None))
        if operator is None or operator is not defined:
            return operator is not None and _identity(operator) == self.identity
        return recipe == self.recipe


_defined: dict[str, tuple[bytes, OpOverload | None]] = {}
"""In a worker: the operators that were defined by value, and from what."""


def _lookup(name: str) -> OpOverload | None:
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    found: Any = getattr(getattr(torch.ops, namespace), packet, None)
    found = getattr(found, overload or "default", None)
    return found if isinstance(found, OpOverload) else None


def _describe(operator: OpOverload, found: dict[str, Definition], within: tuple[str, ...]) -> None:
    name = operator._name
    if name in found or name in within:  # an operator may occur in its own gradient
        return
    local = _is_local(operator)  # then importing its module would not define it
    modules = () if local else tuple(_modules(operator))
    libraries = () if local else tuple(_libraries(operator))
    needed: dict[str, Definition] = dict(found)
    recipe: bytes | str
    try:
        recipe, others = _pickle(_recipe(operator), operator)
        for other in others:
            _describe(other, needed, (*within, name))
        found.update(needed)
    except Unshippable as error:
        if not (modules or libraries):
            raise Unshippable(f"a custom operator that a worker cannot be given, {name}: {error}") from error
        recipe = str(error)
    found[name] = Definition(name, _identity(operator), modules, libraries, recipe)


# By value


@dataclasses.dataclass(frozen=True)
class CustomOp:
    """What `torch.library.custom_op` and the methods of what it returns were given, without the kernels."""

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
        arguments = torch._C.parse_schema(name + self.schema).arguments
        mutated = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
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
            _libraries_here.pop(name)._destroy()
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


def _recipe(operator: OpOverload) -> CustomOp | LibraryOp:
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
        schema = str(operator._schema).partition("::")[2]
        assert fake is not None
        return LibraryOp(schema, tuple(operator.tags), tuple(k for k, _ in keys if k in _COMPUTING), fake, effect)
    return CustomOp(
        definition._schema,
        tuple(definition._tags),
        tuple(definition._backend_fns),
        definition._abstract_fn,
        definition._backward_fn,
        definition._setup_context_fn,
        definition._vmap_fn,
        dispatcher.autocast_dtypes(definition),
        dict(definition._torch_dispatch_fns),
        effect,
    )


def _pickle(recipe: CustomOp | LibraryOp, operator: OpOverload) -> tuple[bytes, list[OpOverload]]:
    """A recipe as bytes, and the custom operators that its functions name."""
    with io.BytesIO() as stream, ExitStack() as stack:
        for name in {_module(function) for _, function in _functions(operator)}:
            if _is_importable(name) and not _is_torch(name):
                stack.enter_context(_by_value(sys.modules[name]))
        pickler = _Pickler(stream)
        try:
            pickler.dump(recipe)
        except Unshippable:
            raise
        except Exception as error:
            raise Unshippable(f"its definition cannot be pickled: {first_line(error)}") from error
        return stream.getvalue(), list(pickler.named_operators())


@contextmanager
def _by_value(module: types.ModuleType) -> Iterator[None]:
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
        self._held: dict[str, OpOverload] = {}

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, dispatcher.CustomOpDef):
            obj = obj._opoverload
        if isinstance(obj, OpOverload):
            if is_custom(obj):
                self._held[obj._name] = obj
            return OperatorByName, (obj._name,)
        if isinstance(obj, OpOverloadPacket):
            namespace, _, name = obj._qualified_op_name.partition("::")
            self._namespaces.add(namespace)
            self._names.add(name)
            return _packet, (namespace, name)
        if isinstance(obj, type(torch.ops)):
            return _torch_ops, ()
        if isinstance(obj, type(torch.ops.aten)):
            self._namespaces.add(obj.name)
            return getattr, (torch.ops, obj.name)
        if isinstance(obj, torch.Tensor):
            raise Unshippable("its definition holds a tensor, which would be a copy in a worker")
        if type(obj).__module__.startswith("triton.") and hasattr(obj, "fn"):
            return triton_kernels.imported, triton_kernels.module_and_name(obj)
        if isinstance(obj, types.FunctionType):
            self._names.update(_names(obj.__code__))
        return super().reducer_override(obj)

    def named_operators(self) -> Iterator[OpOverload]:
        """Held as such, or written as `torch.ops.namespace.name` in a function's code."""
        yield from self._held.values()
        written = {n for n in self._names if isinstance(vars(torch.ops).get(n), type(torch.ops.aten))}
        for namespace in sorted((self._namespaces | written) - _TORCH_NAMESPACES):
            operators = getattr(torch.ops, namespace)
            for name in sorted(self._names):
                packet = getattr(operators, name, None)
                if isinstance(packet, OpOverloadPacket):
                    yield from overloads(packet)


class OperatorByName:
    """An operator that a definition holds: looked up at each use, since it may be defined after this, or anew."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._operator()(*args, **kwargs)

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # asked for by pickle before there is a name
            raise AttributeError(attribute)
        return getattr(self._operator(), attribute)

    def _operator(self) -> OpOverload:
        operator = _lookup(self._name)
        if operator is None:
            raise MissingOperator(f"operator {self._name} was not sent along: {_ADVICE}")
        return operator


def _packet(namespace: str, name: str) -> Any:
    return getattr(getattr(torch.ops, namespace), name)


def _torch_ops() -> Any:
    return torch.ops


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


# By import


def _modules(operator: OpOverload) -> Iterator[str]:
    """The modules that may define an operator, the likeliest first."""
    named = [_module(function) for _, function in _functions(operator)]
    definition = dispatcher.custom_op_def(operator)
    if definition is not None:
        named.append(_module(definition._init_fn))
    by_file = {getattr(module, "__file__", None): name for name, module in list(sys.modules.items())}
    named += [by_file[file] for file in dispatcher.registered_at(operator) if file in by_file]
    named += [name for name in (dispatcher.stub_module(operator), operator.namespace) if name]
    yield from (name for name in dict.fromkeys(named) if _is_importable(name) and not _is_torch(name))


def _is_local(operator: OpOverload) -> bool:
    """Whether `__main__` defines the operator, or what a function made."""
    definition = dispatcher.custom_op_def(operator)
    functions = [function for _, function in _functions(operator)] + ([definition._init_fn] if definition else [])
    own = [f for f in functions if not _is_torch(_module(f))]
    return any(_module(f) == "__main__" or "<locals>" in getattr(f, "__qualname__", "") for f in own)


def _module(function: Any) -> str:
    return getattr(function, "__module__", None) or ""


def _is_torch(module: str) -> bool:
    return module.partition(".")[0] == "torch"


def _is_importable(module: str) -> bool:
    return module != "__main__" and getattr(sys.modules.get(module), "__spec__", None) is not None


def _libraries(operator: OpOverload) -> Iterator[str]:
    if not dispatcher.defined_in_python(operator):
        yield from sorted(torch.ops.loaded_libraries)


class Identity(NamedTuple):
    """Digests, the same in each process: what the dispatcher has of an operator, and what its functions do."""

    registrations: str
    functions: str


def _identity(operator: OpOverload) -> Identity:
    registrations = dispatcher.registrations(operator) + str(sorted(map(str, operator.tags)))
    functions = [f"{role} {_text(function, set())}" for role, function in _functions(operator)]
    return Identity(*(hashlib.sha256(t.encode()).hexdigest() for t in (registrations, "\n".join(functions))))


def _functions(operator: OpOverload) -> list[tuple[str, Any]]:
    """The Python functions that define an operator, as far as `torch.library` keeps them; not its kernels."""
    definition = dispatcher.custom_op_def(operator)
    if definition is None:
        functions = {"fake": dispatcher.fake_impl(operator)}
    else:
        functions = {
            "fake": definition._abstract_fn,
            "backward": definition._backward_fn,
            "setup_context": definition._setup_context_fn,
            "vmap": definition._vmap_fn,
            **{cls.__qualname__: function for cls, function in definition._torch_dispatch_fns.items()},
        }
    return [(role, function) for role, function in functions.items() if function is not None]


def _text(value: Any, seen: set[int], names: frozenset[str] = frozenset()) -> str:
    """What a function does, as text: its code, and what that reads of its module and of the scopes around it.

    Of a module, the plain values that the code reads of it; of an object, its class. The rest comes with imports.

    Args:
        value: a function, or what one reads.
        seen: ids of functions that are in the text, and of what is being looked into.
        names: the names in the code that reads `value`.
    """
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, (dispatcher.CustomOpDef, OpOverload, OpOverloadPacket, OperatorByName)):
        return "operator"
    value = getattr(value, "__func__", value)
    if id(value) in seen:
        return getattr(value, "__qualname__", "itself")
    seen.add(id(value))
    if isinstance(value, types.FunctionType):
        return _function_text(value, seen)
    if isinstance(value, (list, tuple)):
        text = str([_text(item, seen) for item in value])
    elif isinstance(value, (set, frozenset)):
        text = str(sorted(_text(item, seen) for item in value))
    elif isinstance(value, dict):
        text = str(sorted((_text(k, seen), _text(v, seen)) for k, v in value.items()))
    elif isinstance(value, types.ModuleType):
        settings = [(n, vars(value)[n]) for n in sorted(names & set(vars(value)))]
        text = f"{value.__name__} {[(n, s) for n, s in settings if isinstance(s, _PLAIN)]}"
    else:
        text = type(value).__qualname__
    seen.discard(id(value))
    return text


def _function_text(function: types.FunctionType, seen: set[int]) -> str:
    if _is_torch(_module(function)):
        return function.__qualname__
    code, values = function.__code__, function.__globals__
    names = frozenset(_names(code))
    reads = {n: _text(values[n], seen, names) for n in sorted(_globals_read(code)) if n in values}
    cells = [_text(cell.cell_contents, seen, names) for cell in function.__closure__ or ()]
    return f"{_code(code)} {_text(function.__defaults__, seen)} {cells} {reads}"


_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


def _globals_read(code: types.CodeType) -> set[str]:
    read = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    return read.union(*(_globals_read(c) for c in code.co_consts if isinstance(c, types.CodeType)))


def _code(code: types.CodeType) -> str:
    def text(constant: Any) -> str:
        if isinstance(constant, types.CodeType):
            return _code(constant)
        return str(sorted(map(repr, constant))) if isinstance(constant, frozenset) else repr(constant)

    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {[text(c) for c in code.co_consts]}"
