"""The store in a folder: what goes wrong is a miss, and never an error or a wrong artifact."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import until

from frame_swap.artifacts import seal
from frame_swap.artifacts.store.disk import LEFT_BEHIND, SUFFIX, Disk, DiskClaim
from frame_swap.artifacts.store.entry import Entry

from .holder import KEY, Holder, holding

pytestmark = pytest.mark.quick

OTHER = 64 * "b"
ENTRY = Entry(b"artifact" * 100, b"late guards", b"loading")


def file_of(store: Disk, key: str = KEY) -> Path:
    return Path(store.folder, key + SUFFIX)


def claimed(store: Disk, key: str = KEY) -> DiskClaim:
    claim = store.claim(key)
    assert claim is not None, "nobody else has it"
    return claim


def test_what_is_kept_is_found_and_nothing_else(store: Disk) -> None:
    assert store.get(KEY) is None
    assert not store.has(KEY)
    assert store.put(KEY, ENTRY) == ""
    assert store.has(KEY)
    assert store.get(KEY) == ENTRY
    assert store.get(OTHER) is None
    assert [one.key for one in store.artifacts()] == [KEY]
    store.remove(KEY)
    assert store.get(KEY) is None


def test_folder_and_files_are_closed_to_others(store: Disk) -> None:
    mask = os.umask(0)
    try:
        store.put(KEY, ENTRY)
        store.keep_note(KEY, b"{}")
    finally:
        os.umask(mask)
    assert Path(store.folder).stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o077 for file in Path(store.folder).iterdir()} == {0}


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x20]) + data[at + 1 :]


def test_damage_at_any_byte_is_a_miss(store: Disk, caplog: pytest.LogCaptureFixture) -> None:
    store.put(KEY, ENTRY)
    whole = file_of(store).read_bytes()
    header = whole.index(b"\n")
    harmless = 0
    for at in [*range(header + 40), *range(header + 40, len(whole), 7)]:
        file_of(store).write_bytes(flipped(whole, at))
        caplog.clear()
        found = store.get(KEY)
        if found is None:
            assert "cannot be used" in caplog.text
            assert not file_of(store).exists()
        else:  # a header in other letters that says the same, such as an instruction that no artifact needs
            harmless += 1
            assert found == ENTRY
    assert harmless <= header / 2


@pytest.mark.parametrize("length", [0, 1, 50, 400, -1])
def test_a_file_that_was_cut_short_is_a_miss(store: Disk, length: int) -> None:
    store.put(KEY, ENTRY)
    file_of(store).write_bytes(file_of(store).read_bytes()[:length])
    assert store.get(KEY) is None


def test_a_pickle_that_was_not_sealed_is_never_read(store: Disk, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    file_of(store).write_bytes(b"cos\nmkdir\n(V" + os.fsencode(mark) + b"\ntR.")
    assert store.get(KEY) is None
    assert not mark.exists()


def test_an_artifact_under_another_key_is_a_miss_and_never_read(store: Disk, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    pickled = b"cos\nmkdir\n(V" + os.fsencode(mark) + b"\ntR."
    file_of(store, OTHER).write_bytes(seal.seal_for(KEY, pickled))
    file_of(store, OTHER).chmod(0o600)
    assert store.get(OTHER) is None
    assert not mark.exists()
    file_of(store).write_bytes(seal.seal_for(KEY, pickled))
    file_of(store).chmod(0o600)
    store.get(KEY)
    assert mark.exists(), "under its own key it is read"


@pytest.mark.parametrize(
    "made_for",
    [{"torch": "2.6.0"}, {"python": "cpython-38"}, {"architecture": "riscv"}, {"instructions": ["avx1024"]}],
)
def test_an_artifact_of_another_installation_or_cpu_is_a_miss(store: Disk, made_for: dict[str, Any]) -> None:
    """Its key would be another one, too; but an archive may bring what it likes."""
    store.put(KEY, ENTRY)
    header, _, content = file_of(store).read_bytes().partition(b"\n")
    file_of(store).write_bytes(json.dumps(json.loads(header) | made_for).encode() + b"\n" + content)
    assert store.get(KEY) is None


def test_a_link_is_a_miss(store: Disk, tmp_path: Path) -> None:
    store.put(KEY, ENTRY)
    file_of(store).rename(tmp_path / "elsewhere")
    file_of(store).symlink_to(tmp_path / "elsewhere")
    assert store.get(KEY) is None


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_a_miss(store: Disk, mode: int) -> None:
    store.put(KEY, ENTRY)
    file_of(store).chmod(mode)
    assert store.get(KEY) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_another_user_is_a_miss(store: Disk) -> None:
    store.put(KEY, ENTRY)
    os.chown(file_of(store), 12345, -1)
    assert store.get(KEY) is None


def test_a_full_disk_keeps_nothing_and_leaves_nothing(store: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    assert store.put(KEY, ENTRY) == "OSError: [Errno 28] No space left on device"
    assert list(Path(store.folder).iterdir()) == []
    assert store.get(KEY) is None


FULL = """\
import resource, sys
from frame_swap.artifacts.store.disk import Disk
from frame_swap.artifacts.store.entry import Entry
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
print(Disk(sys.argv[1], 1e9).put(64 * "a", Entry(bytes(10_000), b"", b"")))
"""


def test_a_write_that_the_system_cuts_short_leaves_nothing(store: Disk) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, store.folder], capture_output=True, text=True, timeout=100)
    assert done.stdout.startswith("OSError: [Errno 27]"), done.stderr
    assert list(Path(store.folder).iterdir()) == []


WRITER = """\
import sys
from frame_swap.artifacts.store.disk import Disk
from frame_swap.artifacts.store.entry import Entry
store, content = Disk(sys.argv[1], 1e9), bytes([int(sys.argv[2])]) * 3_000_000
print("begins", flush=True)
while True:
    store.put(64 * "a", Entry(content, content[:1], b""))
"""


def test_two_writers_of_which_one_is_killed_leave_one_whole_artifact(store: Disk) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, store.folder, n], stdout=subprocess.PIPE) for n in "12"
    ]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"begins\n"
        until(lambda: store.has(KEY))
        seen = set()
        for round_ in range(60):
            found = store.get(KEY)
            assert found is not None
            assert set(found.artifact) == set(found.late_guards)
            seen.add(found.late_guards)
            if round_ == 30:
                writers[0].send_signal(signal.SIGKILL)
        assert seen <= {b"\1", b"\2"}
        until(lambda: store.get(KEY) == Entry(b"\2" * 3_000_000, b"\2", b""))  # the other one goes on
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
            assert writer.stdout is not None
            writer.stdout.close()
    assert store.get(KEY) is not None
    hour_ago = time.time() - 2 * LEFT_BEHIND
    for file in Path(store.folder).glob("*.part"):
        os.utime(file, (hour_ago, hour_ago))
    store.evict()
    assert [file.name for file in Path(store.folder).iterdir() if file.suffix == ".part"] == []


def test_what_was_not_used_for_longest_goes_first(store: Disk) -> None:
    keys = [f"{n:064x}" for n in range(10)]
    for age, key in enumerate(keys):
        store.put(key, ENTRY)
        os.utime(file_of(store, key), (1e9 - age, 1e9 - age))
    size = file_of(store, keys[0]).stat().st_size
    store.get(keys[9])  # the oldest is used once more
    removed = store.evict(5 * size)
    assert [one.key for one in removed] == [keys[n] for n in (8, 7, 6, 5, 4, 3)]
    assert {one.key for one in store.artifacts()} == {keys[n] for n in (0, 1, 2, 9)}


def test_what_takes_more_than_the_limit_is_not_called_kept(store: Disk) -> None:
    assert Disk(store.folder, 100).put(KEY, ENTRY) == "it takes more than store_limit allows"
    assert not store.has(KEY)
    assert store.put(KEY, ENTRY) == ""
    assert store.has(KEY)


def test_the_folder_stays_below_its_limit(store: Disk) -> None:
    store.put(OTHER, ENTRY)
    small = Disk(store.folder, 20 * file_of(store, OTHER).stat().st_size)
    for n in range(100):
        small.put(f"{n:064x}", ENTRY)
        assert sum(one.size for one in small.artifacts()) <= 1.1 * small.limit
    assert len(small.artifacts()) > 10


def test_an_artifact_that_is_evicted_while_it_is_read_is_whole(store: Disk) -> None:
    """Its file stays until it is closed."""
    store.put(KEY, ENTRY)
    with file_of(store).open("rb") as file:
        store.evict(0)
        assert store.get(KEY) is None
        assert ENTRY.artifact in file.read()


def test_times_in_the_future_and_the_past_do_no_harm(store: Disk) -> None:
    for key, moment in ((KEY, 4e9), (OTHER, 0.0)):
        store.put(key, ENTRY)
        os.utime(file_of(store, key), (moment, moment))
        assert store.get(key) == ENTRY
        os.utime(file_of(store, key), (moment, moment))
    store.evict(1.5 * file_of(store).stat().st_size)
    assert [one.key for one in store.artifacts()] == [KEY]


READER = """\
import contextlib, os, sys
from frame_swap.artifacts.store.disk import Disk
from frame_swap.artifacts.store.entry import Entry
with contextlib.suppress(PermissionError):  # root writes everywhere
    os.setuid(12345)
store = Disk(sys.argv[1], 1e9)
print(store.get(64 * "a") is not None)
print(store.put(64 * "b", Entry(b"", b"", b"")))
claim = store.claim(64 * "a")
print(claim is not None)
claim.release()
"""


def test_a_folder_that_cannot_be_written_to_is_read() -> None:
    with tempfile.TemporaryDirectory() as folder:  # below no folder that only root enters
        store = Disk(folder, 1e9)
        store.put(KEY, ENTRY)
        if os.geteuid() == 0:
            os.chown(file_of(store), 12345, -1)
        os.chmod(folder, 0o555)
        done = subprocess.run([sys.executable, "-c", READER, folder], capture_output=True, text=True, timeout=100)
        os.chmod(folder, 0o700)
    found, put, free = done.stdout.splitlines() or [done.stderr] * 3
    assert (found, free) == ("True", "True")
    assert put.startswith("PermissionError")


# --- Claims ---


@pytest.fixture
def holder(store: Disk) -> Iterator[Holder]:
    with holding(store) as process:
        yield process


def test_one_process_has_a_claim_until_it_releases_it(store: Disk, holder: Holder) -> None:
    assert store.claim(KEY) is None
    other = claimed(store, OTHER)
    other.release()
    holder.release()
    claim = claimed(store, KEY)
    assert store.claim(KEY) is None, "not in this process, either"
    claim.release()
    assert list(Path(store.folder).iterdir()) == []


def test_a_claim_ends_with_its_process(store: Disk, holder: Holder) -> None:
    assert store.claim(KEY) is None
    holder.kill()
    claim = claimed(store, KEY)
    claim.release()


def test_a_forked_child_does_not_keep_its_parents_claim(store: Disk) -> None:
    claim = claimed(store)
    told, tell = os.pipe()
    stay, go = os.pipe()
    if (child := os.fork()) == 0:
        claim.forget()
        os.write(tell, b"x")
        os.read(stay, 1)
        os._exit(0)
    os.read(told, 1)
    assert store.claim(KEY) is None, "the child's forgetting ends nothing"
    claim.release()
    again = claimed(store, KEY)
    again.release()
    os.write(go, b"x")
    os.waitpid(child, 0)


def test_misses_are_told_to_the_log_alone(store: Disk, caplog: pytest.LogCaptureFixture) -> None:
    store.put(KEY, ENTRY)
    file_of(store).write_bytes(b"nothing")
    with caplog.at_level(logging.WARNING, "frame_swap"):
        assert store.get(KEY) is None
        assert store.get(KEY) is None, "it was removed: no further line"
    assert len(caplog.records) == 1
