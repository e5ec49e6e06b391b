"""pytest plugin: PyTorch's test files as they are, with frame_swap in Inductor's place.

It runs in each of pytest-xdist's workers, which run the tests, and in the process that directs them, which writes
the outcomes: so a test that takes its worker down has an outcome, too.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from . import outcomes
from .outcomes import Outcome

_PROPERTY = "conformance"

LARGE = "test_large_"
"""In the names of tests that take up to 17 GiB: no two of them may run at once."""

_OWN_CACHE = "aoti_eager"
"""In the names of tests that expect a cache without what the test before has put there."""

_PATCHES = pytest.StashKey[contextlib.ExitStack]()

_outcomes_path = Path(os.devnull)

aside = 0
"""Graphs of the current test that were left to stock Inductor, since they were not compiled by way of Dynamo."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("conformance")
    group.addoption("--conformance-when", default="stock", help="wait, ready, never or stock")
    group.addoption("--conformance-ids", default="", help="file with the ids to run, one a line; default: all")
    group.addoption("--conformance-part", default="all", help="all, or the tests that may run together, or alone")
    group.addoption("--conformance-outcomes", default=os.devnull, help="file to append outcomes to")


def pytest_configure(config: pytest.Config) -> None:
    global _outcomes_path
    _outcomes_path = Path(config.getoption("--conformance-outcomes"))
    if not _runs_tests(config):
        return
    for path in {Path(argument.partition("::")[0]) for argument in config.args}:
        if path.suffix == ".py" and path.exists():
            sys.path.insert(0, str(path.resolve().parent))
            stub_missing_names(path.resolve())
    when = config.getoption("--conformance-when")
    if when == "stock":
        return
    import frame_swap

    replace_inductor(frame_swap.frame_swap_backend)
    if when == "ready":
        from . import twice

        config.stash[_PATCHES] = contextlib.ExitStack()
        config.stash[_PATCHES].enter_context(twice.made_twice())
    frame_swap.configure(when="manual" if when == "ready" else when)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--conformance-ids")
    ids = set(Path(wanted).read_text().splitlines()) if wanted else None
    part = config.getoption("--conformance-part")

    def selected(item: pytest.Item) -> bool:
        of_part = "alone" if LARGE in item.name else "together"
        return (ids is None or item.nodeid in ids) and part in ("all", of_part)

    left_out = [item for item in items if not selected(item)]
    items[:] = [item for item in items if selected(item)]
    config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    global aside
    aside = 0
    _forget_peak()
    _forget_regions()
    if _OWN_CACHE not in item.name:
        return (yield)
    from torch._inductor.utils import fresh_cache

    with fresh_cache():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Mode "ready": what differed between the two runs of a call fails its test, whatever the test made of it."""
    if _PATCHES not in item.config.stash:
        return (yield)
    from . import twice

    twice.mismatches.clear()
    twice.counts.clear()
    try:
        return (yield)
    finally:
        if twice.mismatches:
            raise AssertionError("; ".join(twice.mismatches))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report: pytest.TestReport = yield
    if report.when == "call" or (report.when == "setup" and not report.passed):
        record: dict[str, Any] = {"peak_mb": _peak_mb(), "aside": aside, **_regions()}
        if call.excinfo is not None and not report.passed:
            text = str(call.excinfo.value).strip().partition("\n")[0]
            record["reason"] = f"{call.excinfo.typename}: {text}"[:300]
        report.user_properties.append((_PROPERTY, record))
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    record: dict[str, Any] = dict(report.user_properties).get(_PROPERTY, {})  # type: ignore[assignment]
    if not record and report.when in ("setup", "call", "teardown"):
        return
    if not record:  # pytest-xdist's own report on a worker that died
        record = {"reason": str(report.longrepr).strip().partition("\n")[0][:300]}
    seconds = round(report.duration, 2)
    outcomes.append(_outcomes_path, Outcome(report.nodeid, report.outcome, seconds=seconds, **record))


def stub_missing_names(path: Path) -> None:
    """Give torch the names that a test file of another version imports and this torch lacks.

    A stub decorates without effect. Only tests that use such a name are affected, with stock as well. What a file
    looks up and has not got, `import *` was to bring.
    """
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level or node.module is None:
            continue
        root, _, rest = node.module.partition(".")
        sibling = path.parent / f"{rest}.py"
        if root == path.parent.name and sibling.exists():  # "inductor.test_torchinductor"
            stub_missing_names(sibling)
        if root != "torch":
            continue
        with contextlib.suppress(ImportError):
            module = importlib.import_module(node.module)
            names = [alias.name for alias in node.names]
            for name in _unbound(tree) if names == ["*"] else names:
                if not _has(module, name):
                    setattr(module, name, _stub)


def _unbound(tree: ast.Module) -> set[str]:
    """Names that a file looks up, and that it neither defines nor imports by name."""
    nodes = list(ast.walk(tree))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)} | vars(builtins).keys()
    bound |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    bound |= {node.asname or node.name for node in nodes if isinstance(node, ast.alias)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    return {node.id for node in names} - bound


def _has(module: ModuleType, name: str) -> bool:
    if hasattr(module, name):
        return True
    with contextlib.suppress(ImportError):
        importlib.import_module(f"{module.__name__}.{name}")
        return True
    return False


class _Stub:
    """Decorates without effect; what is looked up in it is a stub, too, and it has a name."""

    __name__ = "stub"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and callable(args[0]) and not kwargs:
            return args[0]
        return lambda function: function

    def __getattr__(self, name: str) -> _Stub:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


_stub = _Stub()


_BACKEND_ARGUMENTS = {"config_patches", "compile_region_name"}
"""What `torch.compile` passes to `compile_fx`; the second is a label, from torch 2.13 on."""


def replace_inductor(backend: Callable[..., Any]) -> None:
    """Have `compile_fx` hand every graph that Dynamo captured to `backend`, before a test file imports it."""
    import torch
    import torch._inductor.compile_fx as inductor

    stock = inductor.compile_fx
    inside = threading.local()

    def compile_fx(gm: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        global aside
        if getattr(inside, "backend", False):
            return stock(gm, inputs, *args, **kwargs)
        as_backend = not args and kwargs.keys() <= _BACKEND_ARGUMENTS and isinstance(gm, torch.fx.GraphModule)
        if not as_backend or torch._guards.TracingContext.try_get() is None:
            aside += 1
            return stock(gm, inputs, *args, **kwargs)
        inside.backend = True
        try:
            return backend(gm, inputs, options=kwargs.get("config_patches") or None)
        finally:
            inside.backend = False

    inductor.compile_fx = compile_fx  # type: ignore[assignment]


def _regions() -> dict[str, Any]:
    """How the graphs that were captured have fared."""
    if "frame_swap.region" not in sys.modules:
        return {}
    from frame_swap.region import State, records

    reasons = {state: Counter(r.reason for r in records() if r.state is state) for state in State}
    return {
        "regions": dict(Counter(str(r.state) for r in records())),
        "foreground": dict(reasons[State.FOREGROUND]),
        "failed": dict(reasons[State.FAILED]),
        "rejected": dict(reasons[State.REJECTED]),
        "stores": dict(Counter(r.store for r in records() if r.store)),
        "packages": dict(_packages(r for r in records() if r.state is State.INSTALLED)),
        "wrappers": dict(Counter(", ".join(r.wrappers) for r in records() if r.state is State.INSTALLED)),
        "twice": dict(+twice.counts) if (twice := sys.modules.get(f"{__package__}.twice")) else {},
    }


def _packages(records: Iterable[Any]) -> Counter[str]:
    """What compiled code is, where packages of AOTInductor's were wished."""
    from frame_swap import settings

    if settings.current().artifact != "aoti":
        return Counter()
    reasons = (re.sub(r"\d+", "N", record.artifact_reason) for record in records)
    return Counter(reason[:100] or "yes" for reason in reasons)


def _forget_regions() -> None:
    """What the test before has left, compiles under way among them, is not this one's."""
    if "frame_swap.region" not in sys.modules:
        return
    from frame_swap import region
    from frame_swap.region import record

    for one in region.records():
        one.abandon("the test is over")
    record.forget_all()


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mb() -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) // 1024
    return 0


def _runs_tests(config: pytest.Config) -> bool:
    return "PYTEST_XDIST_WORKER" in os.environ or not config.getoption("numprocesses", None)
