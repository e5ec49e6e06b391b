"""`python -m tests.conformance TREE`: run PyTorch's own Inductor tests through frame_swap, and say what is lost."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from . import outcomes
from .outcomes import Outcome
from .plugin import LARGE
from .verdict import Verdict, markdown, read_listed, show

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
MODES = ("wait", "ready", "never")
TIMEOUT = 400
"""Seconds for a test, compiles included."""


class Runs:
    """Runs of a source tree's tests: `pytest` in processes of its own, which outcomes outlive.

    Args:
        tree: PyTorch's source tree.
        files: test files of its `test/inductor`.
        expression: pytest's `-k`, or "".
        jobs: how many tests at a time.
        cache: where compiled kernels are kept, from one run to the next.
        results: where outcomes go: the path up to the mode's name.
        first: the setting `first` of frame_swap.
        store, artifact: these settings.
        resume: whether tests that have an outcome there are left out.
    """

    def __init__(
        self,
        tree: Path,
        files: Sequence[str],
        expression: str,
        jobs: int,
        cache: Path,
        results: str,
        resume: bool,
        first: str,
        store: str,
        artifact: str,
    ) -> None:
        self._folder = tree / "test" / "inductor"
        self._files = files
        self._expression = expression
        self._jobs = jobs
        self._results = results
        self._resume = resume
        # Most of a test's time goes into compiling C++. With one cache for all tests and modes each kernel is
        # compiled once, while every graph is still lowered anew each time: the caches of whole graphs are off.
        # (AOTAutograd's needs Inductor's; switched off by its own variable, a worker could not serialise.)
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("FRAME_SWAP_")},
            "PYTHONPATH": os.pathsep.join(filter(None, (str(PROJECT), os.environ.get("PYTHONPATH")))),
            "INDUCTOR_TEST_DISABLE_FRESH_CACHE": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(cache.resolve()),
            "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
            "FRAME_SWAP_FIRST": first,
            "FRAME_SWAP_STORE": store,
            "FRAME_SWAP_ARTIFACT": artifact,
            "FRAME_SWAP_WORKERS": "1",  # how much goes on at a time is for `jobs` to say
            "PYTHONWARNINGS": "ignore::DeprecationWarning",
        }

    def run(self, when: str, ids: Iterable[str] | None = None, label: str = "") -> dict[str, Outcome]:
        """Run the tests with `ids`, or all; returns their outcomes, and those that were kept.

        Raises:
            SystemExit: pytest could not do it, or was interrupted.
        """
        name = when if when == "stock" else f"{when}-{self._environment['FRAME_SWAP_FIRST']}"
        path = Path(f"{self._results}-{label or name}.jsonl").resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        if not self._resume:
            path.unlink(missing_ok=True)
        done = outcomes.read(path)
        wanted = None if ids is None else sorted(set(ids) - done.keys())
        if wanted == []:
            return done
        if self._jobs > 1 and (wanted is None or any(LARGE in one for one in wanted)):
            self._pytest(when, path, wanted, "together", self._jobs)
            self._pytest(when, path, wanted, "alone", 1)
        else:
            self._pytest(when, path, wanted, "all", self._jobs)
        return outcomes.read(path)

    def _pytest(self, when: str, results: Path, ids: list[str] | None, part: str, jobs: int) -> None:
        with tempfile.NamedTemporaryFile("w", suffix=".ids") as listing:
            command = [sys.executable, "-m", "pytest", *self._files, "-q", "--tb=no", "--show-capture=no"]
            command += [
                "--noconftest",
                "-c",
                os.devnull,
                "--rootdir",
                ".",
                "-W",
                "ignore",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:logging",  # its handlers listen to all that PyTorch traces, and a store keeps nothing then
            ]
            # In a process of pytest-xdist's even one at a time: it makes another where a test takes it down.
            command += ["--timeout", str(TIMEOUT), "-n", str(jobs), "--max-worker-restart", "1000"]
            command += ["-p", f"{__package__}.plugin", "--conformance-when", when, "--conformance-part", part]
            command += ["--conformance-outcomes", str(results)]
            if ids is not None:
                listing.write("\n".join(ids))
                listing.flush()
                command += ["--conformance-ids", listing.name]
            if self._expression:
                command += ["-k", self._expression]
            code = subprocess.run(command, cwd=self._folder, env=self._environment).returncode
        if code not in (0, 1, 5):  # passed, some failed, none was selected
            raise SystemExit(f"pytest ended with {code}; --resume goes on where it was")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as told on the command line; returns the exit status: 1 where a test that is not listed was lost."""
    chosen = _parse(arguments)
    tree: Path = chosen.tree.resolve()
    if not (tree / "test" / "inductor").is_dir():
        raise SystemExit(f"{tree} has no test/inductor; tests/conformance/fetch gets a PyTorch source tree")
    sample = _lines(HERE / "sample.txt") if chosen.sample else None
    files = list(dict.fromkeys(one.partition("::")[0] for one in sample)) if sample else chosen.file
    selection = "sample" if sample else "selected" if chosen.k else "all"
    results = f"{chosen.results}/torch-{torch.__version__}-{selection}"
    runs = Runs(
        tree,
        files,
        chosen.k,
        chosen.jobs,
        chosen.cache,
        results,
        chosen.resume,
        chosen.first,
        chosen.store,
        chosen.artifact,
    )

    print(f"torch {torch.__version__}, {', '.join(files)}; outcomes go to {results}-*.jsonl", flush=True)
    stock = outcomes.read(chosen.stock)
    if chosen.when == ["stock"] or not {one.file for one in stock.values()}.issuperset(files):
        print("\nstock Inductor", flush=True)
        stock = runs.run("stock", sample)
        if chosen.when == ["stock"]:
            return 0
    passed = {one.id for one in stock.values() if one.outcome == "passed" and one.file in files}
    if sample:
        passed &= set(sample)

    verdicts = []
    for when in chosen.when:
        print(f'\nframe_swap, when="{when}", first="{chosen.first}"', flush=True)
        ran = runs.run(when, passed)
        if not ran:
            raise SystemExit("no test was run")
        expected = passed & ran.keys() if chosen.k else passed
        of_mode = [
            Verdict(file, when, expected, ran, read_listed(when, chosen.first, chosen.artifact)) for file in files
        ]
        _try_again_with_stock(runs, of_mode)
        verdicts += of_mode
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print()
    show(verdicts, console)
    if chosen.markdown:
        chosen.markdown.write_text(f"torch {torch.__version__}\n\n{markdown(verdicts)}\n")
    return int(any(verdict.lost or verdict.not_run for verdict in verdicts))


def _try_again_with_stock(runs: Runs, verdicts: Iterable[Verdict]) -> None:
    """What stock does not pass on this machine, or not always, frame_swap has not lost."""
    lost = {outcome.id for verdict in verdicts for outcome in verdict.lost}
    if not lost:
        return
    print(f"\n{len(lost)} lost; whether stock Inductor passes them here", flush=True)
    again = runs.run("stock", lost, "stock-again")
    for verdict in verdicts:
        verdict.stock_too = {o.id for o in verdict.lost if o.id in again and again[o.id].outcome != "passed"}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "frame-swap" / "conformance"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    version = ".".join(torch.__version__.split(".")[:2])
    parser = argparse.ArgumentParser(
        prog="python -m tests.conformance",
        description="Run PyTorch's own Inductor tests with frame_swap in Inductor's place, and print which of "
        "those that stock Inductor passes are lost. tests/conformance/README.md says more.",
    )
    parser.add_argument("tree", type=Path, help="PyTorch's source tree; tests/conformance/fetch gets one")
    parser.add_argument(
        "--when",
        nargs="+",
        choices=(*MODES, "stock"),
        default=MODES,
        help="modes, one after the other (default: all)",
    )
    parser.add_argument(
        "--store", default="off", help="a folder for compiled code, which a second run takes (default: %(default)s)"
    )
    parser.add_argument(
        "--first", choices=("graph", "pair"), default="graph", help="the eager code (default: %(default)s)"
    )
    parser.add_argument(
        "--artifact",
        choices=("inductor", "aoti"),
        default="inductor",
        help="what compiled code is; with aoti, how many graphs are packages is said (default: %(default)s)",
    )
    parser.add_argument(
        "--file", nargs="+", default=["test_torchinductor.py"], help="files of test/inductor (default: %(default)s)"
    )
    parser.add_argument("-k", metavar="EXPR", default="", help="only tests that match, as pytest's -k")
    parser.add_argument("--sample", action="store_true", help="only the tests of sample.txt: minutes, not an hour")
    parser.add_argument("--jobs", type=int, default=1, help="tests at a time (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="keep the outcomes that are there and run the others")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the outcome as Markdown tables")
    parser.add_argument(
        "--stock",
        type=Path,
        default=HERE / "stock" / f"torch-{version}-{device}.jsonl",
        help="outcomes of stock Inductor (default: %(default)s); a run of it comes first where there are none",
    )
    parser.add_argument(
        "--results", type=Path, default=caches / "results", help="folder for outcomes (default: %(default)s)"
    )
    parser.add_argument(
        "--cache", type=Path, default=caches / "kernels", help="folder for compiled kernels (default: %(default)s)"
    )
    chosen = parser.parse_args(arguments)
    chosen.when = list(dict.fromkeys(chosen.when))
    if "stock" in chosen.when and len(chosen.when) > 1:
        parser.error("--when stock goes alone: a run of stock Inductor comes first anyway where it is needed")
    return chosen


def _lines(path: Path) -> list[str]:
    """The lines of a file, without comments and empty ones."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; --resume goes on where it was")
