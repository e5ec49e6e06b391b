"""Which files an operator's definition can depend on."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from frame_swap.shipping.operators import sources

pytestmark = pytest.mark.quick

FILES = {
    "operator_here.py": "import torch, package.inner\nfrom package import sibling\nimport no_such_module\n"
    "def late():\n    from package.lazy import thing\n    import extension\n",
    "package/__init__.py": "from . import relative\n",
    "package/inner.py": "from .deeper.leaf import name\n",
    "package/deeper/__init__.py": "",
    "package/deeper/leaf.py": "name = 1\n",
    "package/sibling.py": "",
    "package/relative.py": "def late(): import operator_here\n",
    "package/lazy.py": "thing = 2\n",
    "package/unrelated.py": "",
    "unrelated.py": "",
    "lib/site-packages/installed/__init__.py": "import installed.part\n",
    "lib/site-packages/installed/part.py": "",
    "extension.so": "no Python",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "lib" / "site-packages")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def changed(file: Path) -> str:
    before = sources.digest(["operator_here"])
    file.write_text(file.read_text() + "# changed\n")
    return before


USED = ["operator_here", "package/__init__", "package/inner", "package/deeper/__init__", "package/deeper/leaf"]
USED += ["package/sibling", "package/relative", "package/lazy"]


@pytest.mark.parametrize("name", [f"{name}.py" for name in USED] + ["extension.so"])
def test_a_change_of_what_is_imported_anywhere_changes_the_digest(folder: Path, name: str) -> None:
    before = changed(folder / name)
    assert sources.digest(["operator_here"]) != before


@pytest.mark.parametrize("name", ["package/unrelated.py", "unrelated.py"])
def test_a_change_of_another_file_does_not(folder: Path, name: str) -> None:
    before = changed(folder / name)
    assert sources.digest(["operator_here"]) == before


def test_nothing_is_imported_and_what_was_imported_does_not_matter(folder: Path) -> None:
    before = sources.digest(["operator_here"])
    assert "package" not in sys.modules
    __import__("package.deeper.leaf")
    try:
        assert sources.digest(["operator_here"]) == before
    finally:
        for name in ("package", "package.relative", "package.deeper", "package.deeper.leaf", "operator_here"):
            sys.modules.pop(name, None)


def test_of_an_installed_package_the_first_file_counts(folder: Path) -> None:
    (folder / "unrelated.py").write_text("import installed\n")
    before = sources.digest(["unrelated"])
    (folder / "lib/site-packages/installed/part.py").write_text("x = 1")
    assert sources.digest(["unrelated"]) == before
    os.utime(folder / "lib/site-packages/installed/__init__.py", (1, 1))
    assert sources.digest(["unrelated"]) != before


def test_a_module_may_appear(folder: Path) -> None:
    before = sources.digest(["operator_here"])
    (folder / "no_such_module.py").write_text("")
    sys.path_importer_cache.clear()
    assert sources.digest(["operator_here"]) != before


def test_of_main_what_it_imports_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = folder / "main.py"
    main.write_text("import unrelated\n")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(main), raising=False)
    before = sources.digest(["__main__"])
    main.write_text("import unrelated\nx = 1\n")
    assert sources.digest(["__main__"]) == before, "its functions travel by value"
    (folder / "unrelated.py").write_text("x = 2\n")
    assert sources.digest(["__main__"]) != before


def test_a_file_that_is_no_python_has_no_imports(folder: Path) -> None:
    (folder / "unrelated.py").write_text("this is no Python")
    assert sources.digest(["unrelated"])
