"""`--profile`: where the time and the memory of a step go.

    profiler = StepProfiler.of_loop(loop, num_steps=3)
    loop.run()
    profiler.write(folder)                                     # profile.json, profile.md

The first step warms up, and what it keeps for backward is counted; the next ones are timed by torch's profiler. Each
operation's own time (on a GPU: its kernels') belongs to a part by what it is and by what called it:

    base matrix products, low-rank products, attention, head, optimizer, data, elementwise (the rest of torch),
    waiting (no operation runs: Python between them; on a GPU, the GPU idle)

The roofline is what the machine's matrix products reach on a large one in the run's precision, measured in the same
run. The share of it counts the products' arithmetic alone: 2 m n k each.
"""

import contextlib
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from finerank.files import write_text
from finerank.train.loop import TrainLoop
from finerank.train.memory import mib, peak_memory_bytes, state_bytes
from finerank.train.run_folder import write_json

PRODUCTS = frozenset(f"aten::{name}" for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "_int_mm"))
PARTS = (
    "base matrix products",
    "low-rank products",
    "attention",
    "head",
    "elementwise",
    "optimizer",
    "data",
    "waiting",
)
_BY_CALLER = (
    ("attention", ("_BlockAttention", "scaled_dot_product", "varlen", "_flash_attention", "_efficient_attention")),
    ("head", ("CrossEntropySum", "_TokenLogProbs")),
    ("optimizer", ("Optimizer.", "finerank::optimizer")),
    ("data", ("finerank::data",)),
)


@dataclass
class Profile:
    """What was found, per step."""

    seconds: float
    parts: dict[str, float]
    """Seconds of each of `PARTS`."""
    flops: dict[str, float]
    """Arithmetic of the matrix products of a part."""
    peak_flops: float
    """Of a large matrix product, a second."""
    precision: str
    memory: dict[str, int]
    """Bytes by what holds them."""
    tokens: int
    slowest: list[dict[str, Any]] = field(default_factory=list)
    """Operations with the most time of their own."""

    @property
    def roofline_share(self) -> float:
        """Arithmetic of all matrix products over what the step's time could have held."""
        return sum(self.flops.values()) / (self.peak_flops * self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """For profile.json."""
        return {**vars(self), "roofline_share": self.roofline_share}


class StepProfiler:
    """Watches the first steps of a run."""

    def __init__(
        self, model: nn.Module, *, num_steps: int, rank: int, device: torch.device, num_tokens: Callable[[], int]
    ):
        """
        Args:
            model: what is trained.
            num_steps: steps to time, after one of warm-up.
            rank: largest rank of the adapters; products with a side of at most three times it are low-rank ones.
            device: where the model is.
            num_tokens: tokens of the step just done.
        """
        self.model, self.num_steps, self.rank, self.device = model, num_steps, rank, device
        self.num_tokens = num_tokens
        self.found: Profile | None = None
        self._taken: list[tuple[float, list[FunctionEvent], int]] = []
        self._step, self._kept = 0, _Kept(model)
        self._peak_flops = 0.0

    @classmethod
    def of_loop(cls, loop: TrainLoop, *, num_steps: int) -> "StepProfiler":
        """Watch a loop that is about to run."""

        def num_tokens() -> int:
            assert loop.state.pending is not None  # the row of the step just done
            return loop.state.pending["tokens"]

        ranks = [p.shape[0] for name, p in loop.named_parameters.items() if ".lora_A" in name]
        profiler = cls(
            loop.model,
            num_steps=num_steps,
            rank=max(ranks, default=0),
            device=loop.device,
            num_tokens=num_tokens,
        )
        loop.around_step = profiler.around
        return profiler

    @contextlib.contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Around one training step."""
        number, self._step = self._step, self._step + 1
        if number == 0:
            with torch.autograd.graph.saved_tensors_hooks(self._kept.pack, _unpack):
                yield
        elif number <= self.num_steps:
            self._measure_peak()  # before each step: a clock or a neighbour may change in between
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
            with profile(activities=activities, record_shapes=True) as watched:
                started = time.perf_counter()
                yield
                self._synchronize()
                seconds = time.perf_counter() - started
            self._taken.append((seconds, list(watched.events() or ()), self.num_tokens()))
        else:
            yield

    def result(self) -> Profile | None:
        """Means over the timed steps; None when the run was shorter."""
        if not self._taken:
            return None
        events = [event for _, own, _ in self._taken for event in own]
        n, seconds = len(self._taken), statistics.fmean(seconds for seconds, _, _ in self._taken)
        parts, flops = times_by_part(events, low_rank=3 * self.rank, on_gpu=self.device.type == "cuda")
        parts = {name: parts.get(name, 0.0) / n for name in PARTS}
        parts["waiting"] = max(0.0, seconds - sum(parts.values()))
        self._measure_peak()
        return Profile(
            seconds=seconds,
            parts=parts,
            flops={name: value / n for name, value in flops.items()},
            peak_flops=self._peak_flops,
            precision=str(self._dtype()).removeprefix("torch."),
            memory=self._memory(),
            tokens=round(statistics.fmean(tokens for _, _, tokens in self._taken)),
            slowest=_slowest(events, n),
        )

    def write(self, folder: Path) -> str | None:
        """profile.json and profile.md; the sentence that says the most important. None when there was no step."""
        found = self.result()
        if found is None:
            return None
        write_json(folder / "profile.json", found.to_dict())
        write_text(folder / "profile.md", as_markdown(found))
        largest = max(found.parts, key=lambda name: found.parts[name])
        return (
            f"profile: {found.seconds:.2f} s a step, {found.parts[largest] / found.seconds:.0%} of it {largest}; "
            f"{found.roofline_share:.0%} of {found.peak_flops / 1e9:.0f} GFLOP/s; see {folder / 'profile.md'}"
        )

    def _dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    def _measure_peak(self) -> None:
        self._peak_flops = max(self._peak_flops, measured_peak(self._dtype(), self.device))

    def _memory(self) -> dict[str, int]:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        frozen = [t for t in (*self.model.parameters(), *self.model.buffers()) if not t.requires_grad]
        count = sum(p.numel() for p in trained)
        return {
            "frozen weights": sum(
                {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in frozen}.values()
            ),
            "trained weights, with fp32 masters": state_bytes(trained) - 12 * count,
            "gradients and AdamW's moments": 12 * count,
            "kept for backward (largest micro-batch)": self._kept.most,
            "peak of the process" if self.device.type == "cpu" else "peak allocated": peak_memory_bytes(self.device),
        }

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Kept:
    """Bytes that autograd keeps, weights not counted; each storage once."""

    def __init__(self, model: nn.Module):
        self._weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self._users: dict[int, int] = defaultdict(int)
        self._now, self.most = 0, 0

    def pack(self, tensor: Tensor) -> "_Saved":
        """Called by autograd when it saves a tensor."""
        return _Saved(tensor, self)

    def add(self, tensor: Tensor, sign: int) -> None:
        """One more user of a tensor's storage, or one fewer."""
        storage = tensor.untyped_storage()
        if (key := storage.data_ptr()) in self._weights:
            return
        self._users[key] += sign
        if self._users[key] == (1 if sign > 0 else 0):
            self._now += sign * storage.nbytes()
            self.most = max(self.most, self._now)


class _Saved:
    def __init__(self, tensor: Tensor, kept: _Kept):
        self.tensor, self._kept = tensor, kept
        kept.add(tensor, 1)

    def __del__(self) -> None:
        self._kept.add(self.tensor, -1)


def _unpack(saved: _Saved) -> Tensor:
    return saved.tensor


def times_by_part(
    events: Sequence[FunctionEvent], *, low_rank: int, on_gpu: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of own time by part, and the products' arithmetic by part.

    Args:
        events: of torch's profiler, with shapes.
        low_rank: products with a side of at most this are low-rank ones.
        on_gpu: count the kernels' time instead of the CPU's.
    """
    parts: dict[str, float] = defaultdict(float)
    flops: dict[str, float] = defaultdict(float)
    for event in events:
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        part = _part_of(event, low_rank)
        if part is not None:
            parts[part] += microseconds / 1e6
        if event.name in PRODUCTS:
            flops[part or "base matrix products"] += _arithmetic(event)
    return parts, flops


def _part_of(event: FunctionEvent, low_rank: int) -> str | None:
    """The part that an operation belongs to; None for what is no operation of torch's."""
    caller: FunctionEvent | None = event
    while caller is not None:
        for part, names in _BY_CALLER:
            if any(name in caller.name for name in names):
                return part
        caller = caller.cpu_parent
    if event.name in PRODUCTS:
        return "low-rank products" if _smallest_side(event) <= low_rank else "base matrix products"
    return "elementwise" if event.name.startswith(("aten::", "bitsandbytes::")) else None


def _matrices(event: FunctionEvent) -> list[list[int]]:
    shapes: list[list[int]] = event.input_shapes or []  # type: ignore[assignment]
    return [shape for shape in shapes if len(shape) >= 2]


def _smallest_side(event: FunctionEvent) -> float:
    return min((min(shape[-2:]) for shape in _matrices(event)), default=math.inf)


def _arithmetic(event: FunctionEvent) -> float:
    """2 m n k, for each matrix of a batch; the factors are the last two. (torch itself counts no product in place.)"""
    *_, left, right = _matrices(event)
    return 2.0 * math.prod(left) * right[-1]


def _slowest(events: Sequence[FunctionEvent], num_steps: int, most: int = 12) -> list[dict[str, Any]]:
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in events:
        own = event.self_device_time_total or event.self_cpu_time_total
        totals[event.name][0] += own / 1e6
        totals[event.name][1] += 1
    ordered = sorted(totals.items(), key=lambda item: -item[1][0])[:most]
    return [{"name": name, "seconds": s / num_steps, "calls": round(n / num_steps)} for name, (s, n) in ordered]


def measured_peak(
    dtype: torch.dtype, device: torch.device, size: int = 2048, repeats: int = 6, most_seconds: float = 0.5
) -> float:
    """Arithmetic a second that a `size`-cubed product reaches here: the best of some, begun within `most_seconds`."""
    if device.type == "cuda":
        size *= 4
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, begun = math.inf, time.perf_counter()
    for _ in range(repeats):
        started = time.perf_counter()
        if started - begun > most_seconds:
            break
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def as_markdown(found: Profile) -> str:
    """The tables of profile.md."""
    lines = [
        "# Where a step's time and memory went",
        "",
        f"{found.seconds:.3f} s a step of {found.tokens} tokens. A large {found.precision} matrix product reaches "
        f"{found.peak_flops / 1e9:.0f} GFLOP/s here; the step's products, "
        f"{sum(found.flops.values()) / 1e12:.2f} TFLOP, take {found.roofline_share:.0%} of that.",
        "",
        "| part | s/step | share | GFLOP/s |",
        "| --- | --- | --- | --- |",
    ]
    for name, seconds in sorted(found.parts.items(), key=lambda item: -item[1]):
        rate = f"{found.flops[name] / seconds / 1e9:.0f}" if found.flops.get(name) and seconds else ""
        lines.append(f"| {name} | {seconds:.3f} | {seconds / found.seconds:.0%} | {rate} |")
    lines += ["", "| memory | |", "| --- | --- |"]
    lines += [f"| {name} | {mib(size)} |" for name, size in found.memory.items()]
    lines += ["", "| operation | s/step | calls |", "| --- | --- | --- |"]
    lines += [f"| `{row['name']}` | {row['seconds']:.3f} | {row['calls']} |" for row in found.slowest]
    return "\n".join(lines) + "\n"
