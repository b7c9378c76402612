"""Indexed files: round trips, damaged bytes, and packing."""

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finerank.data import indexed
from finerank.data.indexed import IndexedFile, IndexedWriter, bin_path, idx_path
from finerank.data.packing import best_fit, even_fit, knapsack
from finerank.errors import DataError


def write(prefix: Path, sequences: list[list[int]], code: int = 4) -> Path:
    with IndexedWriter(prefix, code=code) as writer:
        for sequence in sequences:
            writer.add(np.array(sequence, np.int32), np.array([len(sequence)], np.int64))
    return prefix


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.integers(-100, 60000), max_size=9), max_size=9))
def test_what_is_written_is_read(tmp_path: Path, sequences: list[list[int]]):
    file = IndexedFile(write(tmp_path / "a", sequences))
    assert [file[i].tolist() for i in range(len(file))] == sequences
    assert file.boundaries.tolist() == list(range(len(sequences) + 1))


def test_layout_is_the_documented_one(tmp_path: Path):
    raw = idx_path(write(tmp_path / "a", [[1, 2], [3]])).read_bytes()
    assert raw == (b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, 2, 3) + struct.pack("<2i2q3q", 2, 1, 0, 8, 0, 1, 2))
    assert bin_path(tmp_path / "a").read_bytes() == struct.pack("<3i", 1, 2, 3)


def test_an_index_of_several_blocks_and_documents_without_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(indexed, "_BLOCK", 3)
    sequences = [[i] * (i % 4) for i in range(11)]
    with IndexedWriter(tmp_path / "a") as writer:
        for part, boundaries in ((sequences[:4], [1, 1, 2, 4]), ([], [0]), (sequences[4:], [7])):
            flat = np.array([value for sequence in part for value in sequence], np.int32)
            writer.add(flat, np.array(list(map(len, part)), np.int64), boundaries=np.array(boundaries))
    file = IndexedFile(tmp_path / "a")
    assert [file[i].tolist() for i in range(len(file))] == sequences
    assert file.boundaries.tolist() == [0, 1, 1, 2, 4, 4, 11]
    assert {path.name for path in tmp_path.iterdir()} == {"a.bin", "a.idx"}


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 500), st.integers(0, 255), st.integers(0, 80))
def test_damaged_bytes_are_refused_or_harmless(tmp_path: Path, at: int, value: int, cut: int):
    prefix = write(tmp_path / "a", [[1, 2, 3], [4], [], [5, 6]])
    raw = bytearray(idx_path(prefix).read_bytes())
    if cut:
        raw = raw[:-cut]
    raw[at % len(raw)] = value
    idx_path(prefix).write_bytes(bytes(raw))
    try:
        file = IndexedFile(prefix)
    except DataError as error:
        assert str(tmp_path) in str(error)
    else:
        for i in range(len(file)):
            assert len(file[i]) == file.lengths[i]


def test_a_short_bin_is_named(tmp_path: Path):
    prefix = write(tmp_path / "a", [[1, 2, 3], [4]])
    bin_path(prefix).write_bytes(bin_path(prefix).read_bytes()[:-4])
    with pytest.raises(DataError, match=r"a\.bin is shorter \(12 bytes\)"):
        IndexedFile(prefix)
    bin_path(prefix).unlink()
    with pytest.raises(DataError, match=r"Cannot read"):
        IndexedFile(prefix)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 120), max_size=60), st.integers(100, 150))
def test_packs_hold_every_sample_once_and_fit(lengths: list[int], capacity: int):
    for most in (None, 3):
        packs = best_fit(lengths, capacity, most=most)
        assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
        for pack in packs:
            assert sum(lengths[i] for i in pack) <= capacity or len(pack) == 1
            assert most is None or len(pack) <= most
        even = even_fit(lengths, capacity, most=most)
        assert sorted(i for pack in even for i in pack) == list(range(len(lengths)))
        assert len(even) == len(packs)
        assert most is None or all(len(pack) <= most for pack in even)
        tokens, tokens_even = ([sum(lengths[i] for i in pack) for pack in rows] for rows in (packs, even))
        assert max(tokens_even, default=0) <= max(tokens, default=0)
    short = [n for n in lengths if n <= capacity]
    packs = knapsack(short, capacity)
    assert sorted(i for pack in packs for i in pack) == list(range(len(short)))
    assert all(sum(short[i] for i in pack) <= capacity for pack in packs)


def test_an_even_fit_evens_out():
    assert best_fit([6, 5, 4, 3, 2], 15) == [[0, 1, 2], [3, 4]]
    assert even_fit([6, 5, 4, 3, 2], 15) == [[0, 3, 4], [1, 2]]


def test_knapsack_takes_the_largest_that_fits_and_the_last_of_equals():
    assert knapsack([3, 5, 5, 2, 7], 10) == [[4, 0], [2, 1], [3]]
