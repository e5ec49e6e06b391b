"""Metrics, logs, traces and warnings of a compile in a worker are those of a stock compile in this process."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import random
import re
import subprocess
import sys
import threading
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch._inductor.select_algorithm  # what importing it says is heard before we listen
from torch._dynamo.utils import compilation_time_metrics, counters
from torch._inductor import metrics
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch._logging import getArtifactLogger, set_logs, trace_structured
from torch._logging._internal import trace_log

import frame_swap
from frame_swap import State, backend
from frame_swap.shipping import echo

pytestmark = pytest.mark.timeout(600)  # the first test waits for two compiles that find all caches empty


class Listener(logging.Handler):
    """Keeps all records."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Any] = []

    def emit(self, record: logging.LogRecord) -> None:
        record.msg, record.args, record.exc_info = record.getMessage(), None, None  # as text: it can be pickled
        self.records.append(record)

    def output_codes(self) -> list[str]:
        messages = [r.getMessage() for r in self.records if r.name == "torch._inductor.codecache.__output_code"]
        return [m for m in messages if m.startswith("Output code: ")]


@pytest.fixture
def listener() -> Iterator[Listener]:
    """Listen to Inductor's loggers and the structured trace; the test chooses the levels."""
    with listening() as heard:
        yield heard


@contextlib.contextmanager
def listening() -> Iterator[Listener]:
    heard, inductor = Listener(), logging.getLogger("torch._inductor")
    for handler in list(trace_log.handlers):  # torch's own goes when it is first used, as the program's has
        trace_log.removeHandler(handler)
    for logger in (inductor, trace_log):
        logger.addHandler(heard)
    try:
        yield heard
    finally:
        for logger in (inductor, trace_log):
            logger.removeHandler(heard)
        set_logs()


class Heard(NamedTuple):
    """Everything recorded during the compile of one program."""

    metrics: dict[str, Any]
    counters: dict[str, dict[str, int]]
    timed: set[str]
    logged: list[Any]
    traced: list[Any]
    code: set[str]


def train(backend: str) -> None:
    """Compile and run a forward and a backward."""

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x @ y).softmax(-1).sum(0, keepdim=True) + x.sin().sum()

    x, y = torch.randn(16, 16, requires_grad=True), torch.randn(16, 16)
    torch.compile(step, backend=backend)(x, y).sum().backward()
    frame_swap.wait()


def hear(backend: str) -> Heard:
    metrics.reset()
    counters.clear()
    compilation_time_metrics.clear()
    frame_swap.configure(when="manual")
    with listening() as heard, fresh_cache():
        set_logs(output_code=True, inductor=logging.DEBUG)
        _, code = run_and_get_code(train, backend)
    return Heard(
        {n: _text(v) for n, v in vars(metrics).items() if isinstance(v, (int, list)) and not n.startswith("_")},
        {category: dict(counter) for category, counter in counters.items() if counter},
        set(compilation_time_metrics),
        [r for r in heard.records if r.name != trace_log.name],
        [r for r in heard.records if r.name == trace_log.name],
        set(code),
    )


def _text(value: Any) -> Any:
    """A metric with Inductor's nodes replaced by their names, since nodes cannot be pickled."""
    if isinstance(value, (list, tuple)):
        return [_text(item) for item in value]
    return value.get_name() if hasattr(value, "get_name") else value


def hear_anew(backend: str, folder: Path) -> Heard:
    """Run `hear` in a new process with new workers."""
    file = folder / backend
    program = (
        f"import pickle, test_echo; open({str(file)!r}, 'wb').write(pickle.dumps(test_echo.hear({backend!r})))"
    )
    path = os.pathsep.join(filter(None, (os.path.dirname(__file__), os.environ.get("PYTHONPATH"))))
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path}, check=True, timeout=400)
    heard: Heard = pickle.loads(file.read_bytes())
    return heard


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Heard:
    return hear_anew("inductor", tmp_path_factory.mktemp("stock"))


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Heard:
    return hear_anew("frame_swap", tmp_path_factory.mktemp("ours"))


def test_metrics_and_counters_are_those_of_a_compile_here(stock: Heard, ours: Heard) -> None:
    assert ours.metrics == stock.metrics
    assert ours.metrics["generated_kernel_count"] > 0
    # In the worker, AOTAutograd's bundle stands in for the cache of graphs.
    assert stock.counters["inductor"].pop("fxgraph_cache_miss") > 0
    assert ours.counters == stock.counters


def test_compile_times_name_what_was_timed_in_the_worker(stock: Heard, ours: Heard) -> None:
    # The rest is what making keys for caches takes. A worker compiles the backward with the forward.
    missing = {name for name in stock.timed - ours.timed if "key" not in name}
    assert missing <= {"backward._backward_impl"}


def test_generated_code_of_forward_and_backward_is_handed_over(stock: Heard, ours: Heard) -> None:
    assert len(stock.code) == 2
    assert ours.code == stock.code


def test_log_records_come_once_and_in_order(stock: Heard, ours: Heard) -> None:
    def places(heard: Heard) -> list[tuple[str, int]]:
        about_caches = re.compile("cache", re.IGNORECASE)
        return [(r.name, r.lineno) for r in heard.logged if not about_caches.search(r.getMessage()[:100])]

    assert len(places(stock)) > 50
    assert places(ours) == places(stock)


def test_output_code_is_logged_once(stock: Heard, ours: Heard) -> None:
    def texts(heard: Heard) -> list[str]:
        return [r.getMessage() for r in heard.logged if r.getMessage().startswith("Output code: ")]

    assert len(texts(stock)) == 2
    assert texts(ours) == texts(stock)


def kinds(traced: list[Any]) -> Counter[tuple[str, str]]:
    heads = [next(iter(r.metadata.items())) for r in traced]
    return Counter((kind, value.get("name", "")) for kind, value in heads if isinstance(value, dict))


def test_structured_trace_holds_the_same_records(stock: Heard, ours: Heard) -> None:
    expected, actual = kinds(stock.traced), kinds(ours.traced)
    for one in (expected, actual):
        for kind in [k for k in one if k[0] == "chromium_event" or "cache" in k[1] or "frame_swap_" in k[1]]:
            del one[kind]
        one.pop(("bwd_compilation_metrics", ""), None)  # of a backward that is compiled in its call
    assert expected["inductor_output_code", ""] == 2
    assert actual == expected


def test_structured_trace_tells_the_frame(ours: Heard) -> None:
    for record in ours.traced:
        if "inductor_output_code" in record.metadata or "aot_forward_graph" in record.metadata:
            assert (record.metadata["frame_id"], record.metadata["frame_compile_id"]) == (0, 0)


def test_events_of_the_timeline_begin_and_end_in_each_process(ours: Heard) -> None:
    events = [json.loads(r.payload) for r in ours.traced if "chromium_event" in r.metadata]
    open_events: dict[int, list[str]] = defaultdict(list)
    for event in events:
        if event["name"] == "compile_file":  # in threads of their own
            continue
        if event["ph"] == "B":
            open_events[event["pid"]].append(event["name"])
        elif event["ph"] == "E" and open_events[event["pid"]]:  # "dynamo" began before we listened
            assert open_events[event["pid"]].pop() == event["name"]
    assert not any(open_events.values())
    (worker,) = set(open_events) - {0}
    assert {e["pid"] for e in events if e["name"] == "fx_codegen_and_compile"} == {worker}


PROGRAM = """
    import torch, frame_swap
    import torch.utils.cpp_extension  # warns where there is a CUDA compiler and no GPU
    torch.compile(lambda x: x.sin() + {new}, backend={backend!r})(torch.randn(8, dtype=torch.{dtype}))
    frame_swap.wait()
"""


@pytest.mark.thorough
def test_torch_logs_and_torch_trace_of_a_program(run_program: Any, tmp_path: Path) -> None:
    new = random.random()  # in no cache
    logged, traced = {}, {}
    for name in ("inductor", "frame_swap"):
        log = tmp_path / f"{name}.log"
        done = run_program(
            PROGRAM.format(backend=name, new=new, dtype="float32"),
            TORCH_LOGS="output_code,aot_graphs",
            TORCH_LOGS_OUT=str(log),
            TORCH_TRACE=str(tmp_path / name),
            TORCHINDUCTOR_FX_GRAPH_CACHE="0",
            TORCHINDUCTOR_AUTOGRAD_CACHE="0",
        )
        # Without what `wait` prints where it takes long.
        said = re.sub(r"^frame-swap: \d+ of \d+ .*\n", "", done.stderr, flags=re.MULTILINE)
        assert log.read_text() in said  # nobody else writes to the file
        logged[name] = [anonymous(line) for line in log.read_text().splitlines()]
        (file,) = (tmp_path / name).iterdir()
        traced[name] = parsed(file.read_text())
    assert len(logged["inductor"]) > 30
    assert logged["frame_swap"] == logged["inductor"]
    assert {"inductor_output_code", "aot_inference_graph"} <= traced["inductor"] <= traced["frame_swap"]


def anonymous(line: str) -> str:
    """A log line without time, PID, object ids and the names of the program's own files."""
    return re.sub(r"(?<!\w)/\S+|0x\w+|<eval_with_key>\.\d+", "...", re.sub(r"^[VIWE]\d{4} \S+ \d+ ", "", line))


def parsed(trace: str) -> set[str]:
    """Kinds of records in a structured trace; assert that each refers only to strings before it."""
    known, seen = set(), set()
    for line in trace.splitlines():
        if line.startswith("\t") or not line:
            continue
        metadata = json.loads(re.sub(r"^V\d{4} \S+ \d+ [^\]]+\] ", "", line))
        seen.add(next(iter(metadata)))
        if "str" in metadata:
            known.add(metadata["str"][1])
        assert all(frame["filename"] in known for frame in metadata.get("stack", ()))
    return seen


def test_a_failing_compile_is_heard(listener: Listener, tmp_path: Path) -> None:
    set_logs(inductor=logging.INFO)
    no_compiler = torch._inductor.config.patch({"cpp.cxx": (None, str(tmp_path / "no-compiler"))})
    with no_compiler, fresh_cache(dir=str(tmp_path)), pytest.warns(frame_swap.FrameSwapWarning):
        torch.compile(lambda x: x.sin() + 1, backend="frame_swap")(torch.randn(8))
        (region,) = frame_swap.wait().regions
    assert region.state is State.FAILED
    steps = [r.getMessage() for r in listener.records if "compiling FORWARDS" in r.getMessage()]
    assert len(steps) == 1
    assert "done" not in steps[0]


def test_a_compile_in_a_thread_of_this_process_is_heard_once(listener: Listener, stock: Heard) -> None:
    set_logs(output_code=True)
    counters.clear()
    metrics.reset()
    with ThreadPoolExecutor(1) as threads, fresh_cache():
        frame_swap.configure(executor=threads)
        _, code = run_and_get_code(train, "frame_swap")
    assert [r.worker_pid for r in frame_swap.report().regions] == [os.getpid()]
    assert sorted(listener.output_codes()) == sorted(f"Output code: \n{text}" for text in code)
    assert len(code) == 2
    assert kinds([r for r in listener.records if r.name == trace_log.name])["inductor_output_code", ""] == 2
    assert counters["aot_autograd"]["ok"] == 1
    assert metrics.ir_nodes_pre_fusion == stock.metrics["ir_nodes_pre_fusion"]


def test_where_nobody_listens_only_totals_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []
    monkeypatch.setattr(trace_log, "handlers", [])  # pytest listens
    monkeypatch.setattr(backend.echo, "replay", lambda pickled, _: sent.append(pickled))
    train("frame_swap")
    records, heard_warnings, totals = pickle.loads(sent[0])
    assert (records, heard_warnings) == ([], [])
    assert totals.metrics["generated_kernel_count"] > 0
    assert len(sent[0]) < 10_000


# --- Both halves in this process, with what no program says at will ------------------------------------------


def echo_of(call: Callable[[], Any]) -> bytes:
    """The echo that a worker would send to this process's listeners after `call`."""
    kept: list[bytes] = []
    with echo.recorded(echo.Audience.capture(), kept.append):
        call()
    return kept[0]


def test_text_is_made_only_for_those_who_listen(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    def talk() -> None:
        getArtifactLogger("torch._inductor.codecache", "output_code").debug("some code")
        trace_structured("artifact", lambda: {"name": "some"}, payload_fn=lambda: "text")

    with monkeypatch.context() as patch:
        patch.setattr(trace_log, "handlers", [])
        assert pickle.loads(echo_of(talk)).records == []
    set_logs(output_code=True)
    assert len(pickle.loads(echo_of(talk)).records) == 2
    assert listener.records == []  # a worker hands nothing to handlers


@pytest.mark.parametrize(("name", "records"), [(echo.PREPARING, 0), ("of the compile", 1)])
def test_what_a_worker_prepares_meanwhile_is_of_no_compile(name: str, records: int) -> None:
    def talk() -> None:
        logger = logging.getLogger("torch._inductor.compile_worker.subproc_pool")
        thread = threading.Thread(target=logger.info, args=("begun",), name=name)
        thread.start()
        thread.join()

    set_logs(inductor=logging.INFO)
    try:
        assert len(pickle.loads(echo_of(talk)).records) == records
    finally:
        set_logs()


def test_a_record_is_replayed_as_it_was(listener: Listener) -> None:
    def fail() -> None:
        try:
            raise ValueError("of the worker")
        except ValueError:
            logging.getLogger("torch._inductor.graph").warning("at %d: %r", 1, {2}, exc_info=True)

    echo.replay(echo_of(fail), "3/4")
    (record,) = listener.records
    assert record.getMessage() == "at 1: {2}"
    assert record.pathname == __file__
    assert "ValueError: of the worker" in logging.Formatter().format(record)


def test_strings_of_a_trace_get_the_numbers_that_they_have_here(listener: Listener) -> None:
    def trace() -> None:
        with_stack = {"stack": torch._logging.structured.from_traceback(here())}
        trace_structured("of_the_worker", lambda: with_stack, expect_trace_id=False)

    def here() -> Any:
        import traceback

        return traceback.extract_stack(limit=1)

    echo.replay(echo_of(trace), None)
    *_, record = listener.records
    (frame,) = record.metadata["of_the_worker"]["stack"]
    assert frame["filename"] == torch._logging.structured.INTERN_TABLE[__file__]


def warn() -> None:
    for _ in range(2):
        warnings.warn("of the worker", RuntimeWarning, stacklevel=1)


def test_a_warning_comes_once_and_from_its_place() -> None:
    pickled = echo_of(warn)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        echo.replay(pickled, None)
        echo.replay(pickled, None)
    (warning,) = caught
    assert (str(warning.message), warning.category) == ("of the worker", RuntimeWarning)
    assert (warning.filename, warning.lineno) == (__file__, warn.__code__.co_firstlineno + 2)


def test_a_warnings_filter_decides() -> None:
    pickled = echo_of(warn)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        echo.replay(pickled, None)
        assert len(caught) == 2
        warnings.filterwarnings("ignore", module=re.escape(__name__))
        echo.replay(pickled, None)
        assert len(caught) == 2
        warnings.simplefilter("error")
        echo.replay(pickled, None)  # raises nothing
    assert len(caught) == 2


def test_a_warning_of_inductors_reaches_the_user(run_program: Any) -> None:
    program = PROGRAM.format(backend="frame_swap", new=random.random(), dtype="complex64")
    warned = [line for line in run_program(program).stderr.splitlines() if "UserWarning: Torchinductor" in line]
    assert len(warned) == 1
    assert "_inductor/lowering.py" in warned[0]
