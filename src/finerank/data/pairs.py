"""`PairDataset`: samples of a chosen and a rejected answer to one prompt, for preference tuning.

    data = PairDataset(chosen, rejected)          two TokenDatasets, sample by sample
    (chosen, rejected) = data.sequences(0)        (ids, labels) of each; prompt tokens are not trained

A pair is one sample of a batch plan: its two sequences always lie in the same micro-batch, the chosen one first, and
its length is that of both.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from finerank.data.tokens import TokenDataset
from finerank.data.truncate import EncodedTurn, newer_rule

EQUAL_ANSWERS = "the chosen and the rejected answer are equal"


class PairDataset:
    """Pairs by number.

    Attributes:
        lengths: int64 [N], tokens of both sequences of each pair.
        trained_lengths: int64 [N], tokens of both answers.
        digest: hex SHA-256 of all ids and labels in order.
        reference: fp32 [N, 2], log-probabilities of chosen and rejected under the reference model, once known.
    """

    def __init__(self, chosen: TokenDataset, rejected: TokenDataset, *, reference: np.ndarray | None = None):
        """Args: the chosen and the rejected sequences, pair by pair, and `reference` where it is known."""
        assert len(chosen) == len(rejected)
        self.chosen, self.rejected, self.reference = chosen, rejected, reference
        self.lengths = chosen.lengths + rejected.lengths
        self.trained_lengths = chosen.trained_lengths + rejected.trained_lengths
        self.digest = hashlib.sha256(f"pairs {chosen.digest} {rejected.digest}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.chosen)

    def sequences(self, i: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, labels) of the chosen and of the rejected sequence."""
        return [*self.chosen.sequences(i), *self.rejected.sequences(i)]

    def subset(self, indices: np.ndarray) -> "PairDataset":
        """The pairs with these numbers, in this order; a number may come again."""
        reference = None if self.reference is None else self.reference[indices]
        return PairDataset(self.chosen.subset(indices), self.rejected.subset(indices), reference=reference)

    def with_reference(self, reference: np.ndarray) -> "PairDataset":
        """The same pairs with the reference model's log-probabilities, fp32 [N, 2]."""
        assert reference.shape == (len(self), 2) and reference.dtype == np.float32
        return PairDataset(self.chosen, self.rejected, reference=reference)

    @classmethod
    def concat(cls, parts: Sequence["PairDataset"]) -> "PairDataset":
        """All pairs of the parts, in order."""
        if len(parts) == 1:
            return parts[0]
        chosen, rejected = [part.chosen for part in parts], [part.rejected for part in parts]
        return cls(TokenDataset.concat(chosen), TokenDataset.concat(rejected))


Samples = TokenDataset | PairDataset
"""What a batch plan draws from."""


def fit_pair(turns: Sequence[list[EncodedTurn]], limit: int) -> tuple[list[list[EncodedTurn]], bool]:
    """Both samples of a pair cut to `limit` tokens, and whether anything was cut; they keep the same prompt.

    The longer answer decides how much of the prompt is kept, as in LLaMA-Factory: answers to prompts that were cut
    differently could not be compared.
    """
    pair = [turn for (turn,) in turns]
    longest = max(len(turn.target) for turn in pair)
    num_source = max(len(turn.source) for turn in pair)
    if num_source + longest <= limit:
        return list(turns), False
    source, target = newer_rule(num_source, longest, limit)
    return [[EncodedTurn(t.source[:source], t.target[:target], t.trained)] for t in pair], True
