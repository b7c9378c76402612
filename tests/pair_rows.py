"""Pairs of answers made of numbers, for tests of losses over them."""

import numpy as np

from finerank.data.pairs import PairDataset
from finerank.data.tokens import Source, TokenDataset


def pair_rows(num: int, *, vocab: int = 200) -> PairDataset:
    """Pairs with a prompt of 12 to 15 tokens and answers of 3 to 9."""
    sides: list[list[tuple[np.ndarray, np.ndarray]]] = [[], []]
    for i in range(num):
        draw = np.random.default_rng(i)
        prompt = draw.integers(3, vocab, 12 + i % 4)
        for n, side in enumerate(sides):
            answer = draw.integers(3, vocab, 3 + (3 * i + 2 * n) % 7)
            ids = np.concatenate([prompt, answer]).astype(np.int32)
            labels = np.concatenate([np.full(len(prompt), -100), answer]).astype(np.int32)
            side.append((ids, labels))
    return PairDataset(*(_dataset(side) for side in sides))


def _dataset(sequences: list[tuple[np.ndarray, np.ndarray]]) -> TokenDataset:
    lengths = np.array([len(ids) for ids, _ in sequences], np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    ids, labels = (np.concatenate([s[n] for s in sequences]) for n in range(2))
    return TokenDataset(
        [Source(ids, labels)], np.zeros_like(starts), starts, starts, lengths, longest=int(lengths.max())
    )
