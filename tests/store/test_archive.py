"""A store as one file."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from frame_swap.artifacts.store import archive
from frame_swap.artifacts.store.disk import SUFFIX, Disk
from frame_swap.errors import UnusableArchive

from .holder import KEY, store_in
from .test_disk import ENTRY, OTHER, file_of

pytestmark = pytest.mark.quick


def test_an_archive_brings_artifacts_and_profiles_into_another_store(store: Disk, tmp_path: Path) -> None:
    store.put(KEY, ENTRY)
    store.keep_note(OTHER, b"{}")
    Path(store.folder, "something.else").write_bytes(b"")
    assert archive.export(store, tmp_path / "kept.tar") == 1
    there = store_in(tmp_path / "there")
    assert archive.import_archive(there, tmp_path / "kept.tar") == archive.Imported(1, [])
    assert there.get(KEY) == ENTRY
    assert there.note(OTHER) == b"{}"
    assert len(list(Path(there.folder).iterdir())) == 2


def test_what_is_damaged_in_an_archive_is_refused(store: Disk, tmp_path: Path) -> None:
    store.put(KEY, ENTRY)
    file_of(store).write_bytes(file_of(store).read_bytes()[:-1])
    archive.export(store, tmp_path / "kept.tar")
    brought = archive.import_archive(store, tmp_path / "kept.tar")
    assert brought.artifacts == 0
    assert len(brought.refused) == 1


@pytest.mark.parametrize("name", ["../" + KEY + SUFFIX, "/" + KEY + SUFFIX, KEY, "x" + SUFFIX])
def test_an_archive_writes_nowhere_else(store: Disk, tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(UnusableArchive, match="which no store has"):
        archive.import_archive(store, tmp_path / "evil.tar")
    assert list(Path(store.folder).iterdir()) == []


def test_no_archive_is_an_error_that_says_so(store: Disk, tmp_path: Path) -> None:
    (tmp_path / "no.tar").write_bytes(b"nothing")
    with pytest.raises(UnusableArchive, match="cannot be brought in"):
        archive.import_archive(store, tmp_path / "no.tar")
