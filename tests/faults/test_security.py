"""Other users can neither change code that is loaded nor talk to a worker."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

import frame_swap
from frame_swap import State, delivery, errors
from frame_swap.artifacts import folders, libraries
from frame_swap.farm.workers import workers

from .harness import fresh_workers, one_warning, works

pytestmark = pytest.mark.fast


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with correct permissions that holds a folder and a file."""
    folder = tmp_path / "cache"
    (folder / "fx").mkdir(parents=True)
    (folder / "fx" / "code.py").write_text("")
    for path, mode in ((folder, 0o755), (folder / "fx", 0o755), (folder / "fx" / "code.py", 0o644)):
        path.chmod(mode)
    return folder


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    """Forget checked folders and issued warnings."""
    folders._searched.clear()
    delivery._warn_once.cache_clear()
    yield
    folders._searched.clear()


def give_away(path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root gives files away")
    os.chown(path, 12345, -1)


UNSAFE: dict[str, tuple[Callable[[Path], object], str]] = {
    "writable for the group": (lambda place: place.chmod(0o770), "cache is writable for others"),
    "writable for all": (lambda place: place.chmod(0o1777), "cache is writable for others"),
    "of another owner": (give_away, "cache belongs to user 12345"),
    "with a folder that is writable": (lambda place: (place / "fx").chmod(0o775), "fx is writable for others"),
    "with a file that is writable": (lambda place: (place / "fx" / "code.py").chmod(0o664), "code.py is writable"),
    "with a file of another": (lambda place: give_away(place / "fx" / "code.py"), "code.py belongs to user 12345"),
    "in a folder that is writable": (lambda place: place.parent.chmod(0o777), "is writable for others"),
    "in a folder of another": (lambda place: give_away(place.parent), "belongs to user 12345"),
}


def test_a_folder_that_is_in_order_passes(place: Path) -> None:
    folders.check(str(place))
    place.chmod(0o700)
    folders.check(str(place))
    link = place.parent / "link"
    link.symlink_to(place)
    folders.check(str(link))
    place.parent.chmod(0o1777)  # as /tmp is
    folders.check(str(place))


@pytest.mark.parametrize("how", UNSAFE)
def test_a_folder_that_others_can_write_to_does_not_pass(place: Path, how: str) -> None:
    spoil, words = UNSAFE[how]
    folders.check(str(place))
    folders._searched.clear()
    spoil(place)
    with pytest.raises(errors.UnsafeFolder, match=words):
        folders.check(str(place))


def test_what_others_cannot_reach_they_cannot_write_to(place: Path) -> None:
    (place / "fx").chmod(0o777)
    place.chmod(0o700)
    folders.check(str(place))


def test_a_link_is_followed_through_folders_that_are_in_order(place: Path) -> None:
    between = place.parent / "between"
    between.mkdir()
    (between / "there").symlink_to(place)
    link = place.parent / "link"
    link.symlink_to(between / "there")
    folders.check(str(link))
    between.chmod(0o777)  # somebody could put another link there
    with pytest.raises(errors.UnsafeFolder, match="between is writable for others"):
        folders.check(str(link))
    (place.parent / "round").symlink_to(place.parent / "round")
    with pytest.raises(errors.UnsafeFolder, match="too many links"):
        folders.check(str(place.parent / "round"))


def test_a_cache_that_others_can_write_to_is_not_used(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """Two graphs, one warning. The private folder is closed to others, and removed with its worker."""
    place.chmod(0o777)
    there = sorted(place.rglob("*"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(place))
    fresh_workers()
    frame_swap.configure(workers=1)
    x = torch.randn(3)
    with one_warning(f"{place} is not used", "is writable for others", "chmod -R go-rwx"):
        for add in (30, 31):
            compiled = torch.compile(lambda x, add=add: x.sin() + add, backend="frame_swap")
            compiled(x)
            frame_swap.wait()
            torch.testing.assert_close(compiled(x), x.sin() + add)
    assert [r.state for r in frame_swap.report().regions] == [State.INSTALLED] * 2
    left = [path for path in sorted(place.rglob("*")) if path not in there and path.is_file()]
    assert left == [], "a worker or the loader has written there"
    fresh_workers()


def test_the_callers_own_loads_heed_it_too(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """The loader thread, too, runs code from the cache folder."""
    place.chmod(0o777)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(place))
    with folders.safe_caches() as remarks:
        private = os.environ["TORCHINDUCTOR_CACHE_DIR"]
        folders.check(os.path.dirname(private))
        assert stat.S_IMODE(os.stat(os.path.dirname(private)).st_mode) == 0o700
    assert len(remarks) == 1
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(place)


def test_a_folder_of_the_programs_that_others_may_read_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(place))
    fresh_workers()
    umask = os.umask(0o002)
    try:
        works(lambda x: x.sin() + 32)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(place.stat().st_mode) == 0o755
    made = [path for path in place.iterdir() if path.name != "fx"]
    assert made
    assert not [path for path in place.rglob("*") if path.stat().st_mode & 0o022]


@pytest.mark.parametrize("mode", [None, 0o755, 0o775])
def test_the_default_folder_is_closed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: int | None) -> None:
    """Also if `torch.compile` has made it readable for all or writable for a group."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(folders, "_program_temp", lambda: str(tmp_path))
    default = Path(folders.default_cache())
    if mode is not None:
        default.mkdir()
        default.chmod(mode)
    with folders.safe_caches() as remarks:
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(default)
    assert remarks == []
    assert stat.S_IMODE(default.stat().st_mode) == 0o700


def test_a_default_folder_that_a_group_could_write_to_is_not_trusted_afterwards(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setattr(folders, "_program_temp", lambda: str(tmp_path))
    default = Path(folders.default_cache())
    default.mkdir()
    (default / "planted.py").write_text("")
    default.chmod(0o775)
    for _ in range(2):
        with folders.safe_caches() as remarks:
            assert os.environ["TORCHINDUCTOR_CACHE_DIR"] != str(default)
        assert len(remarks) == 1


def test_tritons_folder_is_checked_too(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    place.chmod(0o777)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(place))
    with folders.safe_caches() as remarks:
        assert os.environ["TRITON_CACHE_DIR"] != str(place)
    assert ["set TRITON_CACHE_DIR" in remark for remark in remarks] == [True]


def test_libraries_are_loaded_from_a_closed_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.codecache import CppCodeCache

    seen = []

    def load(cls: type, path: str, key: str) -> str:
        seen.append(stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode))
        return path

    monkeypatch.setattr(CppCodeCache, "_load_library", classmethod(load))
    digest = libraries._digest(CppCodeCache, "code", "cpu", None)
    with libraries.supplied({digest: b"library"}):
        path = CppCodeCache.load_async("code")()
    assert seen == [0o700]
    assert not os.path.exists(path)


def test_a_temporary_folder_that_others_control_loads_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch._inductor.codecache import CppCodeCache

    tmp_path.chmod(0o777)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    digest = libraries._digest(CppCodeCache, "code", "cpu", None)
    unsafe = pytest.raises(errors.UnsafeFolder, match="is writable for others")
    with libraries.supplied({digest: b"library"}), unsafe:
        CppCodeCache.load_async("code")


OF_CUDA = "@cuda-uvmfd-"
"""How the names of sockets begin that CUDA's driver listens on in each process that uses a GPU."""


def sockets_of(*pids: int) -> list[str]:
    """All sockets of workers, and the listening sockets of this process; without those of CUDA's driver."""
    found = []
    for pid in pids:
        for connection in psutil.Process(pid).net_connections(kind="all"):
            if str(connection.laddr).startswith(OF_CUDA):
                continue
            listens = connection.status == psutil.CONN_LISTEN or _accepts(pid, connection.fd)
            if pid != os.getpid() or listens:
                found.append(f"{pid}: {connection}")
    return found


def _accepts(pid: int, handle: int) -> bool:
    """Whether a Unix socket accepts connections: the kernel's flag __SO_ACCEPTCON."""
    inode = os.readlink(f"/proc/{pid}/fd/{handle}").removeprefix("socket:[").rstrip("]")
    rows = [line.split() for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]]
    return any(int(row[3], 16) & 0x10000 for row in rows if row[6] == inode)


def test_nothing_listens() -> None:
    works(lambda x: x.sin() + 33)
    pids = workers.pids()
    assert pids
    assert sockets_of(os.getpid(), *pids) == []
    (process, *_) = workers.pool._processes
    standard = [os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in (0, 1, 2)]
    assert standard == [os.devnull, process.log, process.log]
    assert stat.S_IMODE(os.stat(process.log).st_mode) == 0o600


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_what_listens_is_seen(family: socket.AddressFamily, tmp_path: Path) -> None:
    with socket.socket(family) as listening:
        listening.bind(str(tmp_path / "socket") if family == socket.AF_UNIX else ("127.0.0.1", 0))
        assert sockets_of(os.getpid()) == []
        listening.listen()
        assert len(sockets_of(os.getpid())) == 1


def test_what_a_worker_is_sent_is_for_this_user_alone() -> None:
    fresh_workers()
    workers.start()
    assert workers.pids()
    (process, *_) = workers.pool._processes
    folders.check(process.folder)
    assert stat.S_IMODE(os.stat(process.folder).st_mode) == 0o700
