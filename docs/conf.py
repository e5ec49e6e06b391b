"""The site of the documents: `sphinx-build -W docs site` builds it (`pip install -e ".[docs]"`)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

project = "frame-swap"
author = "the developers of frame-swap"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "frame-swap"
myst_heading_anchors = 3
exclude_patterns = ["site"]
suppress_warnings = ["myst.header"]  # a page may begin below its title's level: the README does

HERE = Path(__file__).parent
SOURCE = os.environ.get("FRAME_SWAP_SOURCE_URL", "")
"""Where the repository can be read, such as https://host/owner/frame-swap/blob/main; "" for nowhere."""


def outside(source: str, folder: Path) -> str:
    """The page with links to files outside of docs/ made absolute, or taken away where nothing can be linked to.

    The pages are read in the repository, too, where these links lead somewhere.
    """

    def link(found: re.Match[str]) -> str:
        mark, text, target = found.groups()
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or not path:
            return found[0]
        file = (folder / path).resolve()
        if file.is_relative_to(HERE):
            return found[0]
        if mark:  # a picture: Sphinx copies it
            return f"{mark}[{text}]({os.path.relpath(file, folder)})"
        if not SOURCE:
            return text
        return f"[{text}]({SOURCE}/{file.relative_to(HERE.parent)}{'#' + anchor if anchor else ''})"

    return re.sub(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)", link, source)


def setup(app: Any) -> None:
    """Called by Sphinx."""

    def read(app: Any, name: str, content: list[str]) -> None:
        content[0] = outside(content[0], (HERE / name).parent)

    app.connect("source-read", read)
