"""Places that several machines share: a Redis server, or whatever fsspec reaches by a URL.

Each keeps bytes under names. A method may raise whatever its library raises, after at most `TIMEOUT` seconds where
the library lets one say so. Nothing is imported or contacted before `connect`.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import uuid
from typing import Any, Protocol

TIMEOUT = 3.0
"""Seconds after which a server that does not answer is given up."""

LEASE = 30.0
"""Seconds after which a claim ends that nobody has renewed, since its process or its machine is gone."""


class Lease(Protocol):
    """A claim that ends by itself unless it is renewed."""

    def renew(self) -> None:
        """Have it last `LEASE` seconds from now."""

    def release(self) -> None:
        """End it."""


class Far(Protocol):
    """A place on another machine, or that other machines see."""

    def get(self, name: str) -> bytes | None:
        """What was put there; None where nothing was."""

    def put(self, name: str, data: bytes) -> None:
        """Keep `data`: who reads meanwhile finds all of it, or what was there."""

    def remove(self, name: str) -> None:
        """Keep nothing."""

    def claim(self, name: str) -> Lease | None:
        """The one claim to `name`; None while somebody has it. Where a place knows no claims, each gets one."""


def is_url(store: str) -> bool:
    """Whether the setting `store` names such a place."""
    return "://" in store


def shown(url: str) -> str:
    """`url` for people: without a user's name and password."""
    scheme, _, rest = url.partition("://")
    server, slash, path = rest.partition("/")
    return f"{scheme}://{server.rpartition('@')[2]}{slash}{path.partition('?')[0]}"


def connect(url: str) -> Far:
    """The place that `url` names.

    Raises:
        ImportError: the package that it takes is not installed.
        Exception: of the library's, where the URL cannot be used.
    """
    if url.partition("://")[0] in ("redis", "rediss", "unix"):
        return _Redis(url)
    return _Files(url)


class _Redis:
    def __init__(self, url: str) -> None:
        import redis

        self._client: Any = redis.Redis.from_url(url, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT)

    def get(self, name: str) -> bytes | None:
        found: bytes | None = self._client.get(f"frame_swap:{name}")
        return found

    def put(self, name: str, data: bytes) -> None:
        self._client.set(f"frame_swap:{name}", data)

    def remove(self, name: str) -> None:
        self._client.delete(f"frame_swap:{name}")

    def claim(self, name: str) -> Lease | None:
        lock = self._client.lock(f"frame_swap:{name}:claim", timeout=LEASE, blocking=False, thread_local=False)
        return _RedisLease(lock) if lock.acquire() else None


class _RedisLease:
    def __init__(self, lock: Any) -> None:
        self._lock = lock

    def renew(self) -> None:
        self._lock.extend(LEASE, replace_ttl=True)

    def release(self) -> None:
        self._lock.release()


class _Files:
    """Object stores and shared folders. They have no claims."""

    def __init__(self, url: str) -> None:
        import fsspec

        options: dict[str, Any] = {}
        if url.startswith(("s3:", "s3a:")):
            limits = {"connect_timeout": TIMEOUT, "read_timeout": TIMEOUT, "retries": {"max_attempts": 0}}
            options = {"config_kwargs": limits, "use_listings_cache": False}
        self._files, self._root = fsspec.core.url_to_fs(url, **options)
        self._is_folder = "file" in self._files.protocol

    def _path(self, name: str) -> str:
        return posixpath.join(self._root, name)

    def get(self, name: str) -> bytes | None:
        try:
            found: bytes = self._files.cat_file(self._path(name))
        except FileNotFoundError:
            return None
        return found

    def put(self, name: str, data: bytes) -> None:
        if not self._is_folder:  # an object appears when all of it is there
            self._files.pipe_file(self._path(name), data)
            return
        os.makedirs(self._root, exist_ok=True)
        part = self._path(f"{name}.{uuid.uuid4().hex}.part")
        try:
            self._files.pipe_file(part, data)
            os.replace(part, self._path(name))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._files.rm(self._path(name))

    def claim(self, name: str) -> Lease | None:
        return _NoLease()


class _NoLease:
    def renew(self) -> None:
        pass

    def release(self) -> None:
        pass
