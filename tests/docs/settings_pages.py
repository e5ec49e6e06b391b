"""The parts of docs/settings.md and docs/settings/ that say what the code says.

python tests/docs/settings_pages.py     writes them anew
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
from pathlib import Path

from frame_swap.settings import Settings

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"(<!-- settings: [^\n]*-->\n).*?(<!-- end of settings -->\n)", re.DOTALL)


def table() -> str:
    """A row for each setting, for docs/settings.md."""
    rows = ["| setting | type | default | variable |", "|---|---|---|---|"]
    for field in dataclasses.fields(Settings):
        rows.append(f"| [`{field.name}`](settings/{field.name}.md) | {_facts(field)} |")
    return "\n".join(rows) + "\n"


def head(field: dataclasses.Field[object]) -> str:
    """What stands at the top of a setting's own page."""
    facts = f"| type | default | variable |\n|---|---|---|\n| {_facts(field)} |"
    description = textwrap.fill(field.metadata["about"].description, 116, break_on_hyphens=False)
    return f"{facts}\n\n{description}\n"


def _facts(field: dataclasses.Field[object]) -> str:
    about = field.metadata["about"]
    kind = str(field.type).replace("|", r"\|")
    for name in ("When", "First", "Capture", "Tiers"):
        kind = kind.replace(name, "str")
    return f"`{kind}` | {about.default} | {f'`FRAME_SWAP_{field.name.upper()}`' if about.parse else ''}"


def pages() -> dict[Path, str]:
    """Each page, with its generated part as it should be."""
    wanted = {DOCS / "settings.md": table()}
    wanted |= {DOCS / "settings" / f"{field.name}.md": head(field) for field in dataclasses.fields(Settings)}
    return {page: BLOCK.sub(lambda found: found[1] + wanted[page] + found[2], page.read_text()) for page in wanted}


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text)
