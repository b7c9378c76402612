"""Samples in indexed files: which of their tokens are used, found a block of sequences at a time.

    for block in read_samples(ids, labels, mask, vocab_size=49152, digest=hashlib.sha256()):
        block.sequence, block.offsets, block.lengths

A neat-packed row (numbers in its attention mask) is taken apart into its segments. Of each segment, what follows its
last trained token is left out, and segments without a trained token are left out whole. Files of any size are read in
the memory of one block.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from finerank.data.indexed import IndexedFile, let_go
from finerank.data.types import IGNORE_INDEX

BLOCK_TOKENS = 1 << 20
"""Tokens of a block; a single longer sequence makes a block of its own."""


@dataclass(frozen=True)
class StoredSamples:
    """What is used of a block of sequences.

    Attributes:
        sequence: int64 [N], the sequence that each sample is in, counted over the whole file.
        offsets: int64 [N], where in its sequence each sample begins.
        lengths: int64 [N], in tokens.
        odd: (sequence, token id) of the first id or label that no token of the vocabulary has; None without.
    """

    sequence: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    odd: tuple[int, int] | None


def read_samples(
    ids: IndexedFile, labels: IndexedFile, mask: IndexedFile | None, *, vocab_size: int, digest: "hashlib._Hash"
) -> Iterator[StoredSamples]:
    """The samples of all sequences in order; `digest` is fed with the ids and labels that are used.

    Args:
        ids, labels, mask: files whose sequences have the same lengths.
        vocab_size: ids from here on are odd, and so are negative ones; -100 is no odd label.
        digest: a running hash.
    """
    ends = np.cumsum(ids.lengths)
    first = 0
    while first < len(ids):
        before = int(ends[first]) - int(ids.lengths[first])
        last = max(first + 1, int(np.searchsorted(ends, before + BLOCK_TOKENS, side="right")))
        yield _read_block(ids, labels, mask, slice(first, last), vocab_size, digest)
        let_go(*(file.values for file in (ids, labels, mask) if file is not None))
        first = last


def _read_block(
    ids: IndexedFile,
    labels: IndexedFile,
    mask: IndexedFile | None,
    block: slice,
    vocab_size: int,
    digest: "hashlib._Hash",
) -> StoredSamples:
    lengths = ids.lengths[block].astype(np.int64)
    values, targets = _gather(ids, block), _gather(labels, block)
    owner = np.repeat(np.arange(len(lengths)), lengths)  # of each token
    is_trained = targets != IGNORE_INDEX
    odd_value, odd_target = (_outside(tokens, vocab_size) for tokens in (values, targets))
    at = np.flatnonzero(odd_value | (odd_target & is_trained))
    odd = None
    if len(at):
        token = values[at[0]] if odd_value[at[0]] else targets[at[0]]
        odd = (block.start + int(owner[at[0]]), int(token))

    is_start = np.ones(len(owner), bool)
    is_start[1:] = owner[1:] != owner[:-1]
    numbers = None if mask is None else _gather(mask, block)
    if numbers is not None:
        is_packed = np.zeros(len(lengths), bool)
        is_packed[owner[numbers > 1]] = True
        is_start[1:] |= (numbers[1:] != numbers[:-1]) & is_packed[owner[1:]]
    begins = np.flatnonzero(is_start)
    # A first token is never predicted: it does not count as trained.
    at = np.where(is_trained & ~is_start, np.arange(len(owner)), -1)
    last = np.maximum.reduceat(at, begins) if len(begins) else begins
    is_used = last >= 0
    if numbers is not None:
        is_used &= (numbers[begins] != 0) | ~is_packed[owner[begins]]
    begins, ends = begins[is_used], last[is_used] + 1
    sequence = owner[begins]
    offsets = begins - (np.cumsum(lengths) - lengths)[sequence]

    depth = np.zeros(len(owner) + 1, np.int8)
    depth[begins] += 1
    depth[ends] -= 1  # a segment may begin where another ends
    taken = np.cumsum(depth[:-1], dtype=np.int8) > 0
    for part, kind in ((ends - begins, "<i8"), (values[taken], "<i4"), (targets[taken], "<i4")):
        digest.update(np.ascontiguousarray(part, kind).tobytes())
    return StoredSamples(block.start + sequence, offsets, ends - begins, odd)


def _outside(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    return (tokens < 0) | (tokens >= vocab_size)


def _gather(file: IndexedFile, block: slice) -> np.ndarray:
    """All tokens of the block's sequences, one sequence after the other."""
    starts, lengths = file.starts[block].astype(np.int64), file.lengths[block].astype(np.int64)
    if not len(starts):
        return file.values[:0]
    if np.array_equal(starts[1:], (starts + lengths)[:-1]):
        return file.values[int(starts[0]) : int(starts[0]) + int(lengths.sum())]
    within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return file.values[np.repeat(starts, lengths) + within]
