"""The store in force, as the setting `store` says."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings

from ... import settings
from ...errors import FrameSwapWarning, UnsafeFolder, first_line
from ...internals import inductor
from .. import folders
from . import far
from .disk import Disk
from .entry import Store


def store(wished: settings.Settings) -> Store | None:
    """The store that is in force with these settings; None where nothing is to be kept."""
    if inductor.caches_are_off() or (near := disk(wished)) is None:
        return None
    return shared(near, wished.store) if far.is_url(wished.store) else near


@functools.lru_cache(maxsize=8)
def shared(near: Disk, url: str) -> Store:
    """What is behind `url`, with `near` in front of it; `near` alone, and one warning, where there is no key."""
    key = os.environ.get(KEY, "")
    if len(key) < SHORTEST:
        with contextlib.suppress(Warning):
            warnings.warn(
                f"frame-swap: the store {far.shown(url)} is not used, since who can write there could run code "
                f"here: set {KEY} to the same {SHORTEST} characters or more on all machines",
                FrameSwapWarning,
                stacklevel=2,
            )
        return near
    from .shared import Shared

    return Shared(near, url, key.encode())


KEY = "FRAME_SWAP_STORE_KEY"
"""The variable with the key that machines share; what they keep is signed with it."""

SHORTEST = 16
"""How many characters a key has at least."""


def disk(wished: settings.Settings) -> Disk | None:
    """The store on disk that these settings name: below Inductor's cache folder, unless they name a folder."""
    folder = folder_of(wished)
    return None if folder is None else in_folder(folder, wished.store_limit * 1e9)


def folder_of(wished: settings.Settings) -> str | None:
    """The folder that these settings name for the store, whether it can be used or not."""
    if wished.store == "off":
        return None
    if wished.store != "on" and not far.is_url(wished.store):
        return os.path.abspath(os.path.expanduser(wished.store))
    return os.path.join(os.environ.get(folders.INDUCTOR) or folders.default_cache(), "frame_swap")


@functools.lru_cache(maxsize=8)
def in_folder(folder: str, limit: float) -> Disk | None:
    """The store in `folder`; None, and one warning, where others could put code there or it cannot be made."""
    try:
        folders.make_own(folder)
    except (UnsafeFolder, OSError) as error:
        with contextlib.suppress(Warning):  # a filter may turn it into an error, which must not reach a call
            warnings.warn(
                f"frame-swap: nothing is kept for the next run, or taken from an earlier one: the store {folder} "
                f'cannot be used: {first_line(error)}; set FRAME_SWAP_STORE to a folder of your own, or to "off"',
                FrameSwapWarning,
                stacklevel=2,
            )
        return None
    return Disk(folder, limit)
