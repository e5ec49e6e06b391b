"""A store that machines share: a real Redis server, a server with S3's interface, and a folder."""

from __future__ import annotations

import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import free_port

from frame_swap import FrameSwapWarning
from frame_swap.artifacts.seal import seal_for
from frame_swap.artifacts.store import chosen, far, shared
from frame_swap.artifacts.store.disk import SUFFIX, Disk
from frame_swap.artifacts.store.entry import Entry
from frame_swap.artifacts.store.shared import Shared
from frame_swap.settings import Settings

SECRET = b"the same on all machines"
NAME = "0" * 64
OTHER = "1" * 64
ENTRY = Entry(b"artifact", b"late guards", b"loading", b"echo")

Machine = Callable[..., Shared]


class Server:
    """A Redis server, which a test may stop and start."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", *arguments]
        self._process = subprocess.Popen(command, cwd=self._folder, stdout=subprocess.DEVNULL)
        until = time.monotonic() + 30
        while time.monotonic() < until:
            with socket.socket() as probing:
                if probing.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.02)
        raise TimeoutError("the Redis server did not start")

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[Server]:
    pytest.importorskip("redis", reason="needs the package redis")
    if shutil.which("redis-server") is None:
        pytest.skip("needs a Redis server: Debian's package redis-server")
    server = Server(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("s3fs", reason="needs the package s3fs")
    moto = pytest.importorskip("moto.server", reason="needs the package moto[server]")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"bucket-{uuid.uuid4().hex}"  # the server remembers those of earlier tests
    s3fs.S3FileSystem().mkdir(bucket)
    yield f"s3://{bucket}/kept"
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(params=["redis", "s3", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place of each kind."""
    if request.param == "redis":
        server: Server = request.getfixturevalue("redis_server")
        return server.url
    if request.param == "s3":
        place: str = request.getfixturevalue("s3")
        return place
    return f"file://{tmp_path / 'shared'}"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers here may be slow, and are not to be given up."""
    monkeypatch.setattr(far, "TIMEOUT", 60.0)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """Makes the store of a machine; each has a disk of its own."""
    made: list[Shared] = []

    def make(url: str, key: bytes = SECRET, limit: float = 1e9) -> Shared:
        folder = tmp_path / f"machine {len(made)}"
        folder.mkdir()
        made.append(Shared(Disk(str(folder), limit), url, key))
        return made[-1]

    yield make
    for store in made:
        store._leases.clear()  # whose server is gone


def kept_far(store: Shared) -> None:
    assert store.put(NAME, ENTRY) == ""
    store.finish(30)


# Between machines


def test_what_one_machine_keeps_another_has_when_it_fetches_it(url: str, machine: Machine) -> None:
    one, other = machine(url), machine(url)
    other.fetch(NAME)  # a miss
    assert other.get(NAME) is None
    kept_far(one)
    other.fetch(OTHER)
    assert other.get(NAME) is None, "its calls look on its disk only"
    other._looked.clear()
    other.fetch(NAME)
    assert other.get(NAME) == ENTRY
    other.remove(NAME)
    other.finish(30)
    third = machine(url)
    third.fetch(NAME)
    assert third.get(NAME) is None


def test_a_machine_that_only_fetches_stays_below_its_limit(url: str, machine: Machine) -> None:
    large = ENTRY._replace(artifact=os.urandom(100_000))
    one, other = machine(url), machine(url, limit=250_000)
    for at in range(4):
        assert one.put(f"{at}" * 64, large) == ""
    one.finish(30)
    for at in range(4):
        other.fetch(f"{at}" * 64)
    assert sum(artifact.size for artifact in other.near.artifacts()) <= 250_000
    assert other.get("3" * 64) == large


def test_one_machine_at_a_time_has_a_claim(redis_server: Server, machine: Machine) -> None:
    one, other = machine(redis_server.url), machine(redis_server.url)
    claim = one.claim(NAME)
    assert claim is not None
    assert other.claim(NAME) is None
    kept_far(one)
    claim.release()
    one.finish(30)
    other._looked.clear()
    taken = other.claim(NAME)
    assert taken is not None
    assert other.get(NAME) == ENTRY, "who gets the claim looks once more"
    taken.release()


def test_a_claim_ends_with_its_machine(
    redis_server: Server, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(far, "LEASE", 0.2)
    one, other = machine(redis_server.url), machine(redis_server.url)
    assert one.claim(NAME) is not None  # and nobody renews it
    until = time.monotonic() + 30
    while (claim := other.claim(NAME)) is None:
        assert time.monotonic() < until
    claim.release()


# What is not ours


class Mark:
    """Leaves a mark where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self._file,)


def planted(file: Path) -> bytes:
    """An artifact, as the disk has it, that leaves a mark where it is opened."""
    return seal_for(NAME, pickle.dumps((Mark(file),)))


@pytest.mark.parametrize("signed_with", [None, b"another key, of 16 characters", "moved"])
def test_nothing_is_opened_that_is_not_signed(
    url: str, machine: Machine, tmp_path: Path, signed_with: Any, caplog: pytest.LogCaptureFixture
) -> None:
    mark, store = tmp_path / "mark", machine(url)
    data = planted(mark)
    if signed_with is not None:
        name, key = (OTHER, SECRET) if signed_with == "moved" else (NAME, signed_with)
        data = shared.sign(key, name, data)
    far.connect(url).put(NAME, data)
    store.fetch(NAME)
    assert store.get(NAME) is None
    assert not mark.exists()
    assert not list(Path(store.near.folder).glob(f"*{SUFFIX}"))
    assert "not signed with FRAME_SWAP_STORE_KEY" in caplog.text


def test_what_is_signed_is_opened(url: str, machine: Machine, tmp_path: Path) -> None:
    """The test above would see it."""
    mark, store = tmp_path / "mark", machine(url)
    far.connect(url).put(NAME, shared.sign(SECRET, NAME, planted(mark)))
    store.fetch(NAME)
    store.get(NAME)
    assert mark.exists()


def test_each_change_of_a_signed_entry_is_seen() -> None:
    signed = shared.sign(SECRET, NAME, b"artifact")
    assert shared.verified(SECRET, NAME, signed) == b"artifact"
    for at in range(len(signed)):
        assert shared.verified(SECRET, NAME, signed[:at] + bytes([signed[at] ^ 1]) + signed[at + 1 :]) is None
        assert shared.verified(SECRET, NAME, signed[:at]) is None


# What goes wrong


def test_a_server_that_is_gone_costs_compiles_only(redis_server: Server, machine: Machine) -> None:
    store = machine(redis_server.url)
    redis_server.stop()
    with pytest.warns(FrameSwapWarning, match="cannot be used now") as warned:
        store.fetch(NAME)
        claim = store.claim(NAME)
        assert claim is not None
        assert store.put(NAME, ENTRY) == ""
        store.finish(30)
        claim.release()
    assert len(warned) == 1
    assert store.get(NAME) == ENTRY
    redis_server.start()
    store._rests_until = 0.0
    kept_far(store)
    other = machine(redis_server.url)
    other.fetch(NAME)
    assert other.get(NAME) == ENTRY


def test_a_server_that_does_not_answer_is_given_up(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("redis", reason="needs the package redis")
    monkeypatch.setattr(far, "TIMEOUT", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        store = machine(f"redis://127.0.0.1:{silent.getsockname()[1]}/0")
        with pytest.warns(FrameSwapWarning, match="Timeout"):
            store.fetch(NAME)
        store._looked.clear()
        store.fetch(NAME)  # it rests
        assert store.claim(NAME) is not None


def test_a_server_that_is_full_keeps_what_it_has(redis_server: Server, machine: Machine) -> None:
    redis_server.stop()
    redis_server.start("--maxmemory", "2mb", "--maxmemory-policy", "noeviction")
    store = machine(redis_server.url)
    with pytest.warns(FrameSwapWarning, match="cannot be used now"):
        assert store.put(NAME, ENTRY._replace(artifact=os.urandom(4_000_000))) == ""
        store.finish(30)
        for _ in range(3):  # the first may be taken; then there is no room
            store._rests_until = 0.0
            store.put(OTHER, ENTRY._replace(artifact=os.urandom(4_000_000)))
            store.finish(30)
    assert store.get(NAME) is not None


def test_a_folder_that_cannot_be_written_to(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    store = machine(f"file://{tmp_path / 'a file' / 'below'}")
    with pytest.warns(FrameSwapWarning, match="cannot be used now"):
        kept_far(store)
    assert store.get(NAME) == ENTRY


def test_a_forked_child_goes_nowhere(redis_server: Server, machine: Machine) -> None:
    store = machine(redis_server.url)
    kept_far(store)
    child = os.fork()
    if child == 0:
        other = Shared(store.near, redis_server.url, SECRET)
        other._pid = store._pid  # the parent's
        ends_well = other._place() is None and other.put(OTHER, ENTRY) == ""
        other.finish(30)
        os._exit(0 if ends_well else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert far.connect(redis_server.url).get(OTHER) is None


# Which store is in force


def test_nobody_is_told_a_password() -> None:
    assert far.shown("rediss://user:secret@cache:6379/0?password=secret") == "rediss://cache:6379/0"
    assert far.shown("s3://bucket/a/folder") == "s3://bucket/a/folder"
    assert far.shown("file:///a/folder@home") == "file:///a/folder@home"


@pytest.mark.parametrize("key", [None, "", "too short"])
def test_without_a_key_nothing_is_shared(key: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(chosen.KEY, raising=False)
    if key is not None:
        monkeypatch.setenv(chosen.KEY, key)
    chosen.shared.cache_clear()
    with pytest.warns(FrameSwapWarning, match="set FRAME_SWAP_STORE_KEY"):
        store = chosen.store(Settings(store=f"file://{tmp_path / 'shared'}"))
    assert isinstance(store, Disk)


def test_with_a_key_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv(chosen.KEY, SECRET.decode())
    chosen.shared.cache_clear()
    store = chosen.store(Settings(store=f"file://{tmp_path / 'shared'}"))
    assert isinstance(store, Shared)
    assert store.near.folder.startswith(str(tmp_path / "cache"))


def test_nothing_is_imported_unasked() -> None:
    program = """
import sys
import torch
import frame_swap
torch.compile(lambda x: x.sin(), backend="frame_swap")(torch.ones(3))
frame_swap.wait()
print([name for name in ("s3fs", "frame_swap.artifacts.store.shared") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "[]", done.stderr


# Whole programs


PROGRAM = """
import json
import torch
import frame_swap

def f(x):
    return (x.sin() @ x).relu()

compiled = torch.compile(f, backend="frame_swap")
x = torch.ones(4, 4)
compiled(x)
(region,) = frame_swap.wait().regions
assert torch.allclose(compiled(x), f(x))
print(json.dumps([region.state, region.store]))
"""


def test_a_program_on_another_machine_finds_what_the_first_has_compiled(
    redis_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    printed = []
    for name in ("one", "other"):
        done = subprocess.run(
            [sys.executable, str(tmp_path / "program.py")],
            env={
                **os.environ,
                "FRAME_SWAP_STORE": redis_server.url,
                chosen.KEY: SECRET.decode(),
                "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / name),
                "PYTHONPATH": str(Path(__file__).parents[2]),
            },
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout.strip())
    assert printed == ['["installed", "kept"]', '["installed", "found"]']
