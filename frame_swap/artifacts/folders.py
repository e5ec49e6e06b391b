"""The folders that code is loaded from: they belong to this user, and nobody else can write to them.

A user who can put a file into the folder of a compile cache runs code in each program that uses the cache. So a
folder is checked before anything in it is unpickled or loaded.

Guarantees, of a folder that was checked:
- It belongs to this user, and nobody else can write to it. If others can enter it, the same holds of everything in
  it; if they cannot, they reach nothing in it.
- Nobody can put another folder in its place: each folder on its path, links followed, belongs to this user or to
  the system's, and is not writable for others, unless it is sticky, as /tmp is.

A cache folder that fails the check is not used: a fresh one of this process replaces it, and a warning says so. The
default folder, made by Inductor or by us, is closed to others first (0700). The mode of a folder that the program
has named is left to the program.

Not checked: access control lists, and the filesystem that a folder is mounted from.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator

from ..errors import UnsafeFolder
from ..runtime.patching import patched_environment

INDUCTOR = "TORCHINDUCTOR_CACHE_DIR"
TRITON = "TRITON_CACHE_DIR"

_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def check(folder: str) -> None:
    """Check that nothing in `folder` can come from another user.

    Raises:
        UnsafeFolder: it might.
        OSError: the folder or something in it cannot be read.
    """
    place = _follow(folder)
    found = os.stat(place)
    if not stat.S_ISDIR(found.st_mode):
        raise UnsafeFolder(f"{folder} is not a folder")
    _check_own(place, found)
    identity = (found.st_dev, found.st_ino)
    if found.st_mode & _OTHERS and identity not in _searched:
        for inside in _everything_in(place):
            _check_own(inside.path, inside.stat(follow_symlinks=False))
        _searched.add(identity)


_searched: set[tuple[int, int]] = set()
"""Device and inode of folders whose content was checked. Only this user's programs can have added to it since."""


def make_own(folder: str) -> None:
    """Make `folder`, and what is missing on the way there, closed to others; check what is there already.

    Raises:
        UnsafeFolder: others could put code there.
        OSError: it cannot be made or read.
    """
    _make(folder)
    check(folder)


@contextlib.contextmanager
def safe_caches() -> Iterator[list[str]]:
    """Within the block, Inductor's and Triton's cache folders are this user's alone.

    Process-wide, so only under Dynamo's compile lock. Yields remarks that the user should be warned with.

    Raises:
        OSError: a folder cannot be made or read.
    """
    used, remarks = {}, []
    for variable, default in ((INDUCTOR, default_cache()), (TRITON, None)):
        folder = os.environ.get(variable) or default
        if folder is None:  # Triton's is within Inductor's, then
            continue
        try:
            _check_cache(folder, ours=folder == default)
        except UnsafeFolder as error:
            used[variable] = os.path.join(_private(), variable.lower())
            remarks.append(
                f"the cache folder {folder} is not used, since others may put code there: {error}. A private one, "
                f"removed with the process, replaces it; chmod -R go-rwx makes your own safe, or set {variable}"
            )
        else:
            used[variable] = folder
    with patched_environment(used):
        yield remarks


def default_cache() -> str:
    """The folder that Inductor keeps its files in unless told otherwise."""
    from ..internals import inductor

    # A worker has a temporary folder of its own; the cache is in the program's.
    return os.path.join(_program_temp(), inductor.default_cache_name())


@functools.cache
def _program_temp() -> str:
    return tempfile.gettempdir()


def keep_temporary_files_in(folder: str) -> None:
    """Use `folder` for temporary files, in this process and those that it starts from now on.

    The cache folders stay where they were.
    """
    _program_temp()
    tempfile.tempdir = folder
    os.environ["TMPDIR"] = folder


def _check_cache(folder: str, *, ours: bool) -> None:
    _make(folder)
    found = os.stat(folder)
    # `torch.compile` itself makes the default folder, with a mode from the umask.
    empty = ours and found.st_uid == os.geteuid() and not os.listdir(folder)
    if not empty:
        check(folder)
    if ours:
        os.chmod(folder, stat.S_IRWXU)
    if empty:
        if os.listdir(folder):  # somebody was faster
            os.chmod(folder, stat.S_IMODE(found.st_mode))
        check(folder)


def _make(folder: str) -> None:
    """Make `folder` and the missing folders on its path, each 0700, whatever the umask, which is process-wide."""
    missing = []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = os.path.dirname(os.path.abspath(folder))
    for one in reversed(missing):
        with contextlib.suppress(FileExistsError):  # made by another process meanwhile; it is checked like any
            os.mkdir(one, stat.S_IRWXU)


def _follow(path: str) -> str:
    """The path that `path` leads to, links followed.

    Raises:
        UnsafeFolder: others could change that.
    """
    place, rest = "/", [part for part in os.path.abspath(path).split("/") if part]
    for _ in range(200):
        if not rest:
            return place
        found = os.stat(place)
        sticky = found.st_mode & stat.S_ISVTX
        if found.st_mode & _OTHERS_WRITE and not sticky:
            raise UnsafeFolder(f"{place} is writable for others")
        here = os.path.join(place, rest.pop(0))
        entry = os.lstat(here)
        if entry.st_uid not in _trusted():
            raise UnsafeFolder(f"{here} belongs to {_name(entry.st_uid)}")
        if stat.S_ISLNK(entry.st_mode):
            target = os.path.normpath(os.path.join(place, os.readlink(here)))
            place, rest = "/", [part for part in target.split("/") if part] + rest
        else:
            place = here
    raise UnsafeFolder(f"{path} has too many links")


def _check_own(path: str, found: os.stat_result) -> None:
    if found.st_uid != os.geteuid():
        raise UnsafeFolder(f"{path} belongs to {_name(found.st_uid)}")
    if found.st_mode & _OTHERS_WRITE and not stat.S_ISLNK(found.st_mode):
        raise UnsafeFolder(f"{path} is writable for others")


def _everything_in(folder: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            yield entry
            if entry.is_dir(follow_symlinks=False):
                yield from _everything_in(entry.path)


@functools.cache
def _trusted() -> set[int]:
    """The ids of this user and root; in a user namespace, the root outside of it has another number."""
    return {os.geteuid(), 0, os.stat("/").st_uid}


def _name(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


_private_of: dict[int, str] = {}


def _private() -> str:
    """A folder of this process, removed at exit. A forked child has its own."""
    import atexit

    pid = os.getpid()
    if pid not in _private_of:
        _private_of[pid] = tempfile.mkdtemp(prefix="frame-swap-cache-")
        atexit.register(_remove, pid)
    return _private_of[pid]


def _remove(pid: int) -> None:
    if os.getpid() == pid:
        shutil.rmtree(_private_of[pid], ignore_errors=True)
