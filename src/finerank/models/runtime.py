"""The environment that a process must have before it starts: allocator, large pages, threads.

    tune_runtime()        # before torch is imported; may start the program anew, once

A training step frees and takes hundreds of megabytes again and again. By default glibc gives large blocks back to the
system each time, and the system clears every page before it hands it out again: 280,000 page faults and a tenth of the
time of a step of 2,048 tokens. With the variables below the process keeps its memory, and large tensors lie in large
pages. And torch keeps a compiled product of each shape it has met, half a megabyte for bf16: packs of ever new lengths
would fill up to a gigabyte with products that never come again, so fewer are kept. A process reads the variables when
it starts, so the program executes itself again.

The allocator is mimalloc, where its package is installed. glibc's cannot give a hole between two tensors to a third of
the same size: torch asks for aligned blocks, for which it looks for a hole larger by the alignment, so that a fifth of
the process were holes. It remains what is used without the package, told to keep its memory.

Nothing is done where it could not help or is not wanted: other systems than Linux with glibc, a variable that the user
has set, `--no-tune-runtime`.
"""

import contextlib
import importlib.metadata
import math
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from finerank.errors import ConfigError

MARK = "FINERANK_RUNTIME_TUNED"
"""Set in the process that was started anew, so that it happens once."""

MIMALLOC_PACKAGE = "cmeel-mimalloc"
KEPT_BY_MIMALLOC = {"MIMALLOC_PURGE_DELAY": "-1"}  # nothing is given back to the system
KEPT_BY_GLIBC = {
    "MALLOC_MMAP_MAX_": "0",  # large blocks come from the heap, which can be kept ...
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),  # ... and is never given back
    "MALLOC_TOP_PAD_": str(64 << 20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # large pages for the heap, from glibc 2.35 on
}
FOR_TORCH = {
    "THP_MEM_ALLOC_ENABLE": "1",  # large pages for tensors
    "LRU_CACHE_CAPACITY": "128",  # products that torch keeps for each thread (1024 by default): those of one pack
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "512",  # ... and oneDNN for all: those of very long sequences, too
}
NAMES = frozenset({*FOR_TORCH, *KEPT_BY_GLIBC, *KEPT_BY_MIMALLOC, "LD_PRELOAD", MARK})
"""Every variable that may be set here, but for the number of threads."""


def best_environment() -> dict[str, str]:
    """The variables under which a training step is fastest and smallest, with what is installed here."""
    return FOR_TORCH | _best_allocator()


def _best_allocator() -> dict[str, str]:
    library = _mimalloc()
    return KEPT_BY_GLIBC if library is None else {"LD_PRELOAD": library, **KEPT_BY_MIMALLOC}


def _mimalloc() -> str | None:
    """Path of mimalloc's library; None where it is not installed, or cannot be named in LD_PRELOAD."""
    try:
        files = importlib.metadata.files(MIMALLOC_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = (str(file.locate()) for file in files if file.name == "libmimalloc.so")
    return next((path for path in paths if not set(path) & {" ", ":"} and Path(path).is_file()), None)


def tune_runtime(*, num_threads: int | None = None) -> None:
    """Start this program anew with a better environment, if that changes anything; says so in one line on stderr.

    Args:
        num_threads: CPU threads; default: as many as the process may use, counted with a container's quota.
    """
    if num_threads is not None and num_threads < 1:
        return  # `set_threads` says so
    changes = wanted_environment(os.environ, num_threads=num_threads)
    if not changes or not _can_start_anew():
        return
    with contextlib.suppress(OSError):  # nobody has to read it
        print(f"runtime: {describe(changes)} (--no-tune-runtime leaves things alone)", file=sys.stderr, flush=True)
    start_anew(changes)


def start_anew(changes: Mapping[str, str]) -> NoReturn:
    """Run this program again from its start, in this process, with changed variables and marked as started anew."""
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **changes, MARK: "1"})


def set_threads(num_threads: int | None) -> None:
    """Use so many CPU threads in this process; None leaves torch's choice. Raises ConfigError below 1."""
    if num_threads is None:
        return
    if num_threads < 1:
        raise ConfigError(f"--threads is {num_threads}; give at least 1, or leave it out for all that may be used.")
    import torch

    torch.set_num_threads(num_threads)


def wanted_environment(environment: Mapping[str, str], *, num_threads: int | None = None) -> dict[str, str]:
    """Variables to set; empty when the process was started anew already, or nothing would help."""
    if MARK in environment or sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return {}
    preloaded, changes = environment.get("LD_PRELOAD", ""), dict(FOR_TORCH)
    tells_glibc = any(environment.get(name) for name in KEPT_BY_GLIBC)
    if not preloaded and not tells_glibc:
        changes |= _best_allocator()
    elif not any(allocator in preloaded for allocator in ("jemalloc", "tcmalloc", "mimalloc")):
        changes |= KEPT_BY_GLIBC
    threads = num_threads or usable_cpus()
    # torch takes every CPU of the affinity mask; a container's quota it does not see
    if num_threads is not None or threads < len(os.sched_getaffinity(0)):
        changes["OMP_NUM_THREADS"] = str(threads)
    by_hand = {} if num_threads is None else {"OMP_NUM_THREADS"}
    return {name: value for name, value in changes.items() if name in by_hand or not environment.get(name)}


def describe(changes: Mapping[str, str]) -> str:
    """What the changes do, in words."""
    parts = []
    if {"MALLOC_TRIM_THRESHOLD_", "MIMALLOC_PURGE_DELAY"} & changes.keys():
        parts.append("memory is kept between steps")
    if "THP_MEM_ALLOC_ENABLE" in changes:
        parts.append("tensors lie in large pages")
    if "OMP_NUM_THREADS" in changes:
        parts.append(f"{changes['OMP_NUM_THREADS']} threads")
    return "started anew so that " + ", ".join(parts) if parts else "unchanged"


def usable_cpus(control_group: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs that this process may use: its affinity mask, cut to the quota of its control group (v2 or v1)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(control_group)
    return allowed if quota is None else max(1, min(allowed, math.floor(quota + 0.5)))


def _quota(control_group: Path) -> float | None:
    try:
        if (control_group / "cpu.max").is_file():
            limit, period = (control_group / "cpu.max").read_text().split()
        else:
            limit = (control_group / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (control_group / "cpu" / "cpu.cfs_period_us").read_text().strip()
        cpus = math.inf if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return cpus if 0 < cpus < math.inf else None


def _can_start_anew() -> bool:
    """This is the `finerank` program itself, not one that uses its functions, and torch is not loaded yet."""
    if not sys.executable or not getattr(sys, "orig_argv", None) or "torch" in sys.modules:
        return False
    program = Path(sys.argv[0])
    return "finerank" in (program.stem, program.parent.name if program.name == "__main__.py" else "")
