"""The site builds without a warning, and every page is in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .blocks import ROOT, pages


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, reason='needs the extra "docs"')
    words = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "-q",
        "-d",
        str(tmp_path / "trees"),
        ROOT / "docs",
        tmp_path / "site",
    ]
    built = subprocess.run(words, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    for page in pages():
        if page.is_relative_to(ROOT / "docs"):
            assert (tmp_path / "site" / page.relative_to(ROOT / "docs").with_suffix(".html")).exists()
