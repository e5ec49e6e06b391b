"""What a store is."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Entry(NamedTuple):
    """What is kept under a key.

    Attributes:
        artifact: sealed, as a worker has sent it.
        late_guards: pickled, as they came with it.
        loading: what loading takes besides, pickled: the process state and the options of the content.
        echo: what the compile left behind besides code, as in its outcome.
    """

    artifact: bytes
    late_guards: bytes
    loading: bytes
    echo: bytes = b""


class Claim(Protocol):
    """The right to compile what a key stands for, while others wait. It ends with the process at the latest."""

    def release(self) -> None:
        """The compile is over, and its result kept if there is one."""

    def forget(self) -> None:
        """In a forked child: the claim is the parent's."""


class Store(Protocol):
    """Keeps artifacts under keys, those of `key.key_of`. No method raises: what goes wrong is a miss and logged.

    Attributes:
        is_far: whether `fetch` and `claim` take as long as another machine takes to answer.
    """

    is_far: bool

    def fetch(self, key: str) -> None:
        """Have `get` find what other machines have kept under `key`, where there are others."""

    def get(self, key: str) -> Entry | None:
        """What is kept under `key`; None where there is nothing that this process can use."""

    def put(self, key: str, entry: Entry) -> str:
        """Keep `entry` under `key`; returns why it could not be done, or ""."""

    def has(self, key: str) -> bool:
        """Whether anything is kept under `key`."""

    def note(self, name: str) -> bytes | None:
        """What `keep_note` was given last for this name, of hexadecimal digits."""

    def keep_note(self, name: str, note: bytes) -> None:
        """Keep something small beside the artifacts, if it can be done; where `note` is empty, nothing."""

    def remove(self, key: str) -> None:
        """Keep nothing under `key`: what was there has turned out to be of no use."""

    def claim(self, key: str) -> Claim | None:
        """The claim to `key`; None while another process has it."""
