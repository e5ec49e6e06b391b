"""frame_swap keeps the rules of `contract.rules`, and each rule finds violations that are planted for it."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from . import source_tree
from .rules import PRIVATE_NAMES, RULES, Allowed, Violation, reached_privately

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", RULES)
def test_the_tree_keeps(name: str) -> None:
    found = RULES[name](ROOT)
    assert not found, "\n".join(map(str, found))


def planted(root: Path, files: dict[str, str]) -> Path:
    """Write `files`, and an empty `__init__.py` into each folder that has none; return the tree's root."""
    for name, text in {"frame_swap/__init__.py": "", "guards/__init__.py": "", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for folder in path.relative_to(root).parents:
            if folder.parts and not (root / folder / "__init__.py").exists():
                (root / folder / "__init__.py").touch()
    return root


MODULES = {
    f"frame_swap/{name}.py": ""
    for name in (
        "artifacts/wrappers",
        "checking/trial",
        "codegen/bytecodes",
        "codegen/source",
        "errors",
        "farm/local/worker",
        "farm/service",
        "frames/call_site",
        "late_guards/shapes",
        "region",
        "serving/eager",
        "shipping/ship",
        "ui/demo",
    )
}
"""Modules for planted lines to import."""

PLANTED = [
    # Upward, sideways, from a function, and for types only without a reason
    (
        "layers",
        "frame_swap/frames/new.py",
        "from ..serving import eager",
        "imports frame_swap.serving.eager, which",
    ),
    ("layers", "frame_swap/region.py", "from . import backend", "imports frame_swap, which is not below"),
    ("layers", "frame_swap/checking/new.py", "import frame_swap.late_guards.shapes", "imports frame_swap.late"),
    ("layers", "frame_swap/runtime/new.py", "def f():\n from ..region import State", "imports frame_swap.region"),
    (
        "layers",
        "frame_swap/internals/new.py",
        "import importlib\nimportlib.import_module('frame_swap.region')",
        "imports frame_swap.region, which is not below",
    ),
    (
        "layers",
        "frame_swap/codegen/new.py",
        "if TYPE_CHECKING:\n from ..frames import call_site",
        "imports frame_swap.frames.call_site, which is not below",
    ),
    ("layers", "frame_swap/attic.py", "", "is in a room without a layer"),
    (
        "no_frames",
        "frame_swap/farm/new.py",
        "from ..frames import call_site",
        "imports frame_swap.frames.call_site",
    ),
    (
        "no_frames",
        "frame_swap/shipping/new.py",
        "from ..codegen import bytecodes",
        "imports frame_swap.codegen.bytecodes",
    ),
    (
        "no_frames",
        "frame_swap/artifacts/new.py",
        "def f():\n from ..serving.eager import eager_code",
        "imports frame_swap.serving.eager",
    ),
    ("no_processes", "frame_swap/frames/new.py", "from ..farm import service", "imports frame_swap.farm.service"),
    ("no_processes", "frame_swap/frames/new.py", "import concurrent.futures", "imports concurrent.futures"),
    ("no_processes", "frame_swap/codegen/new.py", "def f():\n import loky", "imports loky"),
    ("no_processes", "frame_swap/codegen/new.py", "import os\nos.fork()", "uses os.fork"),
    ("no_processes", "frame_swap/codegen/new.py", "from os import posix_spawn", "imports os.posix_spawn"),
    ("ui_is_a_leaf", "frame_swap/backend.py", "from .ui import demo", "imports frame_swap.ui.demo"),
    ("guards_stand_alone", "guards/new.py", "from ..errors import Indirect", "imports frame_swap.errors"),
    ("guards_stand_alone", "guards/new.py", "import frame_swap", "imports frame_swap"),
    # Modules, names in modules, and public ones of private modules
    ("private_names", "frame_swap/region.py", "import torch._dynamo", "reaches torch._dynamo"),
    ("private_names", "frame_swap/region.py", "def f():\n from torch import _C", "reaches torch._C"),
    (
        "private_names",
        "frame_swap/region.py",
        "from torch.utils._pytree import tree_map",
        "reaches torch.utils._pytree.tree_map",
    ),
    ("private_names", "frame_swap/region.py", "from functorch.compile import nop", "reaches functorch.compile.nop"),
    (
        "private_names",
        "frame_swap/region.py",
        "import importlib\nimportlib.import_module('torch._ops')",
        "reaches torch._ops",
    ),
    # Attributes of torch's, even where the module has the same name of its own, and of other objects
    ("private_names", "frame_swap/region.py", "import torch\n_C = 0\ntorch._C.f()", "reaches torch._C"),
    (
        "private_names",
        "frame_swap/region.py",
        "from torch import nn\nnn.Module._call_impl",
        "reaches torch.nn.Module._call_impl",
    ),
    ("private_names", "frame_swap/region.py", "def f(tensor):\n return tensor._base", "reaches tensor._base"),
    ("private_names", "frame_swap/region.py", "def _base(_base):\n return tensor._base", "reaches tensor._base"),
    ("private_names", "frame_swap/region.py", "class A:\n _name = 1\nop._name", "reaches op._name"),
    ("private_names", "frame_swap/region.py", "def f(gm):\n gm()._foo = 1", "reaches ...._foo"),
    # By name, in generated code, and in the name of a logger
    ("private_names", "frame_swap/region.py", "def f(x):\n return getattr(x, '_schema', 0)", "reaches _schema"),
    ("private_names", "frame_swap/region.py", "def f(x):\n patched(x, '_schema', 0)", "reaches _schema"),
    ("private_names", "frame_swap/region.py", "LINE = 'y = x._version'", "reaches x._version"),
    ("private_names", "frame_swap/region.py", "LINE = f'{name} = x._version'", "reaches x._version"),
    ("private_names", "frame_swap/region.py", "log = getLogger('torch._dynamo')", "reaches torch._dynamo"),
    ("no_mock", "frame_swap/artifacts/new.py", "def f():\n from unittest import mock", "imports unittest.mock"),
    ("no_mock", "guards/new.py", "import unittest.mock as m", "imports unittest.mock"),
    ("workers_start_without_torch", "frame_swap/farm/local/worker.py", "import torch.fx", "imports torch.fx"),
    ("workers_start_without_torch", "frame_swap/__init__.py", "try:\n import torch\nexcept: pass", "imports torch"),
    ("modules_are_short", "frame_swap/region.py", "x = 1\n" * 401, "has 401 lines"),
]


@pytest.mark.parametrize(("rule", "file", "text", "found"), PLANTED)
def test_what_is_planted_is_found(rule: str, file: str, text: str, found: str, tmp_path: Path) -> None:
    root = planted(tmp_path, MODULES)
    assert RULES[rule](root) == []
    planted(root, {file: text})
    (violation,) = RULES[rule](root)
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert violation.module == module.replace("guards", "frame_swap.guards")
    assert violation.what.startswith(found)


INNOCENT = """\
from __future__ import annotations
import functools
import os.path
from collections import namedtuple
import torch
from torch import nn

class Thing:
    def __init__(self):
        self._one = 1
    def __eq__(self, other):
        return self._one == other._one
    def _two(self):
        return getattr(self, "_one"), cls._three, self.__dict__, torch.__version__

def _helper(thing, _):
    'Docstrings may say torch._dynamo, and so may messages.'
    raise ValueError("see torch._dynamo.config and others", thing._two(), pair._replace(x=1))
"""


def test_what_is_allowed_is_not_found(tmp_path: Path) -> None:
    root = planted(
        tmp_path,
        {
            **MODULES,
            "frame_swap/region.py": INNOCENT,
            "frame_swap/shipping/new.py": "from ..codegen import source\nfrom .. import guards, region",
            "frame_swap/internals/dynamo.py": "import torch._dynamo\nx = torch._C",
            "frame_swap/farm/local/worker.py": "from ... import errors\ndef f():\n import torch",
            "frame_swap/ui/new.py": "from . import demo\nfrom ..serving import eager",
            "frame_swap/__main__.py": "from .ui import demo",
        },
    )
    without_packages = {name: rule for name, rule in RULES.items() if name != "packages_are_installed"}
    assert {name: rule(root) for name, rule in without_packages.items()} == {name: [] for name in without_packages}


@pytest.mark.parametrize("allowed", PRIVATE_NAMES, ids=lambda allowed: allowed.name)
def test_each_exception_is_still_needed(allowed: Allowed) -> None:
    assert any(allowed(module, name) for module, _, name in reached_privately(ROOT))


def test_an_exception_is_for_one_place_and_name() -> None:
    allowed = Allowed("frame_swap.farm", "os._exit", "for the test")
    nothing = ast.parse("")
    at = {
        name: source_tree.Module(name, False, nothing, 0) for name in ("frame_swap.farm.job", "frame_swap.farmers")
    }
    assert allowed(at["frame_swap.farm.job"], "os._exit")
    assert not allowed(at["frame_swap.farm.job"], "sos._exit")
    assert not allowed(at["frame_swap.farmers"], "os._exit")


# Checks of a built wheel, and of a process


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the source tree, with the link to guards."""
    root = tmp_path / "tree"
    for name in ("frame_swap", "guards"):
        shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    return root


def test_a_package_that_is_not_installed_is_found(copied: Path) -> None:
    rule = RULES["packages_are_installed"]
    assert rule(copied) == []
    project = copied / "pyproject.toml"
    project.write_text(project.read_text().replace('include = ["frame_swap*"]', 'include = ["frame_swap"]'))
    assert Violation("frame_swap.farm.local", 1, "is not installed") in rule(copied)
    assert Violation("frame_swap.guards", 1, "is not installed") in rule(copied)
    project.write_text(project.read_text().replace('include = ["frame_swap"]', 'include = ["frame_swap*"]'))
    planted(copied, {"frame_swap/attic/notes.py": ""})
    (copied / "frame_swap" / "attic" / "__init__.py").unlink()
    assert rule(copied) == [Violation("frame_swap.attic", 1, "is installed, and is no package")]


def wheel(root: Path) -> set[str]:
    """Build a wheel with this environment's setuptools, without the network; return the names of its files."""
    program = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", program, str(root)], cwd=root, check=True, capture_output=True, timeout=200
    )
    (built,) = root.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        return set(archive.namelist())


def test_a_wheel_holds_frame_swap_and_nothing_else(copied: Path) -> None:
    files = wheel(copied)
    assert {name.split("/")[0].partition("-")[0] for name in files} == {"frame_swap"}
    code = {name for name in files if ".dist-info/" not in name}
    on_disk = {str(path.relative_to(copied)) for path in copied.glob("frame_swap/**/*.py")}
    on_disk |= {f"frame_swap/guards/{path.name}" for path in (copied / "guards").iterdir()}
    assert code == on_disk | {"frame_swap/py.typed"}


def test_another_package_in_a_wheel_is_seen(copied: Path) -> None:
    project = copied / "pyproject.toml"
    project.write_text(project.read_text().replace('include = ["frame_swap*"]', 'include = ["*"]'))
    assert "guards/predicate.py" in wheel(copied)


def imported_by_a_worker(root: Path) -> set[str]:
    """Top-level modules in a new process that imports a worker's first module from `root`."""
    program = (
        "import sys, frame_swap.farm.local.worker as w; print(w.__file__, *{n.split('.')[0] for n in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "FRAME_SWAP_WORKER": "1"},
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    file, *names = done.stdout.split()
    assert Path(file).is_relative_to(root)
    return {name.split(".")[0] for name in names}


def test_a_worker_starts_without_torch(copied: Path) -> None:
    assert not {"torch", "sympy", "numpy", "loky", "rich"} & imported_by_a_worker(ROOT)
    worker = copied / "frame_swap" / "errors.py"  # which the worker's module imports
    worker.write_text(worker.read_text() + "\nimport torch\n")
    assert "torch" in imported_by_a_worker(copied)
