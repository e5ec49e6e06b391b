"""The commands of `python -m frame_swap`; the demo has a module of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from frame_swap.ui import command_line

pytestmark = pytest.mark.fast


def test_help_without_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "frame_swap"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "demo" in done.stdout


def test_a_folder_without_a_difference_ends_with_the_reason(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with pytest.raises(SystemExit, match=r"frame-swap: .* is no folder that frame-swap wrote"):
        command_line.main(["repro", str(tmp_path)])
