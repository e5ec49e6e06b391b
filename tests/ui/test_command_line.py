"""The commands of `python -m frame_swap`; the demo has a module of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from frame_swap import settings
from frame_swap.artifacts.store import chosen, disk, entry, profile
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


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> disk.Disk:
    """The store of the commands, with two artifacts, of which one program has used one."""
    folder = str(tmp_path / "store")
    monkeypatch.setenv("FRAME_SWAP_STORE", folder)
    filled = chosen.in_folder(folder, 1e9)
    assert isinstance(filled, disk.Disk)
    for key in (64 * "a", 64 * "b"):
        filled.put(key, entry.Entry(bytes(1_000_000), b"", b""))
    profile.write(filled, [profile.Use(64 * "a", "step, train.py:12", 7)], [])
    return filled


def test_the_cache_is_shown(store: disk.Disk, capsys: pytest.CaptureFixture[str]) -> None:
    command_line.main(["cache"])
    shown = capsys.readouterr().out
    assert f"{store.folder}: 2 artifacts, 2.0 MB of 5000.0 MB" in shown
    assert "step, train.py:12" in shown
    assert "bbbbbbbbbbbb" in shown
    command_line.main(["cache", "show"])
    assert capsys.readouterr().out == shown


def test_the_cache_is_pruned(store: disk.Disk, capsys: pytest.CaptureFixture[str]) -> None:
    command_line.main(["cache", "prune", "--limit", "0.0015"])
    assert "removed 1 artifacts, 1.0 MB" in capsys.readouterr().out
    command_line.main(["cache", "prune"])
    assert store.artifacts() == []
    command_line.main(["cache"])
    assert "0 artifacts" in capsys.readouterr().out


def test_the_cache_goes_through_a_file(
    store: disk.Disk, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(tmp_path / "kept.tar")
    command_line.main(["cache", "export", file])
    assert f"wrote 2 artifacts to {file}" in capsys.readouterr().out
    monkeypatch.setenv("FRAME_SWAP_STORE", str(tmp_path / "another"))
    settings._current = None
    command_line.main(["cache", "import", file])
    assert "took over 2 artifacts" in capsys.readouterr().out
    command_line.main(["cache"])
    assert "step, train.py:12" in capsys.readouterr().out


@pytest.mark.parametrize("what", ["import", "export"])
def test_a_file_that_cannot_be_used_is_named(store: disk.Disk, tmp_path: Path, what: str) -> None:
    with pytest.raises(SystemExit, match=r"frame-swap: .*nowhere"):
        command_line.main(["cache", what, str(tmp_path / "nowhere" / "kept.tar")])


def test_there_may_be_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="FRAME_SWAP_STORE=off"):
        command_line.main(["cache"])
