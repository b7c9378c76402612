"""Samples of indexed files found in blocks are those that a loop over sequences finds, whatever the blocks."""

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finerank.data import stored
from finerank.data.indexed import IndexedFile, IndexedWriter
from finerank.data.stored import read_samples

token = st.tuples(st.integers(0, 9), st.booleans(), st.integers(0, 3))
rows = st.lists(st.lists(token, max_size=9), max_size=9)


def write(folder: Path, name: str, sequences: list[list[int]]) -> IndexedFile:
    with IndexedWriter(folder / name) as writer:
        for values in sequences:
            writer.add(np.array(values, np.int32), np.array([len(values)]))
    return IndexedFile(folder / name)


def one_by_one(ids: IndexedFile, labels: IndexedFile, mask: IndexedFile | None) -> list[tuple[int, int, int]]:
    found = []
    for i in range(len(ids)):
        bounds, numbers = [0, len(ids[i])], None
        if mask is not None and len(mask[i]) and mask[i].max() > 1:
            numbers = mask[i].tolist()
            bounds = [0, *(k for k in range(1, len(numbers)) if numbers[k] != numbers[k - 1]), len(numbers)]
        for start, end in itertools.pairwise(bounds):
            trained = [k for k in range(start + 1, end) if labels[i][k] != -100]
            if trained and (numbers is None or numbers[start] != 0):
                found.append((i, start, trained[-1] + 1 - start))
    return found


@settings(max_examples=150, deadline=None)
@given(rows, st.booleans(), st.sampled_from([1, 5, 1000]))
def test_blocks_find_what_a_loop_finds(tmp_path_factory: pytest.TempPathFactory, rows: list, packed: bool, block: int):
    folder = tmp_path_factory.mktemp("stored")
    ids = write(folder, "ids", [[t for t, _, _ in row] for row in rows])
    labels = write(folder, "labels", [[t if trained else -100 for t, trained, _ in row] for row in rows])
    mask = write(folder, "mask", [[n for _, _, n in row] for row in rows]) if packed else None
    digest = hashlib.sha256()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "BLOCK_TOKENS", block)
        blocks = list(read_samples(ids, labels, mask, vocab_size=10, digest=digest))
    found = [s for b in blocks for s in zip(b.sequence.tolist(), b.offsets.tolist(), b.lengths.tolist(), strict=True)]
    assert found == one_by_one(ids, labels, mask)
    assert all(b.odd is None for b in blocks)


def digest_of(folder: Path, ids: list[list[int]], labels: list[list[int]], mask: list[list[int]] | None = None) -> str:
    files = write(folder, "i", ids), write(folder, "l", labels), write(folder, "m", mask) if mask else None
    digest = hashlib.sha256()
    assert list(read_samples(*files, vocab_size=10, digest=digest))
    return digest.hexdigest()


def test_the_digest_is_that_of_what_is_used(tmp_path: Path):
    plain = digest_of(tmp_path, [[1, 2], [3, 4, 5]], [[-100, 2], [-100, 4, 5]])
    padded = digest_of(tmp_path, [[1, 2, 0, 0], [3, 4, 5]], [[-100, 2, -100, -100], [-100, 4, 5]])
    packed = digest_of(tmp_path, [[1, 2, 3, 4, 5, 0]], [[-100, 2, -100, 4, 5, -100]], [[1, 1, 2, 2, 2, 0]])
    assert plain == padded == packed
    assert plain != digest_of(tmp_path, [[1, 2], [3, 4, 5]], [[-100, 2], [-100, -100, 5]])
    assert plain != digest_of(tmp_path, [[1, 2, 3, 4, 5]], [[-100, 2, -100, 4, 5]])


@pytest.mark.parametrize(("ids", "labels", "odd"), [([3, 10, -1], [3, 3, 3], 10), ([3, 4, 4], [3, -100, 11], 11)])
def test_the_first_odd_token_is_named(tmp_path: Path, ids: list[int], labels: list[int], odd: int):
    files = write(tmp_path, "i", [[1, 1], ids]), write(tmp_path, "l", [[1, 1], labels])
    [block] = read_samples(*files, None, vocab_size=10, digest=hashlib.sha256())
    assert block.odd == (1, odd)
