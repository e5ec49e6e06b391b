"""What a program has used of a store, so that its next run can get that ready before it is asked for.

A profile is a note of JSON beside the artifacts: keys, in the order in which the program came to need them, and
those whose compile the program's end has cut short. The contents of these are notes of their own. No wrong answer
can come from a profile: what the next run does not ask for is loaded, or compiled, in vain.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pickle
import sys
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..seal import seal_for, unseal_for
from .entry import Store

MOST = 1000
"""How many regions a profile tells of."""


class Use(NamedTuple):
    """A region of the program.

    Attributes:
        key: of its artifact.
        frame: the user's function, for whoever reads the profile.
        calls: how many of its calls eager code served.
    """

    key: str
    frame: str
    calls: int


@functools.cache
def program() -> str:
    """What this program is known by: its main module's file, or else its command line.

    Ask before the program ends: Python forgets the file then.
    """
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    return os.path.realpath(file) if file else "\0".join(sys.orig_argv[1:])


class Profile(NamedTuple):
    """What a run of a program leaves for the next.

    Attributes:
        program: as `program` names it.
        uses: the regions with compiled code, in the order in which it came.
        unfinished: keys of those that had none yet.
    """

    program: str
    uses: list[Use]
    unfinished: list[str]


def read(store: Store) -> Profile:
    """What the last run of this program has left; nothing where there was none."""
    return parse(store.note(_name()))


def write(store: Store, uses: Iterable[Use], unfinished: Iterable[str]) -> None:
    """Leave this for the next run."""
    profile = {"program": program(), "uses": list(uses)[:MOST], "unfinished": list(unfinished)[:MOST]}
    store.keep_note(_name(), json.dumps(profile).encode())


def parse(note: bytes | None) -> Profile:
    """A profile as it was kept; empty where it is damaged or there is none."""
    try:
        read = json.loads(note or b"{}")
        uses = [Use(str(key), str(frame), int(calls)) for key, frame, calls in read.get("uses", ())]
        return Profile(str(read.get("program", "")), uses, [str(key) for key in read.get("unfinished", ())])
    except (ValueError, TypeError, AttributeError):
        return Profile("", [], [])


def keep_content(store: Store, key: str, content: bytes, sizes: Mapping[str, int]) -> None:
    """Keep what is to be compiled for `key`."""
    store.keep_note(key, seal_for(key, pickle.dumps((content, dict(sizes)))))


def take_content(store: Store, key: str) -> tuple[bytes, dict[str, int]] | None:
    """What `keep_content` was given, once: the content and the sizes; None where it is not there or damaged."""
    note = store.note(key)
    store.keep_note(key, b"")
    try:
        content, sizes = pickle.loads(unseal_for(key, note or b""))
    except Exception:
        return None
    return content, sizes


def _name() -> str:
    return hashlib.sha256(os.fsencode(program())).hexdigest()
