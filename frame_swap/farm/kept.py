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
        self._used: dict[str, tuple[Store, str, Callable[[], int]]] = {}
        self._began = False

    def note(self, place: Place, frame: str, calls: Callable[[], int]) -> None:
        """A region of the user's function `frame` is about to use what is at `place`.

        Args:
            calls: how many of its calls eager code has served.
        """
        if not self._used:
            profile.program()
            atexit.register(self._tell, os.getpid())
        self._used.setdefault(place.key, (place.store, frame, calls))

    def take(self, place: Place | None) -> Compiled | None:
        """What was loaded ahead from `place`; None where nothing was."""
        return None if place is None else self._loaded.pop(place.key, None)

    def load_ahead(self, load_soon: Callable[[Callable[[], None]], None]) -> bool:
        """Load what the last run has used. Whether that was something, and all of it is there.

        Args:
            load_soon: has the loader thread call a function.
        """
        if self._began or (store := chosen.current()) is None:
            return False
        self._began = True
        used = [use.key for use in profile.read(store)]
        there = [key for key in used if store.has(key)]
        if there:
            load_soon(functools.partial(self._load_all, store, there, settings.current().idle_timeout))
        return bool(used) and len(there) == len(used)

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

    def _tell(self, pid: int) -> None:
        """Leave a profile for the next run."""
        if os.getpid() != pid:
            return
        store = next(iter(self._used.values()))[0]
        uses = [profile.Use(key, frame, calls()) for key, (_, frame, calls) in self._used.items()]
        profile.write(store, uses)


uses = Uses()
