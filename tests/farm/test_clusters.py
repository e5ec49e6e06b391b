"""Compiles on Dask's clusters, whose workers share nothing with the program.

Programs with Dask's own cluster, Ray and MPI are in docs/recipes, and are run from there.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import free_port, packed, until
from torch import Tensor

import frame_swap
from frame_swap import State
from frame_swap.errors import FrameSwapWarning
from frame_swap.farm.compile import compile_graph
from frame_swap.farm.protocol import Request
from frame_swap.internals.cpu import this_cpu

PLAIN = ("PATH", "LD_LIBRARY_PATH", "LANG")
"""Variables that a worker has, like any process of its machine."""


class Cluster:
    """A Dask scheduler and its workers, each a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.address = f"tcp://127.0.0.1:{free_port()}"
        self.folder = folder
        host, port = self.address.removeprefix("tcp://").split(":")
        self.scheduler = self._start(
            "dask_scheduler", ["--host", host, "--port", port, "--no-dashboard"], "scheduler", []
        )
        self.workers: list[subprocess.Popen[bytes]] = []

    def add_worker(self, name: str, *before: str) -> subprocess.Popen[bytes]:
        """Start a worker; `before` goes before its command."""
        arguments = [self.address, "--nthreads", "1", "--no-dashboard", "--no-nanny", "--name", name]
        self.workers.append(self._start("dask_worker", arguments, name, [*before]))
        return self.workers[-1]

    def _start(self, module: str, arguments: list[str], name: str, before: list[str]) -> subprocess.Popen[bytes]:
        home = self.folder / name
        (home / "tmp").mkdir(parents=True)
        environment = {variable: os.environ[variable] for variable in PLAIN if variable in os.environ}
        environment |= {"HOME": str(home), "TMPDIR": str(home / "tmp"), "DASK_TEMPORARY_DIRECTORY": str(home)}
        command = [*before, sys.executable, "-m", f"distributed.cli.{module}", *arguments]
        with (home / "log").open("wb") as log:
            return subprocess.Popen(
                command, cwd=home, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def stop(self) -> None:
        for process in (*self.workers, self.scheduler):
            kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    pytest.importorskip("distributed", reason="needs the package distributed")
    one = Cluster(tmp_path / "machines")
    yield one
    one.stop()


@pytest.fixture
def client(cluster: Cluster) -> Iterator[Any]:
    """A client of a cluster with two workers."""
    from distributed import Client

    for name in ("one", "two"):
        cluster.add_worker(name)
    with Client(cluster.address, timeout=60) as connected:
        connected.wait_for_workers(2, timeout=60)
        yield connected
        frame_swap.configure(executor=None)


def f(x: Tensor) -> Tensor:
    return (x.sin() @ x).relu()


def compiles_on(client: Any) -> list[str]:
    """The addresses of workers that compile."""
    return [address for address, keys in client.processing().items() if any("compile_graph" in key for key in keys)]


# --- Machines that share nothing ---

PROGRAM = """
import json, os, sys, warnings
import torch
from distributed import Client
import frame_swap

@torch.library.custom_op("program::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2

@twice.register_fake
def _(x):
    return torch.empty_like(x)

def f(x):
    return ((twice(x.detach()) + x).sin() @ x).relu()

def gradient(call, y):
    return torch.autograd.grad(call(y).sum(), y)

address, *where = sys.argv[1:]
if __name__ == "__main__":
    with Client(address, timeout=60) as client:
        client.wait_for_workers(1, timeout=60)
        frame_swap.configure(executor=client.get_executor(), **json.loads(where[0] if where else "{}"))
        x, y = torch.randn(5, 5), torch.randn(5, 5, requires_grad=True)
        compiled = torch.compile(f, backend="frame_swap")
        for _ in range(2):
            torch.testing.assert_close(compiled(x), f(x))
            torch.testing.assert_close(gradient(compiled, y), gradient(f, y))
            report = frame_swap.wait(120)
        told = [(r.state, r.reason, r.worker_pid, r.compile_s, r.store) for r in report.regions]
        print(json.dumps([os.getpid(), told]))
"""

CONTAINER = ["unshare", "--mount", "--pid", "--fork", "--mount-proc"]
"""Runs a command as process 1 of a container."""


def can_have_containers() -> bool:
    return (
        shutil.which("unshare") is not None
        and subprocess.run([*CONTAINER, "true"], capture_output=True).returncode == 0
    )


@pytest.mark.long
def test_machines_that_share_neither_folders_nor_numbers_of_processes(cluster: Cluster, tmp_path: Path) -> None:
    if not can_have_containers():
        pytest.skip("needs the right to make namespaces")
    program = tmp_path / "program"
    program.mkdir()
    (program / "program.py").write_text(PROGRAM)
    hidden = f'mount -t tmpfs -o ro none {program} && exec "$@"'
    for name in ("one", "two"):
        cluster.add_worker(name, *CONTAINER, "bash", "-c", hidden, "-")
    folders = {"TMPDIR": str(program), "TORCHINDUCTOR_CACHE_DIR": str(program / "cache")}
    command = [*CONTAINER, sys.executable, "program.py", cluster.address]
    done = subprocess.run(
        command, cwd=program, env={**os.environ, **folders}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:] + (cluster.folder / "one" / "log").read_text()[-3000:]
    pid, regions = json.loads(done.stdout.splitlines()[-1])
    assert [(state, reason, worker) for state, reason, worker, *_ in regions] == [("installed", "", 1)] * 2
    assert pid == 1, "the program's number is the worker's"
    assert all(seconds > 0 for _, _, _, seconds, _ in regions)


@pytest.mark.long
def test_two_programs_that_want_the_same_graph_compile_it_once(cluster: Cluster, tmp_path: Path) -> None:
    for name in ("one", "two"):
        cluster.add_worker(name)
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "program.py", cluster.address, json.dumps({"store": str(tmp_path / "store")})]
    running = [
        subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    stores: list[list[str]] = []
    for one in running:
        out, err = one.communicate(timeout=200)
        assert one.returncode == 0, err[-3000:]
        _, regions = json.loads(out.splitlines()[-1])
        assert [state for state, *_ in regions] == ["installed"] * 2
        stores.append([store for *_, store in regions])
    assert sorted(zip(*stores, strict=True)) in (
        [("found", "kept")] * 2,
        [("found", "kept"), ("kept", "found")],
        [("kept", "found")] * 2,
    )


# --- Faults ---


@pytest.mark.thorough
def test_a_killed_worker_s_compile_goes_to_another(client: Any, cluster: Cluster) -> None:
    frame_swap.configure(executor=client.get_executor())
    pids = client.run(os.getpid)
    compiled, x = torch.compile(f, backend="frame_swap"), torch.randn(3, 3)
    compiled(x)
    until(lambda: bool(compiles_on(client)))
    (address,) = compiles_on(client)
    killed = pids.pop(address)
    (worker,) = [one for one in cluster.workers if one.pid == killed]
    kill(worker)
    torch.testing.assert_close(compiled(x), f(x))
    frame_swap.wait()
    torch.testing.assert_close(compiled(x), f(x))
    (region,) = frame_swap.report().regions
    assert (region.state, [region.worker_pid]) == (State.INSTALLED, list(pids.values()))


def test_without_its_scheduler_eager_code_goes_on(client: Any, cluster: Cluster) -> None:
    frame_swap.configure(executor=client.get_executor())
    compiled, x = torch.compile(f, backend="frame_swap"), torch.randn(3, 3)
    compiled(x)
    until(lambda: bool(compiles_on(client)))
    with pytest.warns(FrameSwapWarning, match="stays on its eager code"):
        kill(cluster.scheduler)
        frame_swap.wait(60)
    torch.testing.assert_close(compiled(x), f(x))
    (region,) = frame_swap.report().regions
    assert (region.state, region.reason) == (State.FAILED, "its compile failed: the executor cancelled it")


def test_what_nobody_wants_any_more_leaves_the_queue(client: Any, tmp_path: Path) -> None:
    frame_swap.configure(executor=client.get_executor())
    gate = tmp_path / "gate"

    def waits_for(path: str, number: int) -> int:
        while not os.path.exists(path):
            time.sleep(0.01)
        return number

    held = [client.submit(waits_for, str(gate), number, pure=False) for number in range(2)]  # both workers' threads
    until(lambda: sum(len(keys) for keys in client.processing().values()) == 2)
    compiled = torch.compile(f, backend="frame_swap")
    compiled(torch.randn(3, 3))
    until(lambda: compiles_in(client) == 1)
    torch._dynamo.reset()
    until(lambda: compiles_in(client) == 0)
    gate.touch()
    client.gather(held)
    assert [r.state for r in frame_swap.report().regions] == [State.STALE]


def compiles_in(client: Any) -> int:
    """How many compiles the scheduler knows."""

    def count(dask_scheduler: Any) -> int:
        return sum("compile_graph" in str(key) for key in dask_scheduler.tasks)

    number: int = client.run_on_scheduler(count)
    return number


@pytest.mark.fast
@pytest.mark.parametrize(
    ("lacks", "why"),
    [("architecture", "is of architecture"), ("instructions", "has ")],
)
def test_another_kind_of_cpu_is_refused_before_it_compiles(lacks: str, why: str) -> None:
    sent = packed(f, torch.randn(3, 3))
    envelope = pickle.loads(sent.envelope)
    cpu = this_cpu()._replace(**{lacks: "riscv64" if lacks == "architecture" else ()})
    object.__setattr__(envelope, "cpu", cpu)
    outcome = compile_graph(Request(sent.content, pickle.dumps(envelope), {}, 0.0))
    assert outcome.error.startswith(f"it was sent to a CPU that {why}")
    assert outcome.error.endswith("give the executor workers with the program's kind of CPU")
    assert outcome.artifact is None


# --- Modules of the program ---

PASSES = """
from torch._inductor.custom_graph_pass import CustomGraphPass

class Pass(CustomGraphPass):
    def __call__(self, graph):
        pass

    def uuid(self):
        return "nothing"
"""

WORKER = """
import pickle, sys
from frame_swap.farm.compile import compile_graph
from frame_swap.farm.protocol import Request

outcome = compile_graph(Request(*pickle.load(sys.stdin.buffer), {}, 0.0))
print(outcome.error or "compiled")
"""


@pytest.mark.fast
def test_options_may_be_of_a_module_that_only_the_program_s_search_path_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "passes_of_a_program.py").write_text(PASSES)
    monkeypatch.syspath_prepend(tmp_path)
    import passes_of_a_program

    sent = packed(f, torch.randn(3, 3), post_grad_custom_pre_pass=passes_of_a_program.Pass())
    done = subprocess.run(
        [sys.executable, "-c", WORKER],
        input=pickle.dumps((sent.content, sent.envelope)),
        capture_output=True,
        cwd="/",
        timeout=240,
    )
    assert done.stdout.decode() == "compiled\n", done.stderr.decode()


# --- TLS ---


@pytest.mark.long
def test_a_cluster_that_speaks_tls() -> None:
    distributed = pytest.importorskip("distributed", reason="needs the package distributed")
    pytest.importorskip("cryptography", reason="makes the certificates")
    security = distributed.Security.temporary()
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, security=security, dashboard_address=":0", protocol="tls"
        ) as cluster,
        distributed.Client(cluster.scheduler_address, security=security) as client,
    ):
        assert cluster.scheduler_address.startswith("tls://")
        with pytest.raises((OSError, TypeError)):  # without a certificate there is no way in
            distributed.Client(cluster.scheduler_address, timeout=2)
        frame_swap.configure(executor=client.get_executor())
        compiled, x = torch.compile(f, backend="frame_swap"), torch.randn(3, 3)
        compiled(x)
        frame_swap.wait()
        torch.testing.assert_close(compiled(x), f(x))
        frame_swap.configure(executor=None)
    assert [r.state for r in frame_swap.report().regions] == [State.INSTALLED]
