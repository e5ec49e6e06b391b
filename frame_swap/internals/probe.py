"""Which private names of torch are missing, and which versions of torch frame-swap is tested on.

The other modules of this package look up most names when they are imported, inside `names_looked_up`. A missing
name is recorded here; the backend then compiles with stock Inductor and warns once. Names of Inductor are imported
in the functions that use them, since importing Inductor takes most of a second; a name that is missing there fails
the region. `missing_anywhere` tries these too.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

__all__ = [
    "CHECKED",
    "missing",
    "missing_anywhere",
    "missing_from",
    "names_looked_up",
    "private_names",
    "private_names_of",
    "version_checked",
]

CHECKED = "2.11 to 2.15"

_missing: list[str] = []


@contextlib.contextmanager
def names_looked_up() -> Iterator[None]:
    """Within the block, private names of torch are imported; the first that is missing is recorded, not raised.

    The block ends there, so that later names of the same block do not exist either.
    """
    try:
        yield
    except ImportError as error:
        _missing.append(str(error))
    except AttributeError as error:
        owner = "" if isinstance(error.obj, ModuleType) else f" ({type(error.obj).__module__})"
        _missing.append(f"{error}{owner}")


def missing() -> str | None:
    """The first private name that this torch lacks, with its module; of names that are looked up at import."""
    for module in pkgutil.iter_modules([str(_PACKAGE)]):
        importlib.import_module(f"{__package__}.{module.name}")
    return _missing[0] if _missing else None


def version_checked() -> bool:
    """Whether this torch is of a version that frame-swap is tested on."""
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return (2, 11) <= (major, minor) <= (2, 15)


# --- All names, read from the source: for tests, and for porting to a new torch ---

_PACKAGE = Path(__file__).parent


def missing_anywhere() -> list[str]:
    """All names of torch that this package uses and this torch lacks, each with its module. Imports Inductor."""
    return [name for path in sorted(_PACKAGE.glob("*.py")) for name in missing_from(path)]


def missing_from(source: Path) -> list[str]:
    """All names of torch that a Python file uses and that this torch lacks, each with its module.

    These are the names that the file imports, at any place, and the attributes of modules that it uses. A `try`
    that catches `ImportError` or `AttributeError` is left out, and so are attributes that are looked up with
    `hasattr`, or with `getattr` and a default: some versions of torch lack these.
    """
    return list(dict.fromkeys(_names(source).missing))


def private_names() -> list[str]:
    """All private names of torch that this package uses, each with its module, whether this torch has them or not.

    Names that are looked up as `missing_from` says are among them, the others are not. Imports Inductor.
    """
    return sorted({name for path in _PACKAGE.glob("*.py") for name in private_names_of(path)})


def private_names_of(source: Path) -> list[str]:
    """All private names of torch that a Python file uses, each with its module."""
    return sorted({name for name in _names(source).tried if any(map(_is_private, name.split(".")))})


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def _names(source: Path) -> _Names:
    tree = ast.parse(source.read_text(encoding="utf-8"))
    names = _Names(tree)
    names.visit(tree)
    return names


class _Names(ast.NodeVisitor):
    """Tries each name of torch. Keeps the names bound to objects of torch, by scope."""

    def __init__(self, tree: ast.Module) -> None:
        self.missing: list[str] = []
        self.tried: list[str] = []
        self._bound: dict[str, Any] = {}
        self._optional = {
            node.args[1].value
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and (node.func.id, len(node.args)) in (("hasattr", 2), ("getattr", 3))
            and isinstance(node.args[1], ast.Constant)
        }
        self._constants = {
            node.targets[0].id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Constant)
        }

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if _of_torch(alias.name) and (module := self._module(alias.name)) is not None:
                self._bound[alias.asname or "torch"] = module if alias.asname else torch

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level or node.module is None or not _of_torch(node.module):
            return
        module = self._module(node.module)
        for alias in node.names if module is not None else ():
            if not hasattr(module, alias.name):
                with contextlib.suppress(ImportError):
                    importlib.import_module(f"{node.module}.{alias.name}")
            self._bind(alias.asname or alias.name, module, alias.name)

    def visit_Call(self, node: ast.Call) -> None:
        if ast.unparse(node.func) == "importlib.import_module":
            name = node.args[0]
            module = name.value if isinstance(name, ast.Constant) else self._constants.get(ast.unparse(name))
            if _of_torch(str(module)):
                self._module(str(module))
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._resolve(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outside = self._bound
        parameters = {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
        assigned = {
            name.id for name in ast.walk(node) if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
        }
        self._bound = {name: value for name, value in outside.items() if name not in parameters | assigned}
        self.generic_visit(node)
        self._bound = outside

    def visit_Try(self, node: ast.Try) -> None:
        caught = " ".join(ast.unparse(handler.type) for handler in node.handlers if handler.type is not None)
        if "ImportError" in caught or "AttributeError" in caught:
            return
        self.generic_visit(node)

    def _module(self, name: str) -> ModuleType | None:
        self.tried.append(name)
        try:
            return importlib.import_module(name)
        except ImportError as error:
            self.missing.append(str(error))
            return None

    def _bind(self, name: str, module: Any, attribute: str) -> None:
        self.tried.append(f"{module.__name__}.{attribute}")
        if hasattr(module, attribute):
            self._bound[name] = getattr(module, attribute)
        else:
            self.missing.append(f"cannot import name {attribute!r} from {module.__name__!r}")

    def _resolve(self, node: ast.expr) -> Any:
        """The module or other object that `node` names; None if it is no attribute of a module of torch."""
        if isinstance(node, ast.Name):
            return self._bound.get(node.id)
        if not isinstance(node, ast.Attribute):
            self.visit(node)
            return None
        owner = self._resolve(node.value)
        if not isinstance(owner, ModuleType) or node.attr in self._optional:
            return None
        self.tried.append(f"{owner.__name__}.{node.attr}")
        if not hasattr(owner, node.attr):
            self.missing.append(f"module {owner.__name__!r} has no attribute {node.attr!r}")
        return getattr(owner, node.attr, None)


def _of_torch(module: str) -> bool:
    return module.partition(".")[0] == "torch"
