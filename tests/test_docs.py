"""The documents: links lead somewhere, and the commands and names that they show exist."""

from __future__ import annotations

import dataclasses
import functools
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import frame_swap
from frame_swap import __main__, settings
from frame_swap.region import states

pytestmark = pytest.mark.quick

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())
DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part in ("build", "dist") for part in path.relative_to(ROOT).parts)
)
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
BLOCK = re.compile(r"(<!-- states: [^\n]*-->\n)(.*?)(<!-- end of states -->\n)", re.DOTALL)


@pytest.fixture(params=DOCUMENTS, ids=NAMES)
def document(request: pytest.FixtureRequest) -> Path:
    return request.param


def test_links_lead_to_a_file_and_a_heading(document: Path) -> None:
    for target in _links(document.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.exists(), f"{target}: no such file"
        assert file.is_relative_to(ROOT), f"{target}: outside of the repository"
        if anchor:
            assert anchor in _anchors(file.read_text()), f"{target}: no such heading"


def test_modules_that_are_named_exist(document: Path) -> None:
    for name in re.findall(r"`((?:\w+/)+\w+(?:\.py)?)`", document.read_text()):
        top = name.partition("/")[0]
        if top in ("tests", "frame_swap", "benchmarks", "docs"):
            assert (ROOT / name).exists(), f"{name}: not there"
        elif (ROOT / "frame_swap" / top).is_dir():
            assert (ROOT / "frame_swap" / name).exists(), f"{name}: not there"


def test_modules_that_are_run_exist(document: Path) -> None:
    for words in _commands(document.read_text()):
        match words:
            case ["python", "-m", "frame_swap", command, *_]:
                with pytest.raises(SystemExit) as end:
                    __main__.main([command, "--help"])
                assert end.value.code == 0, f"frame_swap has no command {command}"
            case ["python", "-m", module, *_]:
                path = ROOT.joinpath(*module.split("."))
                known = path.with_suffix(".py").exists() or (path / "__main__.py").exists()
                assert known or module in ("pytest", "pip", "venv"), f"no module {module}"
            case ["pip", "install", *arguments]:
                for extras in re.findall(r"\.\[([\w,]+)\]", " ".join(arguments)):
                    assert set(extras.split(",")) <= _extras(), f"{arguments}: no such extra"
            case ["bash", script, *_]:
                assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0
            case ["pytest", *arguments]:
                for argument in arguments:
                    if not argument.startswith("-"):
                        assert (ROOT / argument.partition("::")[0]).exists(), f"{argument}: no such tests"


def test_public_names_exist(document: Path) -> None:
    code = "\n".join(text for language, text in _blocks(document.read_text()) if language == "python")
    for name in re.findall(r"\bframe_swap\.([a-z_]+)", code):
        assert name in frame_swap.__all__


def test_readme_lists_every_setting() -> None:
    text = (ROOT / "README.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (?:`(\w+)[^`]*`)? ?\|", text, re.MULTILINE))
    fields = {field.name for field in dataclasses.fields(settings.Settings)}
    assert rows.keys() & fields == fields
    for name in fields - {"executor"}:
        assert rows[name] == f"FRAME_SWAP_{name.upper()}"


def test_readme_lists_every_state() -> None:
    text = (ROOT / "README.md").read_text().partition("| state |")[2].partition("\n\n")[0]
    first_cells = re.findall(r"^\|([^|]*)\|", text, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(first_cells))) == sorted(
        set(map(str, frame_swap.State)) - {"replaced"}
    )  # of a compile only


def test_every_page_is_reachable_from_the_readme() -> None:
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen:
            continue
        seen.add(page)
        for target in _links(page.read_text()):
            file = (page.parent / target.partition("#")[0]).resolve()
            if file.suffix == ".md" and file.exists():
                waiting.append(file)
    assert set(DOCUMENTS) <= seen


def test_architecture_has_the_table_of_states_as_in_the_code() -> None:
    text = ARCHITECTURE.read_text()
    assert BLOCK.search(text).group(2) == _states(), "`python tests/test_docs.py` writes the table anew"
    events = text.partition("| event |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| ([a-z ]+) \|", events, re.MULTILINE) == [str(event) for event in states.Event]


def test_architecture_has_every_room() -> None:
    tree = ARCHITECTURE.read_text().partition("\nframe_swap/\n")[2].partition("\nguards/")[0]
    listed = set(re.findall(r"^  (\w+)", tree, re.MULTILINE))
    there = {path.stem for path in (ROOT / "frame_swap").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert listed == {name for name in there - {"guards", "__pycache__"} if not name.startswith(".")}


def _states() -> str:
    """The table of transitions, as Markdown."""
    lines = ["| state | changes: event → state | ignores |", "|---|---|---|"]
    for state, row in states.TRANSITIONS.items():
        changes = ", ".join(f"{event} → `{after}`" for event, after in row.items() if after is not state)
        ignored = ", ".join(str(event) for event, after in row.items() if after is state)
        lines.append(f"| `{state}` | {changes} | {ignored} |")
    order = sorted(states.State, key=functools.cmp_to_key(lambda a, b: -1 if states.leading((a, b)) is a else 1))
    lines += ["", "A region has the first of these states that one of its attempts has:"]
    lines += [", ".join(f"`{state}`" for state in order) + "."]
    return "\n".join(lines) + "\n"


def _links(text: str) -> list[str]:
    """Targets of links and images outside of code."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "`code`", prose))


def _anchors(text: str) -> set[str]:
    """The names that GitHub gives to headings."""
    titles = re.findall(r"^#+ +(.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def _blocks(text: str) -> list[tuple[str, str]]:
    """Language and text of each fenced block; indented ones count as "sh"."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return fenced + [("sh", "\n".join(re.findall(r"^    (\S.*)$", rest, re.MULTILINE)))]


def _commands(text: str) -> Iterator[list[str]]:
    """Shell commands, as words; one of several that `&&` joins comes alone."""
    for language, block in _blocks(text):
        if language != "sh":
            continue
        for line in block.splitlines():
            if not re.match(r"(python|pip|pytest|bash|ruff|mypy|pre-commit) ?", line):
                continue
            for command in re.split(r" && ", line):
                yield shlex.split(command, comments=True)


def _extras() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return set(project["optional-dependencies"])


if __name__ == "__main__":
    ARCHITECTURE.write_text(BLOCK.sub(lambda found: found[1] + _states() + found[3], ARCHITECTURE.read_text()))
