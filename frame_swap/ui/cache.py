"""`python -m frame_swap cache`: the store of compiled code."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .. import settings
from ..artifacts.store import archive, chosen, profile
from ..artifacts.store.disk import Disk
from ..errors import UnusableArchive


def run(what: str, file: Path | None, limit: float) -> None:
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
    store = chosen.disk(now)
    if store is None:
        raise SystemExit(1)  # a warning has said why
    if what == "prune":
        prune(store, limit)
    elif what == "export" and file is not None:
        export(store, file)
    elif what == "import" and file is not None:
        import_file(store, file)
    else:
        show(store)


def prune(store: Disk, limit: float) -> None:
    """Remove what was not used for longest, until the store takes `limit` gigabytes at most."""
    removed = store.evict(max(0.0, limit) * 1e9)
    print(f"removed {len(removed)} artifacts, {_megabytes(sum(one.size for one in removed))}")


def export(store: Disk, file: Path) -> None:
    """Write all of the store into one file."""
    try:
        print(f"wrote {archive.export(store, file)} artifacts to {file}")
    except OSError as error:
        raise SystemExit(f"frame-swap: {file} cannot be written: {error}") from None


def import_file(store: Disk, file: Path) -> None:
    """Take over all of such a file."""
    try:
        imported = archive.import_archive(store, file)
    except UnusableArchive as error:
        raise SystemExit(f"frame-swap: {error}") from None
    print(f"took over {imported.artifacts} artifacts")
    for reason in sorted(set(imported.refused)):
        print(f"refused {imported.refused.count(reason)}: {reason}")


def show(store: Disk) -> None:
    """Print the folder, how full it is, and what which program used."""
    artifacts = {one.key: one for one in store.artifacts()}
    size = sum(one.size for one in artifacts.values())
    print(f"{store.folder}: {len(artifacts)} artifacts, {_megabytes(size)} of {_megabytes(store.limit)}")
    if not artifacts:
        return
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("program", "frame", "MB", "last used"):
        table.add_column(title, overflow="fold")
    owned: set[str] = set()
    for name in store.notes():
        last = profile.parse(store.note(name))
        for use in last.uses:
            if (one := artifacts.get(use.key)) is not None:
                owned.add(use.key)
                table.add_row(last.program, use.frame, f"{one.size / 1e6:.1f}", _moment(one.used))
    for one in artifacts.values():
        if one.key not in owned:
            table.add_row("", one.key[:12], f"{one.size / 1e6:.1f}", _moment(one.used))
    Console(markup=False).print(table)


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB"
