"""A store in a folder: one file an artifact.

Guarantees:
- A reader finds all of an artifact or nothing: files are written beside their place and moved there.
- What is damaged, cut short, put under another key, another user's, or writable for others, is a miss and a line in
  the log, and is removed where that can be done. Nothing of it is unpickled.
- Processes may read, write and evict at once, and be killed at any moment. What a killed one leaves behind is
  removed later.
- A claim ends when its process does, however that ends: it is a lock of the kernel's on a file. Where the folder's
  file system has no locks, or cannot be written to, each process compiles for itself.
- The folder stays below its limit, but for what was written since the last look. What was not used for longest goes
  first.

Assumed: the folder was checked (`folders`): only this user can write to it.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import os
import pickle
import stat
import time
from collections.abc import Iterator
from typing import NamedTuple

from ...errors import UnusableArtifact, first_line
from ..seal import seal_for, unseal_for
from .entry import Entry

log = logging.getLogger(__name__)

SUFFIX = ".artifact"
NOTE = ".note"
_TEMPORARY, _CLAIM, _EVICTION = ".part", ".claim", "eviction"

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

LEFT_BEHIND = 3600.0
"""Seconds after which a file that was never moved to its place, or a claim that nobody holds, is litter."""

LOW_WATER = 0.9
"""To how much of its limit the folder is brought when it is over it."""

CHECK_AFTER = 0.05
"""After how much was written, as a part of the limit, a process looks how large the folder has become."""


def packed(key: str, entry: Entry) -> bytes:
    """The file that keeps `entry` under `key`."""
    return seal_for(key, pickle.dumps(tuple(entry)))


class Artifact(NamedTuple):
    """An artifact of the store: its key, its size in bytes, and when it was last used (seconds since the epoch)."""

    key: str
    size: int
    used: float


class DiskClaim:
    """A lock on the file at `path`, which is open as `descriptor`; of no effect where that is None."""

    def __init__(self, path: str, descriptor: int | None) -> None:
        self._path, self._descriptor = path, descriptor

    def release(self) -> None:
        """Let others have it."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)  # before the lock ends: whoever waits looks whether its file is still there
            self.forget()

    def forget(self) -> None:
        """Close the file. A forked child does not unlock it by that: the parent has it open, too."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


class Disk:
    """A store in `folder`.

    Args:
        folder: exists, and only this user can write to it.
        limit: how many bytes it may take.
    """

    def __init__(self, folder: str, limit: float) -> None:
        self.folder, self.limit = folder, limit
        self._written_since_check = limit  # so that it looks at the first write
        self._numbers = itertools.count()

    is_far = False

    def fetch(self, key: str) -> None:
        """Nothing: all is here."""

    def get(self, key: str) -> Entry | None:
        """What is kept under `key`; None where there is nothing that this process can use."""
        path = self._path(key)
        try:
            found = Entry(*pickle.loads(unseal_for(key, _read(path))))
        except FileNotFoundError:
            return None
        except Exception as error:
            log.warning("frame-swap: %s cannot be used, and is compiled again: %s", path, first_line(error))
            if not isinstance(error, (OSError, MemoryError)):
                _remove(path)
            return None
        with contextlib.suppress(OSError):  # the folder may be read-only
            os.utime(path)
        return found

    def put(self, key: str, entry: Entry) -> str:
        """Keep `entry` under `key`; returns why it could not be done, or ""."""
        return self.put_file(key, packed(key, entry))

    def put_file(self, key: str, data: bytes) -> str:
        """The same, for what `packed` has returned, here or on another machine."""
        try:
            self.write(key + SUFFIX, data)
        except OSError as error:
            log.info("frame-swap: an artifact is not kept for the next run: %s", first_line(error))
            return first_line(error)
        self._written_since_check += len(data)
        if self._written_since_check > CHECK_AFTER * self.limit:
            self._written_since_check = 0
            self.evict()
            if not self.has(key):
                return "it takes more than store_limit allows"
        return ""

    def has(self, key: str) -> bool:
        """Whether anything is kept under `key`."""
        return os.path.exists(self._path(key))

    def note(self, name: str) -> bytes | None:
        """What `keep_note` was given last for this name, of hexadecimal digits."""
        path = os.path.join(self.folder, name + NOTE)
        try:
            found = _read(path)
        except (OSError, UnusableArtifact):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return found

    def keep_note(self, name: str, note: bytes) -> None:
        """Keep something small beside the artifacts, if it can be done; where `note` is empty, nothing."""
        if not note:
            _remove(os.path.join(self.folder, name + NOTE))
            return
        with contextlib.suppress(OSError):
            self.write(name + NOTE, note)

    def remove(self, key: str) -> None:
        """Keep nothing under `key`."""
        _remove(self._path(key))

    def claim(self, key: str) -> DiskClaim | None:
        """The claim to `key`; None while another process, or another thread of this one, has it."""
        path = os.path.join(self.folder, key + _CLAIM)
        try:
            while True:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.fstat(descriptor).st_ino == os.stat(path).st_ino:
                        return DiskClaim(path, descriptor)
                except BlockingIOError:
                    os.close(descriptor)
                    return None
                except FileNotFoundError:
                    pass  # whoever had it has removed the file: once more
                except BaseException:
                    os.close(descriptor)
                    raise
                os.close(descriptor)
        except OSError as error:
            log.info("frame-swap: other processes may compile the same: %s", first_line(error))
            return DiskClaim(path, None)

    def artifacts(self) -> list[Artifact]:
        """All artifacts, that which was not used for longest first."""
        return sorted((_artifact(*file) for file in self._files(SUFFIX)), key=lambda one: one.used)

    def notes(self) -> list[str]:
        """The names of all notes."""
        return sorted(name.removesuffix(NOTE) for name, _ in self._files(NOTE))

    def evict(self, limit: float | None = None) -> list[Artifact]:
        """Bring the folder below its limit, or below `limit` bytes; returns which artifacts were removed.

        Nothing is done while another process does it.
        """
        removed: list[Artifact] = []
        if (claim := self.claim(_EVICTION)) is None:
            return removed
        try:
            self._remove_litter()
            files = sorted(self._files(SUFFIX, NOTE), key=lambda file: file[1].st_mtime)
            size, most = sum(s.st_size for _, s in files), self.limit if limit is None else limit
            for name, found in files if size > most else ():
                if size <= LOW_WATER * most:
                    break
                if _remove(os.path.join(self.folder, name)):
                    size -= found.st_size
                    if name.endswith(SUFFIX):
                        removed.append(_artifact(name, found))
        except OSError as error:
            log.info("frame-swap: %s cannot be brought below its limit: %s", self.folder, first_line(error))
        finally:
            claim.release()
        return removed

    def write(self, name: str, data: bytes) -> None:
        """Write a file of the folder: beside its place, and then moved there.

        Raises:
            OSError: it cannot be done.
        """
        temporary = os.path.join(self.folder, f"{name}-{os.getpid()}-{next(self._numbers)}{_TEMPORARY}")
        try:
            with open(os.open(temporary, _NEW, 0o600), "wb") as file:
                file.write(data)
            os.replace(temporary, os.path.join(self.folder, name))
        except BaseException:
            _remove(temporary)
            raise

    def _path(self, key: str) -> str:
        return os.path.join(self.folder, key + SUFFIX)

    def _files(self, *suffixes: str) -> Iterator[tuple[str, os.stat_result]]:
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(suffixes):
                    with contextlib.suppress(FileNotFoundError):
                        yield entry.name, entry.stat(follow_symlinks=False)

    def _remove_litter(self) -> None:
        end = time.time() - LEFT_BEHIND
        for name, found in self._files(_TEMPORARY):
            if found.st_mtime < end:
                _remove(os.path.join(self.folder, name))
        for name, found in self._files(_CLAIM):
            if found.st_mtime < end and (claim := self.claim(name.removesuffix(_CLAIM))) is not None:
                claim.release()


def _artifact(name: str, found: os.stat_result) -> Artifact:
    return Artifact(name.removesuffix(SUFFIX), found.st_size, found.st_mtime)


def _read(path: str) -> bytes:
    """All of a file.

    Raises:
        OSError: it is not there, or cannot be read.
        UnusableArtifact: others may have written it.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise UnusableArtifact("it is not this user's alone")
        return file.read()


def _remove(path: str) -> bool:
    """Whether the file is gone by this."""
    try:
        os.unlink(path)
    except OSError:
        return False
    return True
