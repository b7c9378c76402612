"""Memory: the peak so far, and what to say when there is not enough."""

import resource
import sys

import torch
from torch import nn

from finerank.data.types import Batch


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: on the GPU what torch allocated, on the CPU the resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python ran out of memory; torch's CPU allocator has no class of its own for it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def explain(model: nn.Module, batch: Batch, *, packed: bool) -> str:
    """One sentence: what the memory went to, and which settings need less."""
    base = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    b, t = batch.input_ids.shape
    smaller = "--micro-batch-tokens" if packed else "--micro-batch-size"
    return (
        f"Out of memory on a micro-batch of {b} x {t} tokens: the base model takes {_mib(base)}, the adapters with "
        f"gradients and optimizer state {_mib(4 * trained)}, the rest are activations, which shrink with {smaller} "
        "(the result stays the same) or --seq-length."
    )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"
