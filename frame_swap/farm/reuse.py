"""What earlier runs and other processes have compiled for this program, and what it tells its next run.

Guarantees:
- What was loaded ahead is what a load at the time would have given: the state and the options that it was loaded
  with are part of the content that its key stands for. Each is taken once; what nobody has taken after
  `idle_timeout` is dropped.
- Nothing here raises. What has no key is compiled as if there were no store; what cannot be loaded ahead is loaded,
  or compiled, when it is asked for.
- A forked child tells the next run nothing.

Assumed: `_load` runs on the loader thread; one operation on a dictionary is one step, as under the GIL.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from .. import settings
from ..artifacts import load
from ..artifacts.compiled import Compiled
from ..artifacts.store import chosen, profile
from ..artifacts.store.entry import Store
from ..artifacts.store.key import key_of
from ..errors import first_line
from ..internals import dynamo
from ..shipping.parcel import Parcel, repacked
from .protocol import Outcome

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where an artifact is kept: a store, and the key there."""

    store: Store
    key: str


def place_of(parcel: Parcel, sizes: dict[str, int] | None, wished: settings.Settings) -> Place | None:
    """The place for the artifact of `parcel`, compiled for `sizes`; None where it is not to be kept.

    Args:
        wished: the settings that were in force when the graph was captured.
    """
    if parcel.uncacheable or (store := chosen.store(wished)) is None:
        return None
    try:
        return Place(store, key_of(parcel, sizes))
    except Exception:  # a GPU that does not answer, say
        log.warning("frame-swap: an artifact has no key, and is not kept for the next run", exc_info=True)
        return None


def find(place: Place | None) -> Outcome | None:
    """The outcome of a compile that an earlier run, or another process, has made; None where there is none."""
    entry = None if place is None else place.store.get(place.key)
    if entry is None:
        return None
    now = time.time()
    return Outcome(entry.artifact, entry.late_guards, "", "", now, now, now, 0, entry.echo, store="found")


class _Asked(NamedTuple):
    """A compile that was asked for: a parcel's content, sizes of symbols, and whether it is still to come."""

    content: bytes
    sizes: dict[str, int]
    pending: Callable[[], bool]


_cuda_is_initialized: Callable[[], bool] = torch.cuda.is_initialized


class Uses:
    """What this program uses of a store, and what its last run has used.

    Attributes:
        unfinished: where that is to be kept which the last run has not waited for.
    """

    def __init__(self) -> None:
        self.unfinished: list[Place] = []
        self._loaded: dict[str, Compiled] = {}
        self._used: dict[str, tuple[str, Callable[[], int]]] = {}
        self._asked: dict[str, _Asked] = {}
        self._all_there: bool | None = None
        self._asks = self._tells = False

    def begins(self) -> None:
        """The program asks for code: from now on nothing is loaded ahead."""
        self._asks = True

    def asked(self, place: Place, parcel: Parcel, sizes: dict[str, int], pending: Callable[[], bool]) -> None:
        """A compile is asked for whose result will be at `place`; `pending` tells whether it is still to come."""
        self._tell_at_exit(place.store)
        for key, asked in list(self._asked.items()):
            if not asked.pending():
                self._asked.pop(key, None)
        self._asked[place.key] = _Asked(parcel.content, sizes, pending)

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

    def prepare(self, load_soon: Callable[[Callable[[], None]], None]) -> bool:
        """Load ahead what the last run has used. Whether that was something, and all of it is in the store.

        Args:
            load_soon: has the loader thread call a function.
        """
        if self._all_there is None:
            self._all_there = False
            try:
                self._all_there = self._prepare(load_soon)
            except Exception:
                log.warning("frame-swap: nothing is loaded ahead of the first call", exc_info=True)
        return self._all_there

    def _prepare(self, load_soon: Callable[[Callable[[], None]], None]) -> bool:
        if (store := chosen.store(settings.current())) is None:
            return False
        last = profile.read(store)
        self.unfinished = [Place(store, key) for key in last.unfinished]
        there = [use.key for use in last.uses if store.has(use.key)]
        for key in there:
            load_soon(functools.partial(self._load, Place(store, key)))
        if there:
            timeout = min(settings.current().idle_timeout, threading.TIMEOUT_MAX)
            timer = threading.Timer(timeout, self._loaded.clear)
            timer.daemon = True
            timer.start()
        return bool(last.uses) and len(there) == len(last.uses)

    def take_unfinished(self) -> tuple[Place, Parcel, dict[str, int]] | None:
        """A compile that the last run has asked for and not waited for, and that is still to be made; each once."""
        while self.unfinished:
            place = self.unfinished.pop()
            taken = profile.take_content(place.store, place.key)
            if taken is None or place.store.has(place.key):
                continue
            content, sizes = taken
            with contextlib.suppress(Exception):  # a content of another torch, say
                parcel = repacked(content)
                if key_of(parcel, sizes) == place.key:
                    return place, parcel, sizes
        return None

    def _load(self, place: Place) -> None:
        """Load, unless the program has begun to ask: a load would hold up one that is asked for."""
        with dynamo.compile_lock:
            if self._asks or (entry := place.store.get(place.key)) is None:
                return
            try:
                state, options = pickle.loads(entry.loading)
                if "cuda" in state.autocast and not _cuda_is_initialized():  # that is for the program to do
                    return
                self._loaded[place.key] = load.load(entry.artifact, state, options, guarded=True)
            except Exception as error:
                log.info("frame-swap: %s could not be loaded ahead: %s", place.key, first_line(error))

    def _tell_at_exit(self, store: Store) -> None:
        if not self._tells:
            self._tells = True
            profile.program()  # which remembers it: at exit Python has forgotten the file
            atexit.register(self._tell, store)

    def _tell(self, store: Store) -> None:
        """Leave a profile for the next run."""
        if os.getpid() != _PROGRAM:
            return
        unfinished = []
        for key, asked in self._asked.items():
            if asked.pending() and not store.has(key):
                profile.keep_content(store, key, asked.content, asked.sizes)
                unfinished.append(key)
        uses = [profile.Use(key, frame, calls()) for key, (frame, calls) in self._used.items()]
        profile.write(store, uses, unfinished)


_PROGRAM = os.getpid()
"""A child that is forked later has another number."""

uses = Uses()
