"""What earlier runs and other processes have compiled for this program, and what it tells its next run.

Guarantees:
- What was loaded ahead is what a load at the time would have given: the state and the options that it was loaded
  with are part of the content that its key stands for. Each is taken once; what nobody has taken after
  `idle_timeout` is dropped.
- Nothing here raises. What cannot be loaded ahead is loaded, or compiled, when it is asked for.
- A forked child tells the next run nothing.

Assumed: `_load_all` runs on the loader thread; one operation on a dictionary is one step, as under the GIL.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .. import settings
from ..artifacts import load
from ..artifacts.compiled import Compiled
from ..artifacts.store import chosen, profile
from ..artifacts.store.entry import Entry, Store
from ..artifacts.store.key import key_of
from ..errors import first_line
from ..internals import dynamo
from ..shipping.parcel import Parcel
from .protocol import Outcome

log = logging.getLogger(__name__)


CompileSoon = Callable[["Place", bytes, dict[str, int]], None]
"""Takes a place, the content of a parcel, and sizes of symbols."""


class Place(NamedTuple):
    """Where an artifact is kept: a store, and the key there."""

    store: Store
    key: str


def place_of(parcel: Parcel, sizes: dict[str, int] | None = None) -> Place | None:
    """The place for the artifact of `parcel`, compiled for `sizes`; None where it is not to be kept."""
    if parcel.transient or (store := chosen.current()) is None:
        return None
    return Place(store, key_of(parcel, sizes))


def outcome_of(entry: Entry) -> Outcome:
    """The outcome of a compile that an earlier run, or another process, has made."""
    now = time.time()
    return Outcome(entry.artifact, entry.late_guards, "", "", now, now, now, 0, store="found")


def find(place: Place | None) -> Outcome | None:
    """What an earlier run, or another process, has compiled; None where the store has nothing."""
    entry = None if place is None else place.store.get(place.key)
    return None if entry is None else outcome_of(entry)


class Uses:
    """What this program uses of a store, and what its last run has used."""

    def __init__(self) -> None:
        self._loaded: dict[str, Compiled] = {}
        self._used: dict[str, tuple[str, Callable[[], int]]] = {}
        self._asked: dict[str, tuple[Parcel, dict[str, int], Callable[[], bool]]] = {}
        self._tells = self._began = False

    def asked(self, place: Place, parcel: Parcel, sizes: dict[str, int], pending: Callable[[], bool]) -> None:
        """A compile is asked for whose result will be at `place`; `pending` tells whether it is still to come."""
        self._tell_at_exit(place.store)
        self._asked[place.key] = parcel, sizes, pending

    def came(self, place: Place, frame: str, calls: Callable[[], int]) -> None:
        """A region of the user's function `frame` is about to use what is at `place`.

        Args:
            calls: how many of its calls eager code has served.
        """
        self._tell_at_exit(place.store)
        self._used.setdefault(place.key, (frame, calls))
        self._asked.pop(place.key, None)

    def take(self, place: Place | None) -> Compiled | None:
        """What was loaded ahead from `place`; None where nothing was."""
        return None if place is None else self._loaded.pop(place.key, None)

    def prepare(self, load_soon: Callable[[Callable[[], None]], None], compile_soon: CompileSoon) -> bool:
        """Get ready what the last run has used or would have. Whether that was something, and all of it is there.

        Args:
            load_soon: has the loader thread call a function.
            compile_soon: compiles for a place when the program leaves time for it.
        """
        if self._began or (store := chosen.current()) is None:
            return False
        self._began = True
        last = profile.read(store)
        there = [use.key for use in last.uses if store.has(use.key)]
        if there:
            load_soon(functools.partial(self._load_all, store, there, settings.current().idle_timeout))
        for key in last.unfinished:
            taken = profile.take_content(store, key)
            if taken is not None and not store.has(key):
                compile_soon(Place(store, key), *taken)
        return bool(last.uses) and len(there) == len(last.uses)

    def _load_all(self, store: Store, keys: Sequence[str], patience: float) -> None:
        """Load until the program begins to ask: from then on a load here would hold up one that is asked for."""
        for key in keys:
            with dynamo.compile_lock:
                if self._used:
                    break
                if (entry := store.get(key)) is None:
                    continue
                try:
                    load.prepare()
                    state, options = pickle.loads(entry.loading)
                    self._loaded[key] = load.load(entry.artifact, state, options, guarded=True)
                except Exception as error:
                    log.info("frame-swap: %s could not be loaded ahead: %s", key, first_line(error))
        if self._loaded:
            timer = threading.Timer(patience, self._loaded.clear)
            timer.daemon = True
            timer.start()

    def _tell_at_exit(self, store: Store) -> None:
        if not self._tells:
            self._tells = True
            profile.program()
            atexit.register(self._tell, store, os.getpid())

    def _tell(self, store: Store, pid: int) -> None:
        """Leave a profile for the next run."""
        if os.getpid() != pid:
            return
        unfinished = []
        for key, (parcel, sizes, pending) in self._asked.items():
            if pending() and not store.has(key):
                profile.keep_content(store, key, parcel.content, sizes)
                unfinished.append(key)
        uses = [profile.Use(key, frame, calls()) for key, (frame, calls) in self._used.items()]
        profile.write(store, uses, unfinished)


uses = Uses()
