"""What a program has used of a store, so that its next run can get that ready before it is asked for.

A profile is a small file of JSON beside the artifacts: keys, in the order in which the program came to need them.
No wrong answer can come from it: what the next run does not ask for is loaded in vain.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from typing import NamedTuple

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


def read(store: Store) -> list[Use]:
    """What the last run of this program has used, in order; nothing where there was none."""
    return parse(store.profile(_name()))[1]


def write(store: Store, uses: Iterable[Use]) -> None:
    """Keep what this run has used, for the next."""
    store.keep_profile(_name(), json.dumps({"program": program(), "uses": list(uses)[:MOST]}).encode())


def parse(profile: bytes | None) -> tuple[str, list[Use]]:
    """The program that a profile is of, and what that has used; ("", []) where it is damaged or there is none."""
    try:
        read = json.loads(profile or b"{}")
        return str(read.get("program", "")), [Use(*use) for use in read.get("uses", ())]
    except (ValueError, TypeError, AttributeError):
        return "", []


def _name() -> str:
    return hashlib.sha256(program().encode()).hexdigest()
