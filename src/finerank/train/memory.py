"""Memory: the peak so far, what is free, and what to say when there is not enough."""

import contextlib
import gc
import os
import resource
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from finerank.data.batch import Batch
from finerank.errors import FinerankError

P = ParamSpec("P")
T = TypeVar("T")


class OutOfMemoryError(FinerankError, MemoryError):
    """A micro-batch does not fit into memory; the message says what took it and which setting needs less."""

    exit_code = 3


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: on the GPU what torch allocated, on the CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def available_memory_bytes(
    control_groups: Path = Path("/sys/fs/cgroup"),
    meminfo: Path = Path("/proc/meminfo"),
    own_groups: Path = Path("/proc/self/cgroup"),
) -> int:
    """Main memory that this process may still take: what the system can give, cut to the limits set for the process.

    Those are of its control group and the groups above it (containers, batch systems), and of `ulimit -v`.
    """
    free = _meminfo_available(meminfo)
    if free is None:
        names = ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES")  # macOS knows the second only
        pages = next(os.sysconf(name) for name in names if name in os.sysconf_names)
        free = pages * os.sysconf("SC_PAGE_SIZE")
    limits = [_control_group_left(folder) for folder in _control_groups(control_groups, own_groups)]
    return max(0, min([free, *(left for left in [*limits, _address_space_left()] if left is not None)]))


def _control_groups(root: Path, own_groups: Path) -> list[Path]:
    """Folders of the process's memory control group and of all above it; a container sees its own as the root."""
    folders = {root, root / "memory"}
    with contextlib.suppress(OSError):
        for line in own_groups.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds == "" or "memory" in kinds.split(","):
                own = (root / "memory" if kinds else root) / path.lstrip("/")
                folders |= {own, *(p for p in own.parents if p.is_relative_to(root))}
    return sorted(folders)


def _address_space_left() -> int | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft == resource.RLIM_INFINITY:
        return None
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (OSError, ValueError):
        return None
    return soft - pages * resource.getpagesize()


def _meminfo_available(path: Path) -> int | None:
    try:
        lines = path.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return None


def _control_group_left(folder: Path) -> int | None:
    """Limit less use, where file cache that can be dropped is not use; v2 or v1. None without a limit."""
    versions = (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )
    for limit, used, cached in versions:
        try:
            most = int((folder / limit).read_text())  # "max" is no number: no limit
            held = int((folder / used).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            return most - held + int(stat.get(cached, 0))
        except (OSError, ValueError):
            continue
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python ran out of memory; torch's CPU allocator has no class of its own for it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def if_it_fits(compute: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """What `compute` gives; None when memory runs out, the error gone with all that its traceback held."""
    try:
        return compute(*args, **kwargs)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def out_of_memory(model: nn.Module, batch: Batch, *, device: torch.device) -> OutOfMemoryError:
    """The error to raise for a batch that did not fit, after everything of it has been let go."""
    gc.collect()
    return OutOfMemoryError(explain(model, batch, device=device))


def explain(model: nn.Module, batch: Batch, *, device: torch.device) -> str:
    """One sentence: what the memory went to, and which setting needs less."""
    base = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    trained = state_bytes([p for p in model.parameters() if p.requires_grad])
    b, t = batch.input_ids.shape
    if device.type == "cuda":
        held = torch.cuda.max_memory_allocated(device)
        total = torch.cuda.get_device_properties(device).total_memory
        rest = f"activations {mib(max(0, held - base - trained))} of the GPU's {mib(total)}"
    else:
        rest = f"the rest are activations, and {mib(available_memory_bytes())} are free"
    what = f"the base model takes {mib(base)}, the adapters" if base else "the model"
    return (
        f"Out of memory on a micro-batch of {b} x {t} tokens: {what} with gradients and optimizer state "
        f"{'' if base else 'takes '}{mib(trained)}, {rest}; {_smaller(batch)}."
    )


def state_bytes(trained: Iterable[Tensor]) -> int:
    """What trained weights take: themselves, an fp32 master where they are narrower, gradient and AdamW's moments."""
    return sum(p.numel() * (16 if p.element_size() >= 4 else 16 + p.element_size()) for p in trained)


def _smaller(batch: Batch) -> str:
    """The setting that halves the micro-batch."""
    b, t = batch.input_ids.shape
    same = "or let --micro-batch-size auto find the most that fits (the result stays the same)"
    if batch.cu_seqlens is not None and len(batch.cu_seqlens) > 2:
        longest = int(batch.position_ids.max()) + 1
        return f"try --micro-batch-tokens {max(longest, t // 2)}, {same}"
    if b > 1:
        return f"try --micro-batch-size {b // 2}, {same}"
    return f"it is one row, so only shorter rows need less: try --seq-length {max(1, t // 2)}"


def mib(num_bytes: float) -> str:
    """`123 MiB`."""
    return f"{num_bytes / 2**20:.0f} MiB"
