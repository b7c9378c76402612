"""What leaves the local layers, kept on disk, so that later epochs skip those layers (`--cache-boundary`).

    cache = start_boundary_cache(settings, loop, local, dataset, base_digest=..., say=print)
    loop.run()
    cache.remove()

Once layers 0 to K no longer learn (`--lu-lora-rule frozen`, or after `--lu-lora-freeze-after` steps), a row's hidden
states on the way into layer K + 1 are the same in every epoch. The first time a row comes they are written to
`boundary_cache/hidden.bin` of the run folder; when all rows of a micro-batch are there, layers 0 to K are not run.
A row has its own place, token by token, so packs may be made of other rows each epoch.

The states are kept in the model's own precision and are therefore the very bits that the layers would give; what is
used is always what was stored. Each row carries a checksum: a killed run goes on with what it had written, and a row
that was half written or damaged is computed again. Everything belongs to one key (rows, base, K, local factors); with
another key the cache starts empty. Evaluation computes all layers. Threads that compute micro-batches side by side use
the cache at the same time: rows have places of their own, and so have the threads' micro-batches.
"""

import hashlib
import logging
import math
import mmap
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from finerank.adapters.local_learning import LocalLearning
from finerank.adapters.settings import LocalSettings
from finerank.data.batch import Batch
from finerank.data.pairs import PairDataset
from finerank.data.tokens import TokenDataset
from finerank.errors import ConfigError, ModelError, StorageError
from finerank.files import fsync_path, replace_file, replace_folder, storage_errors
from finerank.models.forward import decoder_of
from finerank.train.held_out import LossFunction, batch_loss_sum
from finerank.train.loop import TrainLoop

logger = logging.getLogger(__name__)

FOLDER = "boundary_cache"
_SPARE_BYTES = 64 << 20
"""Left free on the disk, for checkpoints and metrics."""


class HiddenFile:
    """Hidden states by row, in memory-mapped files: `hidden.bin`, and `rows.bin` with a checksum for each row.

    Shapes: t tokens of a row, D hidden size.
    """

    def __init__(self, folder: Path, lengths: np.ndarray, *, hidden_size: int, dtype: torch.dtype):
        """
        Args:
            folder: made if it is not there or of another size.
            lengths: tokens of each row.
            hidden_size, dtype: of the hidden states.

        Raises:
            StorageError: the disk has not enough room, or cannot be written.
        """
        self.folder, self.dtype = folder, dtype
        self._token_bytes = hidden_size * dtype.itemsize
        self._starts = np.concatenate([[0], np.cumsum(lengths)]) * self._token_bytes
        self.num_bytes = int(self._starts[-1])
        sizes = {"hidden.bin": self.num_bytes, "rows.bin": 8 * len(lengths)}
        found = {name: (folder / name).stat().st_size for name in sizes if (folder / name).is_file()}
        if found != sizes:
            self._make(sizes)
        with storage_errors(folder):
            self._data = _map(folder / "hidden.bin")
            self._rows = _map(folder / "rows.bin")
        self.bytes = np.frombuffer(self._data, np.uint8)
        self.marks = np.frombuffer(self._rows, np.int64)
        """0: not there; else the row's CRC-32 plus 2**32."""

    def _make(self, sizes: Mapping[str, int]) -> None:
        if self.folder.exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        with storage_errors(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder.parent).free
        if sum(sizes.values()) + _SPARE_BYTES > free:
            raise StorageError(
                f"--cache-boundary needs {describe_bytes(sum(sizes.values()))} in {self.folder.parent} and "
                f"{describe_bytes(free)} are free; free space, choose another --output-dir, or leave it out."
            )
        with replace_folder(self.folder) as aside:
            for name, size in sizes.items():
                _reserve(aside / name, size)

    def use_key(self, key: str) -> int:
        """Keep what was stored under this key, drop what was stored under another; returns the number of rows kept."""
        path = self.folder / "key"
        with storage_errors(path):
            if not path.is_file() or path.read_text(encoding="utf-8") != key:
                path.unlink(missing_ok=True)
                self.marks[:] = 0
                self._rows.flush()
                fsync_path(self.folder)
                with replace_file(path) as aside:
                    aside.write_text(key, encoding="utf-8")
        return int(np.count_nonzero(self.marks))

    def read(self, row: int) -> Tensor | None:
        """[t, D], or None when the row is not there or damaged."""
        mark = int(self.marks[row])
        if not mark:
            return None
        stored = self.bytes[self._starts[row] : self._starts[row + 1]].copy()
        if mark != _mark(stored):
            logger.warning("row %d of %s is damaged and is computed again", row, self.folder)
            self.marks[row] = 0
            return None
        return torch.from_numpy(stored).view(self.dtype).view(-1, self._token_bytes // self.dtype.itemsize)

    def write(self, row: int, hidden_tD: Tensor) -> None:
        """Store a row; its mark comes last."""
        content = hidden_tD.to(self.dtype).contiguous().view(torch.uint8).flatten().numpy()
        self.bytes[self._starts[row] : self._starts[row + 1]] = content
        self.marks[row] = _mark(content)

    def release(self) -> None:
        """Let the system have the pages back; the bytes stay in the file. Else they would count as the process's."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._data.madvise(mmap.MADV_DONTNEED)

    def remove(self) -> None:
        """Unmap and delete the files."""
        del self.bytes, self.marks
        self._data.close()
        self._rows.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _map(path: Path) -> mmap.mmap:
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), 0)


def _reserve(path: Path, size: int) -> None:
    """A file of zeros that has its room on the disk: writing to a mapped file without it would kill the process."""
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            for start in range(0, size, 1 << 24):
                file.write(bytes(min(1 << 24, size - start)))


def _mark(content: np.ndarray) -> int:
    return (1 << 32) + zlib.crc32(content.data)


def describe_bytes(count: int) -> str:
    """In MB or GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


class _InWork(threading.local):
    """The micro-batch that a thread computes."""

    new: tuple[Batch, dict[int, Tensor | None]] | None = None
    """One with rows that are to be stored, and the hidden states of the others."""
    hidden: Tensor | None = None
    """What leaves the local layers, where they are skipped."""


class BoundaryCache:
    """Runs micro-batches of training with or without the local layers, and keeps what leaves them.

    Shapes: B rows, T tokens, t tokens of one row, D hidden size.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        local: LocalLearning,
        lengths: np.ndarray,
        loss_function: LossFunction,
        *,
        folder: Path,
        key: Sequence[str],
    ):
        """
        Args:
            model: with local layers.
            local: says which layers are local and whether they still learn.
            lengths: tokens of each row of the training data.
            loss_function: what a micro-batch is trained on; it runs the model's decoder once on the whole batch.
            folder: where the files go.
            key: what the hidden states depend on, besides the local factors.

        Raises:
            ModelError: the model's layers draw random numbers, or hand on more than one hidden state.
            StorageError: not enough room.
        """
        self.model, self.local, self.lengths, self.inner = model, local, lengths, loss_function
        self._key = [*key, str(model.dtype), str(len(local.layers)), torch.__version__]
        _refuse_dropout(model)
        self._gives_tuple, hidden_size = _probe(model, local.layers[-1])
        self.file = HiddenFile(folder, lengths, hidden_size=hidden_size, dtype=model.dtype)
        self._is_open, self._opening = False, threading.Lock()
        self._in_work = _InWork()
        local.layers[-1].register_forward_hook(self._at_boundary)
        for layer in local.layers:
            layer.forward = self._skippable(layer)  # type: ignore[method-assign]

    def loss_function(self, model: Any, batch: Batch) -> Tensor:
        """The same loss as `loss_function`, without the local layers where their output is stored."""
        if not (model.training and torch.is_grad_enabled() and self.local.is_fixed):
            return self.inner(model, batch)
        with self._opening:
            if not self._is_open:
                self._open()
        stored = {row: self.file.read(row) for row in batch.rows}
        self.file.release()
        now = self._in_work
        try:
            if all(hidden is not None for hidden in stored.values()):
                now.hidden = self._assembled(batch, stored)
            else:
                now.new = batch, stored
            return self.inner(model, batch)
        finally:
            now.new = now.hidden = None

    def remove(self) -> None:
        """Delete the files; the run is done."""
        self.file.remove()

    def _open(self) -> None:
        """The local layers have just become fixed, or the run was resumed after that."""
        told = hashlib.sha256("\n".join(self._key).encode())
        for name, parameter in self.model.named_parameters():
            if parameter in self.local.parameters:
                told.update(name.encode() + parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        self.file.use_key(told.hexdigest())
        self._is_open = True

    def _at_boundary(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        """Store the rows that are new, and go on with what is stored for the others."""
        if self._in_work.new is None:
            return None
        batch, stored = self._in_work.new
        hidden = (output[0] if self._gives_tuple else output).detach()
        for row, (b, span) in zip(batch.rows, self._places(batch), strict=True):
            if stored[row] is None:
                stored[row] = new = hidden[b, span].cpu()
                self.file.write(row, new)
        self.file.release()
        return self._output(self._assembled(batch, stored))

    def _assembled(self, batch: Batch, stored: Mapping[int, Tensor | None]) -> Tensor:
        """[B, T, D]; zero where a row is padded, which nothing attends to."""
        hidden = torch.zeros(*batch.input_ids.shape, next(iter(stored.values())).shape[-1], dtype=self.model.dtype)  # type: ignore[union-attr]
        for row, (b, span) in zip(batch.rows, self._places(batch), strict=True):
            hidden[b, span] = stored[row]  # type: ignore[assignment]
        return hidden.to(batch.input_ids.device)

    def _places(self, batch: Batch) -> list[tuple[int, slice]]:
        """Where each row of a batch lies: (b, tokens)."""
        lengths = [int(self.lengths[row]) for row in batch.rows]
        if batch.cu_seqlens is None:
            return [(b, slice(0, n)) for b, n in enumerate(lengths)]
        ends = np.cumsum(lengths).tolist()
        return [(0, slice(end - n, end)) for end, n in zip(ends, lengths, strict=True)]

    def _output(self, hidden: Tensor) -> Any:
        return (hidden,) if self._gives_tuple else hidden

    def _skippable(self, layer: nn.Module) -> Callable[..., Any]:
        """The layer's forward. Where its micro-batch is stored, it hands on its input, the last one what is stored."""
        computed, is_last = layer.forward, layer is self.local.layers[-1]

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            hidden = self._in_work.hidden
            if hidden is None:
                return computed(hidden_states, *args, **kwargs)
            return self._output(hidden if is_last else hidden_states)

        return forward


def start_boundary_cache(
    settings: LocalSettings,
    loop: TrainLoop,
    local: LocalLearning | None,
    dataset: TokenDataset | PairDataset,
    *,
    base_digest: str,
    say: Callable[[str], None],
) -> BoundaryCache | None:
    """Make a loop that is about to run keep and use hidden states; None without `--cache-boundary`.

    Args:
        settings: with K, rule and the step at which the local layers become fixed, checked.
        loop: started anew or restored; its loss function is replaced.
        local: of the loop's model.
        dataset: training rows.
        base_digest: of the base model.
        say: told the size on disk.

    Raises:
        ConfigError: no row would come a second time, or the loss is another one than the cross-entropy.
        ModelError, StorageError: see `BoundaryCache`.
    """
    if not settings.cache_boundary:
        return None
    assert local is not None and isinstance(loop.model, PreTrainedModel)
    if not isinstance(dataset, TokenDataset) or loop.loss_function is not batch_loss_sum:
        raise ConfigError("--cache-boundary is for supervised tuning; leave it out with other losses.")
    fixed_from = 0 if settings.lu_lora_rule == "frozen" else settings.lu_lora_freeze_after or 0
    per_epoch = math.ceil(len(dataset) / len(loop.plan.rows(0)))
    pays_from = (fixed_from // per_epoch + 1) * per_epoch
    if loop.plan.num_steps <= pays_from:
        raise ConfigError(
            f"--cache-boundary has no effect: no row comes a second time before step {pays_from}, and the run has "
            f"{loop.plan.num_steps} steps; give more --num-epochs, or leave it out."
        )
    cache = BoundaryCache(
        loop.model,
        local,
        dataset.lengths,
        loop.loss_function,
        folder=loop.folder / FOLDER,
        key=[base_digest, dataset.digest],
    )
    size = describe_bytes(cache.file.num_bytes)
    say(f"--cache-boundary: {size} for {len(dataset)} rows in {cache.file.folder}; in use from step {pays_from} on")
    loop.loss_function = cache.loss_function
    return cache


def _refuse_dropout(model: nn.Module) -> None:
    """Outputs that differ each time cannot be kept."""
    for module in model.modules():
        rate = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0.0)
        if isinstance(rate, float) and rate > 0.0:
            raise ModelError(
                f"--cache-boundary: the base model drops out at random ({type(module).__name__}, {rate:g}), so its "
                "hidden states differ in each epoch; leave it out, or set the rate to 0 in the model's config.json."
            )


@torch.no_grad()
def _probe(model: PreTrainedModel, last: nn.Module) -> tuple[bool, int]:
    """Whether the layer gives a tuple, and its hidden size."""
    seen: list[Any] = []
    handle = last.register_forward_hook(lambda _m, _i, output: seen.append(output))
    was_training = model.training
    model.eval()
    ids = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    try:
        decoder_of(model)(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
        model.train(was_training)
    (output,) = seen
    hidden = output[0] if isinstance(output, tuple) else output
    is_one = isinstance(output, Tensor) or (isinstance(output, tuple) and len(output) == 1)
    if not is_one or hidden.dim() != 3 or hidden.shape[:2] != ids.shape or hidden.dtype != model.dtype:
        raise ModelError(
            f"--cache-boundary: the layers of {type(model).__name__} hand on more than one hidden state for each "
            "token, so they cannot be skipped; leave it out."
        )
    return isinstance(output, tuple), hidden.shape[-1]
