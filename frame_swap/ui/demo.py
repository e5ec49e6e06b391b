"""`python -m frame_swap demo`: train a character transformer and show which code serves its steps.

The corpus is the source text of Python's standard library, since every machine has it. The display always says what
is going on, since users take silence for a hang.
"""

from __future__ import annotations

import contextlib
import statistics
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import rich
import torch
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from ..control import report
from ..region import State

SECONDS_AFTER_SWAP = 12.0
"""How long the demo goes on once compiled code serves the steps."""

SECONDS_BETWEEN_LINES = 4.0
"""Time between two printed lines, if the output is no terminal."""

# --- Text as numbers ---

VOCABULARY = "\n" + "".join(map(chr, range(32, 127)))
UNKNOWN = len(VOCABULARY)
"""The token of every character outside `VOCABULARY`."""


def corpus(characters: int = 3_000_000) -> Tensor:
    """The top-level modules of the standard library as tokens: uint8, `characters` of them or slightly more.

    Raises:
        SystemExit: the source text is not installed with this Python.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    parts, read = [], 0
    for path in sorted(folder.glob("*.py")):
        parts.append(path.read_text(encoding="utf-8", errors="replace"))
        read += len(parts[-1])
        if read >= characters:
            break
    if not parts:
        raise SystemExit(f"the demo trains on Python's own source text, and {folder} has no *.py files")
    return encode("".join(parts))


def encode(text: str) -> Tensor:
    """`text` as tokens: uint8, one for each character."""
    tokens = {character: token for token, character in enumerate(VOCABULARY)}
    return torch.frombuffer(bytearray(tokens.get(c, UNKNOWN) for c in text), dtype=torch.uint8)


def decode(tokens: Tensor) -> str:
    """Tokens as text; `UNKNOWN` becomes the replacement character."""
    return "".join((VOCABULARY + "\N{REPLACEMENT CHARACTER}")[token] for token in tokens.tolist())


def batches(tokens: Tensor, size: int, length: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Random windows of `tokens`, and the windows one character further on: int64, each (size, length); endless."""
    windows = tokens.unfold(0, length + 1, 1)
    while True:
        picked = windows[torch.randint(len(windows), (size,))].to(device, torch.long)
        yield picked[:, :-1], picked[:, 1:]


# --- The model ---


class Block(nn.Module):
    """Causal attention, then a feed-forward layer; each normalises its input and adds its output to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_feed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.projections, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.projections(self.norm_attention(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mixed(attended.transpose(1, 2).flatten(-2))
        fed: Tensor = self.feed(self.norm_feed(x))
        return x + fed


class CharTransformer(nn.Module):
    """Predicts the next character: from tokens (batch, length) to logits (batch, length, UNKNOWN + 1)."""

    def __init__(self, layers: int = 2, width: int = 128, heads: int = 4, length: int = 64) -> None:
        super().__init__()
        self.length = length
        self.token, self.position = nn.Embedding(UNKNOWN + 1, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.logits = nn.LayerNorm(width), nn.Linear(width, UNKNOWN + 1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.logits(self.norm(x))
        return logits

    @torch.no_grad()
    def write(self, prompt: str, characters: int) -> str:
        """`prompt`, continued by `characters` characters that the model predicts."""
        tokens = encode(prompt).to(self.position.weight.device, torch.long)[None]
        for _ in range(characters):
            logits = self(tokens[:, -self.length :])[0, -1, :UNKNOWN]
            tokens = torch.cat((tokens, torch.multinomial((logits / 0.7).softmax(-1), 1)[None]), dim=1)
        return decode(tokens[0])


# --- The display ---


class Step(NamedTuple):
    """One training step."""

    seconds: float
    compiled: bool


class Progress:
    """The run so far. The training loop adds each step; a display reads it, on any thread."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.started = time.time()
        self.loss = float("nan")
        self.first_step_s: float | None = None
        self._steps: list[Step] = []
        self._decided_s: float | None = None  # when it was known that the swap had happened, or would not

    def add(self, step_started: float, loss: float) -> None:
        """Add a step that has just ended; it began at `step_started`, in seconds since the epoch."""
        self._steps.append(Step(time.time() - step_started, self.swap_s is not None))
        self.loss = loss
        if self.first_step_s is None:
            self.first_step_s = self.elapsed
        if self._decided_s is None and not self._waiting():
            self._decided_s = self.elapsed

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.time() - self.started

    @property
    def left(self) -> float:
        """Seconds until the demo ends; before the swap, until it ends at the latest."""
        end = self.limit if self._decided_s is None else self._decided_s + SECONDS_AFTER_SWAP
        return max(0.0, min(self.limit, end) - self.elapsed)

    @property
    def swap_s(self) -> float | None:
        """Seconds from the start to the swap of the last region; None until all regions are swapped."""
        installed = [region.installed_at for region in report().regions]
        if not installed or None in installed:
            return None
        return max(at for at in installed if at is not None) - self.started

    @property
    def serving(self) -> str:
        """The code that serves the steps, in words."""
        if not self._steps:
            return "none yet"
        states = {region.state for region in report().regions}
        if states == {State.INSTALLED}:
            return "compiled code"
        return "stock Inductor's code" if states <= {State.FOREGROUND} else "eager code"

    def ms(self, compiled: bool | None = None, last: int | None = None) -> float | None:
        """Median milliseconds of a step, without the first step of the run; None if there is no other.

        Args:
            compiled: only steps that compiled code served, or only those it did not serve; None for all.
            last: only so many of these, from the end.
        """
        chosen = [s.seconds for s in self._steps[1:] if compiled in (None, s.compiled)]
        return 1e3 * statistics.median(chosen[-last if last else None :]) if chosen else None

    def count(self, compiled: bool | None = None) -> int:
        """How many steps are done; `compiled` as in `ms`."""
        return sum(compiled in (None, step.compiled) for step in list(self._steps))

    def sentence(self) -> str:
        """Say in a sentence what is going on, which code serves meanwhile, and when that ends."""
        regions = report().regions
        if not self._steps:
            return (
                "Dynamo and AOTAutograd trace the model: the first step takes some seconds, once. "
                "A worker process gets ready to compile meanwhile."
            )
        if self.swap_s is not None:
            return "The frame calls compiled code, with nothing in between."
        if not regions:
            return (
                "frame-swap is off (FRAME_SWAP_DISABLE, or a torch that lacks what it needs): stock Inductor "
                "compiled in the first step."
            )
        if not self._waiting():
            return f"No swap will come: {self.verdict()}."
        if any(region.state is State.PENDING and region.compile_s is None for region in regions):
            return (
                "Inductor compiles in a worker process, usually for 10 to 60 s. That is normal: training "
                "runs on, served by eager code; the first step after the compile swaps to compiled code."
            )
        return "Compiled code is loaded; eager code serves until the next step swaps to it."

    def verdict(self) -> str:
        """The reason why there was no swap."""
        reasons = {r.reason or str(r.state) for r in report().regions if r.state is not State.INSTALLED}
        if not reasons:
            return "frame-swap captured no graph"
        if self._waiting():
            return f"Inductor was still compiling after {self.elapsed:.0f} s; training ran on eager code"
        return "; ".join(sorted(reasons))

    def line(self) -> str:
        """The figures as one line of plain text."""
        return f"{self.elapsed:5.1f} s: " + ", ".join(f"{name} {value}" for name, value in self._figures())

    def __rich__(self) -> Table:
        table = Table(box=box.ROUNDED, show_header=False, width=76, caption=self.sentence(), caption_justify="left")
        table.title = f"frame-swap: {self.elapsed:.1f} s"
        for name, value in self._figures():
            table.add_row(name, value)
        return table

    def closing(self) -> Table:
        """The table at the end of the demo."""
        table = Table(box=box.SIMPLE_HEAD, show_header=False, title="What you saw", title_justify="left")
        swap = self.swap_s
        before = self.serving if swap is None else "eager code"
        for name, value in (
            ("first step after", _seconds(self.first_step_s)),
            ("swap after", f"no swap yet: {self.verdict()}" if swap is None else _seconds(swap)),
            (f"steps done by {before}", str(self.count(compiled=False))),
            ("steps done by compiled code", str(self.count(compiled=True))),
            ("ms a step before the swap", _ms(self.ms(compiled=False))),
            ("ms a step after the swap", _ms(self.ms(compiled=True))),
        ):
            table.add_row(name, value)
        return table

    def _figures(self) -> list[tuple[str, str]]:
        waiting = f"{SECONDS_AFTER_SWAP:.0f} s after the swap, or " if self._decided_s is None else ""
        return [
            ("served by", self.serving),
            ("steps done", str(self.count())),
            ("ms a step", _ms(self.ms(last=20))),
            ("loss", f"{self.loss:.3f}"),
            ("first step after", _seconds(self.first_step_s)),
            ("swap after", _seconds(self.swap_s)),
            ("the demo ends", f"{waiting}in {self.left:.0f} s"),
        ]

    def _waiting(self) -> bool:
        return any(region.state in (State.PENDING, State.READY) for region in report().regions)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


@contextlib.contextmanager
def _display(progress: Progress) -> Iterator[Callable[[], None]]:
    """Within the block, show `progress`: redrawn on a terminal, otherwise as lines of text.

    Yields a function to call after each step.
    """
    if Console().is_terminal:
        with Live(get_renderable=lambda: progress, refresh_per_second=5):
            yield lambda: None
        return
    due, said = 0.0, ""

    def print_when_due() -> None:
        nonlocal due, said
        if said != (sentence := progress.sentence()):
            print(sentence)
        elif progress.elapsed < due:
            return
        due, said = progress.elapsed + SECONDS_BETWEEN_LINES, sentence
        print(progress.line(), flush=True)

    print_when_due()
    yield print_when_due


# --- The run ---


def run(seconds: float, device: str | None = None) -> None:
    """Train until `SECONDS_AFTER_SWAP` after the swap, then print a summary, the report and a sample of the model.

    Args:
        seconds: end after so many seconds, with or without a swap.
        device: where to train; by default a CUDA device if there is one, else the CPU.
    """
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch's; the demo needs no NumPy
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = CharTransformer().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    data = batches(corpus(), size=16, length=model.length, device=device)

    progress = Progress(seconds)
    compiled = torch.compile(model, backend="frame_swap")
    with contextlib.suppress(KeyboardInterrupt), _display(progress) as step_done:
        while progress.left > 0:
            step_started = time.time()
            tokens, following = next(data)
            loss = F.cross_entropy(compiled(tokens).flatten(0, 1), following.flatten())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            progress.add(step_started, loss.item())
            step_done()

    rich.print(progress.closing())
    print(report())
    print("What the trained model writes, called without torch.compile:", model.write("def ", 120), sep="\n")
