"""Batches: which samples each optimizer step sees, and how they are laid side by side.

    plan = BatchPlan(dataset, settings, seed=1234, num_epochs=1, pad_token_id=2)
    for step in range(plan.num_steps):
        for batch in plan.micro_batches(step): ...

A plan holds no state: everything follows from (seed, epoch) and the step, so a run resumes at any step with exactly the
rows it would have seen. Packed, the samples of a global batch fill as few token budgets as best-fit finds, evenly, or
a multiple of what is computed at once; padded, they are sorted by length first, so that little is padded. With
`share_prompts`, what sequences of a pack begin with is there once.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from finerank.data.batch import Batch
from finerank.data.packing import even_fit
from finerank.data.pairs import Samples
from finerank.data.settings import BatchSettings, RowSettings
from finerank.data.shared_prompts import Segment, common_prompt, share_prompts
from finerank.data.types import IGNORE_INDEX
from finerank.errors import ConfigError

_SMALLEST_FOR_SAMPLE = 0.25
"""A micro-batch of the sample is as much smaller than others as the sample is than the step, since more of it is kept
for the way back; but no smaller than this share of them, since products of few tokens are slow."""
_SAMPLE_STREAM = 1
"""Sets the sample's random numbers apart from the permutation's."""


class _Sequence(NamedTuple):
    """One sequence of a sample, as a batch has it."""

    ids: np.ndarray
    """int32 [T]"""
    targets: np.ndarray
    """int64 [T], at each position the label of the next one; nothing at the last."""
    first_trained: int
    """The first position whose target is trained; T when none is."""


class BatchPlan:
    """The order of the samples of a whole run.

    Args:
        dataset: what to draw from.
        settings: batch sizes and layout.
        seed: of the permutation of each epoch.
        num_epochs: passes over the data, perhaps a fraction; or
        num_steps: optimizer steps, over as many epochs as that takes.
        pad_token_id: what fills padded positions.
        sample_share: this share of each step's rows, at least one, comes first (see `sample`) and in micro-batches of
            its own, smaller by that share, too (`Batch.is_sample`); None: no row is set apart.
        num_sampled_steps: the first steps, which have a sample; None: all have one.

    Raises ConfigError for sizes that no batch can have.
    """

    def __init__(
        self,
        dataset: Samples,
        settings: BatchSettings,
        *,
        seed: int,
        num_epochs: float | None = None,
        num_steps: int | None = None,
        pad_token_id: int,
        sample_share: float | None = None,
        num_sampled_steps: int | None = None,
    ):
        _check(settings)
        assert (num_epochs is None) != (num_steps is None) and len(dataset)
        self.dataset, self.settings = dataset, settings
        self.seed, self.pad_token_id, self.sample_share = seed, pad_token_id, sample_share
        self.steps_per_epoch = math.ceil(len(dataset) / settings.global_batch_size)
        if num_steps is None:
            assert num_epochs is not None
            num_steps = max(1, math.ceil(round(num_epochs * self.steps_per_epoch, 6)))
        self.num_steps = num_steps
        self.num_sampled_steps = num_steps if num_sampled_steps is None else num_sampled_steps
        self._order: tuple[int, np.ndarray] | None = None

    def rows(self, step: int) -> list[int]:
        """Numbers of the samples of a step's global batch; an epoch's last batch may be short."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._permutation(epoch))
        size = self.settings.global_batch_size
        return self._order[1][at * size : (at + 1) * size].tolist()

    def micro_batches(self, step: int) -> list[Batch]:
        """The step's global batch in pieces that each fit into one forward pass."""
        sample = dict.fromkeys(self.sample(step))
        rest = [row for row in self.rows(step) if row not in sample]
        batches = _micro_batches(self.dataset, rest, self.settings, self.pad_token_id) if rest else []
        if sample:
            assert self.sample_share is not None
            settings = _for_sample(self.settings, self.sample_share)
            sampled = _micro_batches(self.dataset, list(sample), settings, self.pad_token_id)
            batches = [dataclasses.replace(batch, is_sample=True) for batch in sampled] + batches
        return batches

    def sample(self, step: int) -> list[int]:
        """The rows of a step's sample, in the order of the global batch.

        One at random of each group of rows with about as many trained tokens, so that samples differ less in them.
        """
        if self.sample_share is None or step >= self.num_sampled_steps:
            return []
        rows = self.rows(step)
        draw = np.random.default_rng([self.seed, step, _SAMPLE_STREAM])
        size = min(max(1, round(self.sample_share * len(rows))), len(rows))
        groups = np.array_split(np.argsort(self.dataset.trained_lengths[rows], kind="stable"), size)
        return [rows[i] for i in sorted(int(draw.choice(group)) for group in groups)]

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self.settings.shuffle:
            return np.arange(len(self.dataset))
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.dataset))


def eval_batches(
    dataset: Samples, settings: BatchSettings, *, max_batches: int | None = None, pad_token_id: int = 0
) -> Iterator[Batch]:
    """Batches of all samples in order, or of the first ones: at most `max_batches` batches, for use one at a time."""
    _check(settings)
    settings = dataclasses.replace(settings, micro_batches_at_once=1)
    count = 0
    size = max(settings.global_batch_size, 16)  # enough samples at a time for packs to fill
    for start in range(0, len(dataset), size):
        rows = list(range(start, min(start + size, len(dataset))))
        for batch in _micro_batches(dataset, rows, settings, pad_token_id):
            if max_batches is not None and count >= max_batches:
                return
            count += 1
            yield batch


def heaviest_batch(dataset: Samples, settings: BatchSettings, num_rows: int, *, pad_token_id: int = 0) -> Batch:
    """The micro-batch of `num_rows` samples that takes most memory: the longest ones, every token trained."""
    rows = np.argsort(-dataset.lengths, kind="stable")[:num_rows].tolist()
    if settings.pack:
        batch = packed_batch(dataset, rows)
    else:
        batch = _padded_to_fit(dataset, rows, settings, pad_token_id)
    return dataclasses.replace(batch, target_ids=batch.input_ids)


def packed_batch(dataset: Samples, rows: Sequence[int], *, share: bool = False) -> Batch:
    """Samples one after the other in one row, without attention between their sequences.

    With `share`, the prompts that several sequences begin with are there once; see `data.shared_prompts`.
    """
    return _packed(rows, _read(dataset, rows), _reference(dataset, rows), share=share)


def _packed(
    rows: Sequence[int], samples: Sequence[list[_Sequence]], reference: torch.Tensor | None, *, share: bool
) -> Batch:
    sequences = [sequence for sample in samples for sequence in sample]
    if share:
        segments = share_prompts([own.ids for own in sequences], [own.first_trained for own in sequences])
    else:
        segments = [Segment(i, 0, len(own.ids), -1) for i, own in enumerate(sequences)]
    input_ids = np.concatenate([sequences[s.sequence].ids[s.start : s.end] for s in segments]).astype(np.int64)
    targets = np.concatenate([sequences[s.sequence].targets[s.start : s.end] for s in segments])
    positions = np.concatenate([np.arange(s.start, s.end) for s in segments])
    cu_seqlens = np.cumsum([0] + [s.end - s.start for s in segments]).astype(np.int32)
    parents = np.array([s.parent for s in segments], np.int32)
    return Batch(
        input_ids=torch.from_numpy(input_ids)[None],
        target_ids=torch.from_numpy(targets)[None],
        position_ids=torch.from_numpy(positions)[None],
        cu_seqlens=torch.from_numpy(cu_seqlens),
        parents=torch.from_numpy(parents) if (parents >= 0).any() else None,
        rows=tuple(rows),
        reference=reference,
    )


def padded_batch(dataset: Samples, rows: Sequence[int], *, length: int, pad_token_id: int) -> Batch:
    """Sequences below each other, padded on the right to `length` tokens."""
    return _padded(rows, _read(dataset, rows), _reference(dataset, rows), length=length, pad_token_id=pad_token_id)


def _padded(
    rows: Sequence[int],
    samples: Sequence[list[_Sequence]],
    reference: torch.Tensor | None,
    *,
    length: int,
    pad_token_id: int,
) -> Batch:
    sequences = [sequence for sample in samples for sequence in sample]
    shape = (len(sequences), length)
    input_ids = np.full(shape, pad_token_id, np.int64)
    targets = np.full(shape, IGNORE_INDEX, np.int64)
    mask = np.zeros(shape, np.int64)
    for b, own in enumerate(sequences):
        input_ids[b, : len(own.ids)] = own.ids
        targets[b, : len(own.ids)] = own.targets
        mask[b, : len(own.ids)] = 1
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        target_ids=torch.from_numpy(targets),
        position_ids=torch.arange(length).repeat(len(sequences), 1),
        attention_mask=torch.from_numpy(mask),
        rows=tuple(rows),
        reference=reference,
    )


def _reference(dataset: Samples, rows: Sequence[int]) -> torch.Tensor | None:
    known = getattr(dataset, "reference", None)
    return None if known is None else torch.from_numpy(known[list(rows)])


def _read(dataset: Samples, rows: Sequence[int]) -> list[list[_Sequence]]:
    """The sequences of each sample."""
    return [[_sequence(ids, labels) for ids, labels in dataset.sequences(row)] for row in rows]


def _sequence(ids: np.ndarray, labels: np.ndarray) -> _Sequence:
    targets = np.append(labels[1:], IGNORE_INDEX).astype(np.int64)
    trained = np.flatnonzero(targets != IGNORE_INDEX)
    return _Sequence(ids, targets, int(trained[0]) if len(trained) else len(targets))


def _micro_batches(dataset: Samples, rows: Sequence[int], settings: BatchSettings, pad_token_id: int) -> list[Batch]:
    lengths, most = dataset.lengths, settings.micro_batch_size
    assert most != "auto"  # see `_check`
    if settings.pack:
        return _packs(dataset, rows, settings, most)
    ordered = sorted(rows, key=lambda row: -int(lengths[row]))
    size = most or 1
    groups = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return [_padded_to_fit(dataset, own, settings, pad_token_id) for own in groups]


def _for_sample(settings: BatchSettings, share: float) -> BatchSettings:
    most, share = settings.micro_batch_size, max(share, _SMALLEST_FOR_SAMPLE)
    assert most != "auto"  # see `_check`
    return dataclasses.replace(
        settings,
        micro_batch_tokens=max(1, int(settings.micro_batch_tokens * share)),
        micro_batch_size=None if most is None else max(1, int(most * share)),
    )


def _packs(dataset: Samples, rows: Sequence[int], settings: BatchSettings, most: int | None) -> list[Batch]:
    samples = _read(dataset, rows)
    once, share = 0, bool(settings.share_prompts)
    if share:
        sequences = [sequence for sample in samples for sequence in sample]
        once = common_prompt([own.ids for own in sequences], [own.first_trained for own in sequences])
    own_lengths = [sum(len(own.ids) - once for own in sample) for sample in samples]
    batches = []
    at_once = settings.micro_batches_at_once or 1
    for pack in even_fit(own_lengths, settings.micro_batch_tokens - once, most=most, multiple_of=at_once):
        own_rows = [rows[i] for i in pack]
        batches.append(_packed(own_rows, [samples[i] for i in pack], _reference(dataset, own_rows), share=share))
    return batches


def _padded_to_fit(dataset: Samples, rows: Sequence[int], settings: BatchSettings, pad_token_id: int) -> Batch:
    """A padded batch of the length that the settings want."""
    samples = _read(dataset, rows)
    length = _padded_length(max(len(own.ids) for sample in samples for own in sample), settings)
    return _padded(rows, samples, _reference(dataset, rows), length=length, pad_token_id=pad_token_id)


def _padded_length(longest: int, settings: BatchSettings) -> int:
    if not settings.variable_seq_lengths:
        assert isinstance(settings, RowSettings)
        longest = settings.seq_length
    multiple = settings.pad_to_multiple_of
    return math.ceil(longest / multiple) * multiple


def _check(settings: BatchSettings) -> None:
    for name in (
        "global_batch_size",
        "micro_batch_size",
        "micro_batch_tokens",
        "micro_batches_at_once",
        "pad_to_multiple_of",
    ):
        value = getattr(settings, name)
        if value == "auto":
            raise ConfigError("--micro-batch-size auto is found by finerank tune alone; give a number here.")
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, not {value}.")
