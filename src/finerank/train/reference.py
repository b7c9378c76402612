"""Reference log-probabilities of pairs: what the model said before training, computed once and kept.

    data = with_reference(model, data, settings, adapters=adapters, made_of={...}, say=print)

The reference is the model that training starts from: the base, seen by switching the adapter off, so no second copy of
it is held; with `--lora-load` the adapter as it was loaded. Two numbers a pair are all that the loss needs, so the
reference model is run once over the data and never again.

    ~/.cache/finerank/reference/<key>.safetensors          fp32 [N, 2]: chosen, rejected

The key is made of everything that decides the numbers, to the last bit: data, base and adapter by content, precision,
how rows are laid side by side, device, threads and versions. So a resumed run gets the numbers that it began with, and
another beta costs no second pass. Any of the files may be deleted at any time.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.torch
import torch
from transformers import PreTrainedModel

from finerank.data.loader import eval_batches
from finerank.data.pairs import PairDataset
from finerank.data.settings import DataSettings
from finerank.errors import NumericsError, StorageError
from finerank.files import cache_folder, replace_file
from finerank.train.memory import if_it_fits, out_of_memory
from finerank.train.pair_loss import pairs_of


class Adapters(Protocol):
    """See `finerank.adapters.adapter_set.AdapterSet`."""

    def disabled(self) -> contextlib.AbstractContextManager[None]: ...


def with_reference(
    model: PreTrainedModel,
    data: PairDataset,
    settings: DataSettings,
    *,
    adapters: Adapters | None,
    made_of: Mapping[str, Any],
    pad_token_id: int,
    say: Callable[[str], None],
) -> PairDataset:
    """The pairs with their reference log-probabilities, from the cache or from one pass over them.

    Args:
        model: as training starts.
        data: the pairs.
        settings: how rows are laid side by side; `data_cache` says whether the numbers are kept.
        adapters: to be switched off; None when the reference is the model as it is.
        made_of: what decides the numbers besides data and layout: digests, precision, device, versions.
        pad_token_id: fills padded positions.
        say: is told of a pass over the data.

    Raises NumericsError when the model gives a pair a log-probability that is not finite, OutOfMemoryError.
    """
    layout = _layout(data, settings, pad_token_id)
    told = {"data": data.digest, "layout": layout, "adapter off": adapters is not None, **made_of}
    key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / "reference" / f"{key[:40]}.safetensors"
    stored = _read(path, key, len(data)) if settings.data_cache else None
    if stored is not None:
        return data.with_reference(stored)
    started = time.monotonic()
    say(f"reference log-probabilities of {len(data)} pairs: one pass over them")
    values = _compute(model, data, settings, adapters, pad_token_id)
    say(f"reference log-probabilities done in {time.monotonic() - started:.1f} s")
    if settings.data_cache:
        try:
            _write(path, key, values)
        except StorageError as error:  # the run can go on; one resumed later computes them again
            say(f"warning: {error}")
    return data.with_reference(values)


def _layout(data: PairDataset, settings: DataSettings, pad_token_id: int) -> str:
    """Digest of which pairs lie side by side, and how: by the batches themselves, whatever decided them."""
    digest = hashlib.sha256()
    for batch in eval_batches(data, settings, pad_token_id=pad_token_id):
        borders = (batch.cu_seqlens, batch.parents)
        told = [batch.input_ids.shape, batch.rows, *(None if b is None else b.tolist() for b in borders)]
        digest.update(json.dumps(told).encode())
    return digest.hexdigest()


@torch.no_grad()
def _compute(
    model: PreTrainedModel, data: PairDataset, settings: DataSettings, adapters: Adapters | None, pad_token_id: int
) -> np.ndarray:
    values = np.empty((len(data), 2), np.float32)
    was_training = model.training
    model.eval()
    try:
        with adapters.disabled() if adapters is not None else contextlib.nullcontext():
            for batch in eval_batches(data, settings, pad_token_id=pad_token_id):
                pairs = if_it_fits(pairs_of, model, batch.to(model.device))
                if pairs is None:
                    raise out_of_memory(model, batch, device=model.device)
                values[list(batch.rows)] = torch.stack([pairs.chosen, pairs.rejected], dim=1).float().cpu().numpy()
    finally:
        model.train(was_training)
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(1))[0])
        raise NumericsError(f"The reference log-probability of pair {row} is not finite; check the model and that row.")
    return values


def _read(path: Path, key: str, num_pairs: int) -> np.ndarray | None:
    """None when the file is not there, not whole or another one's."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            values = file.get_tensor("reference").numpy()
    except (OSError, safetensors.SafetensorError, ValueError):
        return None
    is_ours = metadata == {"key": key, "sha256": _sha256(values)} and values.shape == (num_pairs, 2)
    return values if is_ours and values.dtype == np.float32 else None


def _write(path: Path, key: str, values: np.ndarray) -> None:
    metadata = {"key": key, "sha256": _sha256(values)}
    with replace_file(path) as aside:
        aside.write_bytes(safetensors.torch.save({"reference": torch.from_numpy(values)}, metadata))


def _sha256(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
