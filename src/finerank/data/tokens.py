"""`TokenDataset`: samples as ids and labels over memory-mapped files; subsets and joins copy no tokens."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finerank.data.indexed import let_go
from finerank.data.truncate import cut_sample
from finerank.data.types import IGNORE_INDEX

_READS_KEPT = 4
"""Samples read before mapped pages are given back: for one of them Linux may map 2 MiB of each of two files.

Giving back at each fourth costs 12 microseconds a sample."""


@dataclass(frozen=True)
class Source:
    """Two flat arrays of tokens, usually memory-mapped."""

    ids: np.ndarray
    labels: np.ndarray


class TokenDataset:
    """Samples by number.

    Attributes:
        lengths: int64 [N], tokens of each sample.
        trained_lengths: int64 [N], tokens of each sample that the loss counts (a first token is never predicted).
        digest: hex SHA-256 of all ids and labels in order.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        source: np.ndarray,
        id_starts: np.ndarray,
        label_starts: np.ndarray,
        stored_lengths: np.ndarray,
        *,
        longest: int,
        trained_lengths: np.ndarray | None = None,
        digest: str = "",
    ):
        """Args: where each sample's ids and labels begin in which source, how long they are stored, and the length in
        tokens to which longer ones are cut when they are read."""
        self._sources = list(sources)
        self._source, self._id_starts, self._label_starts = source, id_starts, label_starts
        self._stored = stored_lengths
        self._longest, self._num_read = longest, 0
        self.lengths = np.minimum(stored_lengths, longest)
        self.trained_lengths = self._count_trained() if trained_lengths is None else trained_lengths
        self.digest = digest

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, i: int) -> np.ndarray:
        """int32 [T], the sample's token ids."""
        return self._pair(i)[0]

    def labels(self, i: int) -> np.ndarray:
        """int32 [T], unshifted: the id to be predicted at its own position, -100 where nothing is trained."""
        return self._pair(i)[1]

    def sequences(self, i: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, labels) of each sequence that the sample puts into a batch: one."""
        return [self._pair(i)]

    def subset(self, indices: np.ndarray) -> "TokenDataset":
        """The samples with these numbers, in this order; a number may come again."""
        if len(indices) == len(self) and (indices == np.arange(len(self))).all():
            return self
        told = self.digest.encode() + np.ascontiguousarray(indices, "<i8").tobytes()
        return TokenDataset(
            self._sources,
            self._source[indices],
            self._id_starts[indices],
            self._label_starts[indices],
            self._stored[indices],
            longest=self._longest,
            trained_lengths=self.trained_lengths[indices],
            digest=hashlib.sha256(told).hexdigest(),
        )

    @classmethod
    def concat(cls, parts: Sequence["TokenDataset"]) -> "TokenDataset":
        """All samples of the parts, in order. They must be cut to the same length."""
        if len(parts) == 1:
            return parts[0]
        assert len({part._longest for part in parts}) == 1
        offsets = np.cumsum([0] + [len(part._sources) for part in parts[:-1]])
        return cls(
            [source for part in parts for source in part._sources],
            np.concatenate([part._source + offset for part, offset in zip(parts, offsets, strict=True)]),
            np.concatenate([part._id_starts for part in parts]),
            np.concatenate([part._label_starts for part in parts]),
            np.concatenate([part._stored for part in parts]),
            longest=parts[0]._longest,
            trained_lengths=np.concatenate([part.trained_lengths for part in parts]),
            digest=hashlib.sha256(" ".join(part.digest for part in parts).encode()).hexdigest(),
        )

    def _pair(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        self._num_read += 1
        if self._num_read % _READS_KEPT == 0:
            let_go(*(array for each in self._sources for array in (each.ids, each.labels)))
        source = self._sources[self._source[i]]
        stored = int(self._stored[i])
        ids = source.ids[self._id_starts[i] : self._id_starts[i] + stored].astype(np.int32)
        labels = source.labels[self._label_starts[i] : self._label_starts[i] + stored].astype(np.int32)
        return cut_sample(ids, labels, self._longest) if stored > self._longest else (ids, labels)

    def _count_trained(self) -> np.ndarray:
        counts = np.zeros(len(self), np.int64)
        for number, source in enumerate(self._sources):
            own = np.flatnonzero(self._source == number)
            counts[own] = count_trained(source.labels, self._label_starts[own], self._stored[own])
        for i in np.flatnonzero(self._stored > self._longest):
            counts[i] = int((self.labels(int(i))[1:] != IGNORE_INDEX).sum())
        return counts


def count_trained(labels: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """How many labels after the first one are not -100, for each sample; reads a block of samples at a time."""
    counts = np.zeros(len(starts), np.int64)
    for begin in range(0, len(starts), 4096):
        block = slice(begin, begin + 4096)
        low = int(starts[block].min())
        high = int((starts[block] + lengths[block]).max())
        if high - low > 4 * int(lengths[block].sum()) + 4096:  # scattered: reading the whole range would not pay
            pairs = zip(starts[block], lengths[block], strict=True)
            counts[block] = [int((labels[s + 1 : s + n] != IGNORE_INDEX).sum()) for s, n in pairs]
            let_go(labels)
            continue
        before = np.zeros(high - low + 1, np.int64)
        np.cumsum(labels[low:high] != IGNORE_INDEX, out=before[1:])
        first = np.minimum(starts[block] + 1, starts[block] + lengths[block]) - low
        counts[block] = before[starts[block] + lengths[block] - low] - before[first]
        let_go(labels)
    return counts
