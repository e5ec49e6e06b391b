"""A store of a test's own, and another process that has a claim in it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from frame_swap.artifacts import folders
from frame_swap.artifacts.store.disk import Disk

KEY = 64 * "a"
"""What the other process has claimed."""

_PROGRAM = """\
import sys
from frame_swap.artifacts.store.disk import Disk
from frame_swap.artifacts.store.entry import Entry
folder, key = sys.argv[1:]
store = Disk(folder, 1e9)
claim = store.claim(key)
print(claim is not None, flush=True)
if sys.stdin.readline() == "put\\n":
    store.put(key, Entry(b"compiled there", b"", b""))
claim.release()
print("released", flush=True)
sys.stdin.readline()
"""


class Holder:
    """The other process. It has the claim from the beginning."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert self._line() == "True\n"

    def release(self, *, put: bool = False) -> None:
        """Have it release the claim, with an artifact in the store or without one; return when that is done."""
        assert self._process.stdin is not None
        self._process.stdin.write("put\n" if put else "failed\n")
        self._process.stdin.flush()
        assert self._line() == "released\n"

    def kill(self) -> None:
        """Kill it, and return when it is gone."""
        self._process.kill()
        self._process.wait()

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


@contextmanager
def holding(store: Disk) -> Iterator[Holder]:
    """Within the block, another process runs that has the claim to `KEY`."""
    command = [sys.executable, "-c", _PROGRAM, store.folder, KEY]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Holder(process)
        finally:
            process.kill()


def store_in(folder: Path) -> Disk:
    """A store in `folder`, which is made."""
    folders.make_own(str(folder))
    return Disk(str(folder), 1e9)
