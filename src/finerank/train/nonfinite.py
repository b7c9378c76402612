"""When a number goes wrong: which module, which rows, and a file that shows it again.

    finerank tune --config RUN/config.yaml --replay RUN/nonfinite-step-12.safetensors

The batch is run once more with hooks. The first module whose output is NaN or infinite is the culprit of a bad loss;
where the outputs are fine, the first one to receive a bad gradient on the way back is named. The replay file holds the
micro-batches and the trained parameters of that moment, as safetensors with JSON metadata.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from finerank.data.batch import Batch
from finerank.errors import CheckpointError
from finerank.files import replace_file
from finerank.train.held_out import LossFunction
from finerank.train.state import parameters_of, seed_everything

_BATCH_TENSORS = tuple(f.name for f in fields(Batch) if f.name not in ("rows", "is_sample"))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Where non-finite numbers first appear."""

    place: str
    """In words, e.g. `the output of model.layers.3.mlp.down_proj`."""
    rows: tuple[int, ...]
    """Samples with non-finite numbers there; all of the micro-batch where the place does not tell them apart."""


def find_nonfinite(
    model: nn.Module, batches: Sequence[Batch], *, loss_function: LossFunction, seeds: Sequence[tuple[int, ...]]
) -> Finding | None:
    """Run micro-batches forward and backward again, each with its own seed, until one gives a non-finite number.

    Gradients of the parameters are left as they were found. None when everything is finite this time.
    """
    device = next(model.parameters()).device
    parameters = [p for p in model.parameters() if p.requires_grad]
    for batch, seed in zip(batches, seeds, strict=True):
        seed_everything(*seed)
        with _watch(model, batch) as findings:
            loss = loss_function(model, batch.to(device))
            gradients: Sequence[Tensor | None] = []
            if not findings and torch.isfinite(loss) and parameters:
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        if findings:
            return findings[0]
        if not torch.isfinite(loss):
            return Finding(place="the loss itself, after finite outputs of all modules", rows=batch.rows)
        if any(g is not None and not _is_finite(g) for g in gradients):
            return Finding(place="the gradient of a trained parameter", rows=batch.rows)
    return None


def _is_finite(grad: Tensor) -> bool:
    """An embedding's gradient may be a sparse one."""
    return bool(torch.isfinite(grad._values() if grad.is_sparse else grad).all())


@contextmanager
def _watch(model: nn.Module, batch: Batch) -> Iterator[list[Finding]]:
    """Collect non-finite outputs, then non-finite gradients, in the order of the computation."""
    findings: list[Finding] = []

    def see(tensor: Tensor, place: str) -> None:
        is_finite = torch.isfinite(tensor)
        if not is_finite.all():
            findings.append(Finding(place=place, rows=_rows_with(~is_finite, batch)))

    def look(name: str, module: nn.Module, output: Any) -> None:
        bad = [n for n, p in module.named_parameters(recurse=False) if not torch.isfinite(p).all()]
        weights = f" (its {', '.join(bad)} is not finite)" if bad else ""
        for tensor in _floating(output):
            see(tensor, f"the output of {name or 'the model'}{weights}")
            if tensor.requires_grad:
                tensor.register_hook(lambda grad: see(grad, f"the gradient of the output of {name}"))

    handles = [
        module.register_forward_hook(lambda m, _inputs, output, name=name: look(name, m, output))
        for name, module in model.named_modules()
    ]
    try:
        yield findings
    finally:
        for handle in handles:
            handle.remove()


def _rows_with(is_bad: Tensor, batch: Batch) -> tuple[int, ...]:
    """The batch's rows that have a bad number in a tensor [B, T, ...]; all of them for a tensor of another shape.

    A row is one sequence of the batch, a pair two that follow each other.
    """
    b, t = batch.input_ids.shape
    if is_bad.shape[:2] != (b, t):
        return batch.rows
    bad_BT = is_bad.reshape(b, t, -1).any(dim=-1).cpu()
    if batch.cu_seqlens is None:
        bad = bad_BT.any(dim=1).tolist()
    else:
        bad = [bool(part.any()) for part in bad_BT[0].tensor_split(batch.cu_seqlens[1:-1].cpu().long())]
    if batch.parents is not None or not batch.rows or len(bad) % len(batch.rows):
        return batch.rows
    per_row = len(bad) // len(batch.rows)
    return tuple(row for i, row in enumerate(batch.rows) if any(bad[i * per_row : (i + 1) * per_row]))


def _floating(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _floating(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _floating(value)


def write_replay(
    path: Path,
    *,
    step: int,
    batches: Sequence[Batch],
    seeds: Sequence[tuple[int, ...]],
    parameters: Mapping[str, Tensor],
) -> None:
    """Write what `read_replay` needs. Raises StorageError."""
    # clones, because a batch may use one tensor twice, which the format does not allow
    tensors = {f"parameter/{name}": p.detach().cpu().contiguous().clone() for name, p in parameters.items()}
    for i, batch in enumerate(batches):
        for key in _BATCH_TENSORS:
            if (value := getattr(batch, key)) is not None:
                tensors[f"batch/{i}/{key}"] = value.cpu().contiguous().clone()
    about = {"step": step, "seeds": [list(s) for s in seeds], "rows": [list(b.rows) for b in batches]}
    with replace_file(path) as aside:
        aside.write_bytes(safetensors.torch.save(tensors, metadata={"replay": json.dumps(about)}))


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The content of a replay file."""

    step: int
    batches: list[Batch]
    seeds: list[tuple[int, ...]]
    parameters: dict[str, Tensor]


def read_replay(path: Path) -> Replay:
    """Read a replay file. Raises CheckpointError when it is none."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["replay"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        batches = [
            Batch(
                **{k: tensors[f"batch/{i}/{k}"] for k in _BATCH_TENSORS if f"batch/{i}/{k}" in tensors},
                rows=tuple(rows),
            )
            for i, rows in enumerate(about["rows"])
        ]
        seeds = [tuple(int(n) for n in s) for s in about["seeds"]]
        step = int(about["step"])
    except (OSError, safetensors.SafetensorError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a replay file of finerank ({error}); give one that tune wrote."
        ) from error
    return Replay(step=step, batches=batches, seeds=seeds, parameters=parameters_of(tensors))
