"""A store that several machines share, with one on this machine's disk in front of it.

Guarantees:
- Nothing that comes from afar is used unless it was signed with the key that the machines share, for the name under
  which it is kept: HMAC with SHA-256, looked at before anything is unpickled or written to the disk.
- The program's calls look on the disk only. `fetch` goes far; so do uploads and claims, on threads of frame-swap's.
- What is far and gone, slow or full costs nothing but compiles: after a failure nothing is tried there for `REST`
  seconds, and one warning says so.
- Where the place has claims, one machine compiles what all want; a claim outlives its process by `far.LEASE`
  seconds at most, and is released when the artifact has arrived.

Assumed: who knows the key may run code here.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import hmac
import logging
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator

from ...errors import FrameSwapWarning, first_line
from .disk import Disk, packed
from .entry import Claim, Entry
from .far import LEASE, Far, Lease, connect, shown

log = logging.getLogger(__name__)

REST = 30.0
"""Seconds in which a place that has failed is left alone."""

LOOK = 1.0
"""Seconds between two looks for the same artifact, which somebody else compiles."""

AT_EXIT = 5.0
"""Seconds that the program's end waits for uploads."""

_SIGNED = b"frame-swap, signed\n"
_SIZE = hashlib.sha256().digest_size


def sign(key: bytes, name: str, data: bytes) -> bytes:
    """`data` behind its signature, for a place that knows it as `name`."""
    return _SIGNED + _signature(key, name, data) + data


def verified(key: bytes, name: str, signed: bytes) -> bytes | None:
    """What `sign` was given; None where it was not signed with this key for this name."""
    start = len(_SIGNED) + _SIZE
    signature, data = signed[len(_SIGNED) : start], signed[start:]
    is_ours = signed.startswith(_SIGNED) and hmac.compare_digest(signature, _signature(key, name, data))
    return data if is_ours else None


def _signature(key: bytes, name: str, data: bytes) -> bytes:
    return hmac.digest(key, name.encode() + b"\0" + data, "sha256")


class Shared:
    """Artifacts under keys, near and far.

    Args:
        near: on this machine's disk.
        url: of the place that the machines share.
        key: which they share, too.
    """

    is_far = True

    def __init__(self, near: Disk, url: str, key: bytes) -> None:
        self.near = near
        self._url = url
        self._key = key
        self._far: Far | None = None
        self._rests_until = 0.0
        self._has_warned = False
        self._looked: dict[str, float] = {}
        self._leases: list[Lease] = []
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        atexit.register(self.finish, AT_EXIT)

    # Near

    def get(self, key: str) -> Entry | None:
        """What is kept near."""
        return self.near.get(key)

    def has(self, key: str) -> bool:
        """Whether anything is kept near."""
        return self.near.has(key)

    def note(self, name: str) -> bytes | None:
        """A note of this machine's."""
        return self.near.note(name)

    def keep_note(self, name: str, note: bytes) -> None:
        """Keep a note on this machine."""
        self.near.keep_note(name, note)

    # Far

    def fetch(self, key: str) -> None:
        """Bring near what is far, if it is there. Takes as long as that takes, at most a few seconds."""
        now = time.monotonic()
        if self.near.has(key) or now - self._looked.get(key, -LOOK) < LOOK:
            return
        self._looked[key] = now
        with self._failures_noted():
            if (far := self._place()) is None or (signed := far.get(key)) is None:
                return
            if (data := verified(self._key, key, signed)) is None:
                log.warning(
                    "frame-swap: %s has %s, but not signed with FRAME_SWAP_STORE_KEY", shown(self._url), key
                )
                return
            self.near.put_file(key, data)

    def put(self, key: str, entry: Entry) -> str:
        """Keep `entry` near, and send it far on another thread; returns why it is not kept near, or ""."""
        data = packed(key, entry)
        failure = self.near.put_file(key, data)
        if not failure:
            self._later(lambda: self._put(key, data))
        return failure

    def _put(self, key: str, data: bytes) -> None:
        if (far := self._place()) is not None:
            far.put(key, sign(self._key, key, data))

    def remove(self, key: str) -> None:
        """Keep nothing under `key`, near and far."""
        self.near.remove(key)
        self._later(lambda: self._remove(key))

    def _remove(self, key: str) -> None:
        if (far := self._place()) is not None:
            far.remove(key)

    def claim(self, key: str) -> Claim | None:
        """The claim to `key`; None while another process of any of the machines has it."""
        if (near := self.near.claim(key)) is None:
            return None
        lease: Lease | None = None
        with self._failures_noted():
            if (far := self._place()) is not None:
                lease = far.claim(key)
                if lease is None:
                    near.release()
                    return None
                self._leases.append(lease)
        self._looked.pop(key, None)  # whoever had the claim may have been done since the last look
        self.fetch(key)
        return _SharedClaim(near, lambda: self._release(lease))

    def _release(self, lease: Lease | None) -> None:
        if lease is not None:
            self._later(lambda: self._end(lease))  # behind the upload

    def _end(self, lease: Lease) -> None:
        with contextlib.suppress(ValueError):
            self._leases.remove(lease)
        lease.release()

    def _place(self) -> Far | None:
        """The far place; None while it is left alone, and in a forked child, which shares its connections."""
        if time.monotonic() < self._rests_until or os.getpid() != self._pid:
            return None
        if self._far is None:
            self._far = connect(self._url)
        return self._far

    @contextlib.contextmanager
    def _failures_noted(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._rests_until = time.monotonic() + REST
            log.info("frame-swap: %s: %s", shown(self._url), first_line(error))
            if not self._has_warned:
                self._has_warned = True
                with contextlib.suppress(Warning):
                    warnings.warn(
                        f"frame-swap: the store {shown(self._url)} cannot be used now: {first_line(error)}; "
                        "compiled code is kept on this machine, and what other machines have compiled is compiled "
                        "here",
                        FrameSwapWarning,
                        stacklevel=2,
                    )

    # The thread that goes far

    def _later(self, task: Callable[[], None]) -> None:
        if os.getpid() != self._pid:
            return
        self._tasks.put(task)
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="frame-swap-far", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while True:
            try:
                task = self._tasks.get(timeout=LEASE / 3)
            except queue.Empty:
                for lease in list(self._leases):
                    with self._failures_noted():
                        lease.renew()
                continue
            with self._failures_noted():
                task()

    def finish(self, timeout: float) -> None:
        """Wait until all uploads are over, at most `timeout` seconds."""
        if self._thread is None or os.getpid() != self._pid:
            return
        over = threading.Event()
        self._tasks.put(over.set)
        over.wait(timeout)


class _SharedClaim:
    def __init__(self, near: Claim, release: Callable[[], None]) -> None:
        self._near = near
        self._release = release

    def release(self) -> None:
        self._near.release()
        self._release()

    def forget(self) -> None:
        self._near.forget()
