"""A store as one file, to be shipped in a container image or to another machine.

An archive is a tar file of what the store's folder holds. Whoever makes it can run code in each program that uses
the store that it is brought into.
"""

from __future__ import annotations

import contextlib
import os
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

from ...errors import UnusableArchive, UnusableArtifact, first_line
from ..seal import unseal
from .disk import NOTE, SUFFIX, Disk

_NAME = re.compile(rf"[0-9a-f]{{64}}({re.escape(SUFFIX)}|{re.escape(NOTE)})")


class Imported(NamedTuple):
    """How many artifacts an archive had, and why some of them are of no use here."""

    artifacts: int
    refused: list[str]


def export(store: Disk, file: Path) -> int:
    """Write all of `store` into `file`; returns how many artifacts that were.

    Raises:
        OSError: the file cannot be written.
    """
    part, artifacts = file.with_name(file.name + ".part"), 0
    try:
        with tarfile.open(part, "w") as archive:
            for name in sorted(filter(_NAME.fullmatch, os.listdir(store.folder))):
                with contextlib.suppress(FileNotFoundError):  # evicted meanwhile
                    archive.add(os.path.join(store.folder, name), name, recursive=False)
                    artifacts += name.endswith(SUFFIX)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    return artifacts


def import_archive(store: Disk, file: Path) -> Imported:
    """Put what `export` has written into `store`. Nothing in the file is unpickled.

    Raises:
        UnusableArchive: it cannot be read, or is no such file.
    """
    artifacts, refused = 0, []
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isreg() and _NAME.fullmatch(member.name) else None
                if content is None:
                    raise UnusableArchive(f"{file} holds {member.name!r}, which no store has")
                data = content.read()
                if member.name.endswith(SUFFIX):
                    try:
                        unseal(data)
                    except UnusableArtifact as error:
                        refused.append(str(error))
                        continue
                    artifacts += 1
                store.write(member.name, data)
        store.evict()
    except (tarfile.TarError, OSError) as error:
        raise UnusableArchive(f"{file} cannot be brought in: {first_line(error)}") from error
    return Imported(artifacts, refused)
