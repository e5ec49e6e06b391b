"""`python -m frame_swap cache`: the store of compiled code."""

from __future__ import annotations

import os
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .. import settings
from ..artifacts.store import archive, chosen, profile
from ..artifacts.store.disk import RECORD, Disk
from ..errors import UnusableArchive


def run(what: str, file: Path | None, limit: float | None) -> None:
    """Do what the command says.

    Args:
        what: "show", "prune", "export" or "import".
        file: what is exported to, or imported from.
        limit: how many gigabytes pruning leaves.

    Raises:
        SystemExit: with a message, where it cannot be done.
    """
    now = settings.current()
    if now.store == "off":
        raise SystemExit("frame-swap: FRAME_SWAP_STORE=off: there is no store")
    store = chosen.disk(chosen.folder(now.store), now.store_limit * 1e9)
    if store is None:
        raise SystemExit(1)  # a warning has said why
    if what == "prune":
        removed = store.evict((limit or 0.0) * 1e9)
        print(f"removed {len(removed)} artifacts, {_megabytes(sum(one.size for one in removed))}")
    elif what == "export":
        assert file is not None
        try:
            print(f"wrote {archive.export(store, file)} artifacts to {file}")
        except OSError as error:
            raise SystemExit(f"frame-swap: {file} cannot be written: {error}") from None
    elif what == "import":
        assert file is not None
        try:
            brought = archive.bring_in(store, file)
        except UnusableArchive as error:
            raise SystemExit(f"frame-swap: {error}") from None
        print(f"took over {brought.artifacts} artifacts")
        for reason in sorted(set(brought.refused)):
            print(f"refused {brought.refused.count(reason)}: {reason}")
    else:
        show(store)


def show(store: Disk) -> None:
    """Print the folder, how full it is, and what which program used."""
    kept = {one.key: one for one in store.kept()}
    size = sum(one.size for one in kept.values())
    print(f"{store.folder}: {len(kept)} artifacts, {_megabytes(size)} of {_megabytes(store.limit)}")
    if not kept:
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("program", "frame", "MB", "last used"):
        table.add_column(title, overflow="fold")
    owned: set[str] = set()
    for name in sorted(name for name in os.listdir(store.folder) if name.endswith(RECORD)):
        found = profile.parse(store.record(name.removesuffix(RECORD)))
        for use in found.uses:
            if use.key in kept:
                owned.add(use.key)
                one = kept[use.key]
                table.add_row(found.program, use.frame, f"{one.size / 1e6:.1f}", _moment(one.used))
    for one in kept.values():
        if one.key not in owned:
            table.add_row("", one.key[:12], f"{one.size / 1e6:.1f}", _moment(one.used))
    Console().print(table)


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB"
