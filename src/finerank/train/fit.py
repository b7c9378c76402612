"""`--micro-batch-size auto`: the largest micro-batch that memory holds; the global batch stays as it is.

    values = choose_split(settings, model, dataset, checkpoint, folder=run, pad_token_id=2, say=print)

What is tried is the heaviest micro-batch there can be: the longest samples, every token trained, forward and backward.
On a GPU it is run, with room kept for AdamW's moments, until one does not fit. On the CPU too much memory ends the
process, so the peaks of one and of two rows are measured and the rest is extrapolated: a row more costs its tokens.

The value found decides rounding, so it is written into the run's settings, and a resumed run takes it from there.
"""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from finerank import config
from finerank.checkpoints.native import Checkpoint
from finerank.data.batch import Batch
from finerank.data.loader import Samples, heaviest_batch
from finerank.data.pairs import PairDataset
from finerank.data.settings import BatchSettings
from finerank.errors import ConfigError
from finerank.train.held_out import LossFunction, batch_loss_sum
from finerank.train.memory import OutOfMemoryError, available_memory_bytes, explain, is_out_of_memory, mib
from finerank.train.resume import NEUTRAL

USABLE_SHARE = 0.8
"""Of the memory that is free on the CPU; the rest is for evaluation, saving and the allocator's gaps."""
GPU_RESERVE_SHARE = 0.05
"""Of a GPU's memory, kept free while a micro-batch is tried: fragments and library workspaces."""
NAMES = ("micro_batch_size", "micro_batch_tokens")


def choose_split(
    settings: Any,
    model: nn.Module,
    dataset: Samples,
    checkpoint: Checkpoint | None,
    *,
    parameters: Sequence[Tensor],
    folder: Path,
    pad_token_id: int,
    loss_function: LossFunction,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """The settings that take the place of `auto`: what fits, or in a resumed run what it found at its start.

    Raises OutOfMemoryError, ConfigError: see `find_split`.
    """
    found = stored_split(checkpoint, folder, settings) if settings.resume else None
    if found is None:
        how: dict[str, Any] = {"pad_token_id": pad_token_id, "loss_function": loss_function}
        found, sentence = find_split(model, dataset, settings, parameters=parameters, **how)
        say(sentence)
    return found


def stored_split(checkpoint: Checkpoint | None, folder: Path, settings: Any) -> dict[str, Any] | None:
    """The split that the run to be resumed uses; None when there is none. `settings` are those asked for now."""
    before: Mapping[str, Any]
    if checkpoint is not None:
        origin = checkpoint.state.get("origin")
        before = origin.get("settings", {}) if isinstance(origin, dict) else {}
    else:  # killed before its first checkpoint: the settings of the same run lie in its folder
        path = folder / "config.yaml"
        if not path.is_file():
            return None
        try:
            before = config.read_yaml(path, type(settings))
        except ConfigError:
            return None
        now = config.to_dict(settings)
        if any(before.get(name) != value for name, value in now.items() if name not in (*NAMES, *NEUTRAL)):
            return None
    found = {name: before.get(name) for name in NAMES}
    return None if "auto" in found.values() or found["micro_batch_tokens"] is None else found


def find_split(
    model: nn.Module,
    dataset: Samples,
    settings: BatchSettings,
    *,
    parameters: Sequence[Tensor] | None = None,
    pad_token_id: int,
    loss_function: LossFunction = batch_loss_sum,
) -> tuple[dict[str, Any], str]:
    """The settings of the largest micro-batch that fits, and the sentence that says which and why.

    `parameters` are what the optimizer will change: the model's that get gradients, unless they have fp32 masters.

    Raises OutOfMemoryError when not even one sample fits, ConfigError for a device whose memory cannot be asked.
    """
    device = next(model.parameters()).device
    trained = [p for p in model.parameters() if p.requires_grad] if parameters is None else list(parameters)
    most = min(settings.global_batch_size, len(dataset))
    if isinstance(dataset, PairDataset) and dataset.reference is None:  # known later; its values take no memory
        dataset = dataset.with_reference(np.zeros((len(dataset), 2), np.float32))

    def run(num_rows: int) -> Batch:
        batch = heaviest_batch(dataset, settings, num_rows, pad_token_id=pad_token_id)
        _forward_backward(model, batch.to(device), loss_function, trained)
        return batch

    if device.type == "cuda":
        num_rows = _try_on_gpu(trained, run, most, device)
        why = "the whole global batch fits" if num_rows == most else f"{num_rows + 1} of the longest rows ran out"
    elif device.type == "cpu":
        num_rows, why = _extrapolate(trained, run, most, lambda n: _num_positions(dataset, settings, n))
    else:
        raise ConfigError(f"--micro-batch-size auto cannot ask for the memory of {device.type}; give a number.")
    if num_rows == 0:
        batch = heaviest_batch(dataset, settings, 1, pad_token_id=pad_token_id)
        raise OutOfMemoryError(f"{explain(model, batch, device=device)} ({why})")
    if settings.pack:
        tokens = _num_positions(dataset, settings, num_rows)
        return {NAMES[0]: None, NAMES[1]: tokens}, f"--micro-batch-tokens {tokens} (auto): {why}"
    return {NAMES[0]: num_rows, NAMES[1]: settings.micro_batch_tokens}, f"--micro-batch-size {num_rows} (auto): {why}"


def _num_positions(dataset: Samples, settings: BatchSettings, num_rows: int) -> int:
    return heaviest_batch(dataset, settings, num_rows).input_ids.numel()


def _forward_backward(model: nn.Module, batch: Batch, loss_function: LossFunction, trained: Sequence[Tensor]) -> None:
    """As a step does it; leaves no gradient, and the model in the mode it was in."""
    was_training = model.training
    model.train()
    try:
        loss_function(model, batch).backward()
    finally:
        for parameter in trained:
            parameter.grad = None
        model.train(was_training)


def _moments_bytes(trained: Sequence[Tensor]) -> int:
    """AdamW's two moments in fp32; they come with the first update."""
    return sum(8 * p.numel() for p in trained)


def _try_on_gpu(trained: Sequence[Tensor], run: Callable[[int], Any], most: int, device: torch.device) -> int:
    total = torch.cuda.get_device_properties(device).total_memory
    reserve = _moments_bytes(trained) + int(GPU_RESERVE_SHARE * total)

    def fits(num_rows: int) -> bool:
        try:
            kept = torch.empty(reserve, dtype=torch.uint8, device=device)
            run(num_rows)
            del kept
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            gc.collect()  # what a failed backward held
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        return True

    return largest_that(fits, most)


def largest_that(fits: Callable[[int], bool], most: int) -> int:
    """The largest n in 1..`most` that fits, 0 for none: doubling until one does not, then halving the gap."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)  # the first that is known, or not allowed, to fail
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def _extrapolate(
    trained: Sequence[Tensor], run: Callable[[int], Any], most: int, positions: Callable[[int], int]
) -> tuple[int, str]:
    free = available_memory_bytes()
    usable = USABLE_SHARE * free - _moments_bytes(trained)
    first = peak_bytes(lambda: run(1))
    if first > usable:
        return 0, f"the longest row takes {mib(first)}, and {mib(free)} are free"
    if most == 1:
        return 1, "the whole global batch fits"
    second = peak_bytes(lambda: run(2))
    per_token = max(0.0, (second - first) / (positions(2) - positions(1)))
    num_rows = largest_that(lambda n: first + per_token * (positions(n) - positions(1)) <= usable, most)
    needs = first + per_token * (positions(num_rows) - positions(1))
    whole = "the whole global batch, which" if num_rows == most else "the most that fits:"
    return num_rows, f"{whole} takes {mib(needs)} by two measured rows, and {mib(free)} are free"


def peak_bytes(work: Callable[[], Any]) -> int:
    """Most memory that torch held on the CPU at once for `work`, beyond what it held before; the same each time."""
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        work()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's profiler telling stderr that it starts and stops, which no setting of it prevents."""
    saved, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nothing)
