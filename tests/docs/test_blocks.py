"""Every code block of the documents is run: a page's Python as one program, its files by its commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import why_no_kept_frames, why_no_packages

from .blocks import ROOT, Block, blocks, commands, files, pages, program

NEEDS = {
    "recipes/trainer.md": ("transformers", "accelerate"),
    "recipes/accelerate.md": ("accelerate",),
    "recipes/lightning.md": ("lightning",),
    "recipes/notebooks.md": ("nbclient", "ipykernel"),
    "recipes/dask.md": ("distributed",),
    "recipes/ray.md": ("ray",),
    "recipes/mpi.md": ("mpi4py",),
    "timeline.md": ("matplotlib",),
}
"""What a page needs that frame-swap does not bring along."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT)).removeprefix("docs/")


def check(words: list[str], folder: Path) -> str:
    """Run a program in `folder`; returns what it prints."""
    environment = os.environ | {"FRAME_SWAP_STORE": str(folder / "store")}
    search = [str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, search))
    environment["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), environment["PATH"]])
    environment |= dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1")
    ended = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    printed = ended.stdout + ended.stderr
    assert ended.returncode == 0, printed
    return printed


def is_of_a_setting(page: Path) -> bool:
    """Whether a page can run in one process with others of its kind. Processes of an executor run the main file."""
    plain = not files(page) and not commands(page)
    return page.parent.name == "settings" and page.stem != "executor" and plain


ONE_AFTER_THE_OTHER = """
import sys
import torch
import frame_swap
from frame_swap import settings
from frame_swap.region import record

for page in sys.argv[1:]:
    print(page)
    frame_swap.configure(**vars(settings.Settings(store=f"{page}.store")))  # so that each compiles
    torch._dynamo.reset()
    record.forget_all()
    exec(compile(open(page).read(), page, "exec"), {"__name__": "__main__"})
"""


def test_the_code_of_the_settings_pages_runs(tmp_path: Path) -> None:
    names = []
    for page in filter(is_of_a_setting, pages()):
        if page.stem == "keep_frames" and why_no_kept_frames():  # it shows that a frame is not traced again
            continue
        names.append(f"{page.stem}.py")
        (tmp_path / names[-1]).write_text(program(page))
    assert len(names) > 10
    check([sys.executable, "-c", ONE_AFTER_THE_OTHER, *names], tmp_path)


def marks_of(page: Path) -> list[pytest.MarkDecorator]:
    if page.parent.name == "recipes":
        return [pytest.mark.long if page.stem == "trainer" else pytest.mark.thorough]
    return []


RUN = [
    pytest.param(page, id=name_of(page), marks=marks_of(page))
    for page in pages()
    if (program(page) or commands(page)) and not is_of_a_setting(page)
]


@pytest.mark.parametrize("page", RUN)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    for package in NEEDS.get(name_of(page), ()):
        pytest.importorskip(package, reason=f"the page shows {package}")
    if name_of(page) == "packages.md" and (reason := why_no_packages()):
        pytest.skip(reason)
    for name, text in files(page).items():
        (tmp_path / name).write_text(text)
    if text := program(page):
        (tmp_path / "page.py").write_text(text)
        check([sys.executable, "page.py"], tmp_path)
    for block in commands(page):
        printed = check(["bash", "-euc", block.text], tmp_path)
        assert block.prints in printed


@pytest.mark.fast
@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_no_block_is_left_out_unsaid(page: Path) -> None:
    for block in blocks(page):
        if block.comment.startswith("run: no"):
            assert block.comment.partition(",")[2].strip(), "say why it is not run"
        if block.language == "python" and block.file:
            assert any(block.file in other.text for other in commands(page)), f"nothing runs {block.file}"


@pytest.mark.fast
def test_a_page_that_does_not_work_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nx = 1\n```\n\n<!-- run: no, for the test -->\n```python\n1 / 0\n```\n```python\nx / 0\n```\n"
    )
    assert program(page) == "x = 1\n\nx / 0\n"
    (tmp_path / "page.py").write_text(program(page))
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        check([sys.executable, "page.py"], tmp_path)


def test_files_and_commands_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- file: a.py -->\n```python\n1\n```\n\n<!-- run; prints: yes, -->\n```sh\necho yes, sir\n```\n"
    )
    assert files(page) == {"a.py": "1\n"}
    assert commands(page) == [Block("sh", "echo yes, sir\n", "run; prints: yes,")]
    assert program(page) == ""
