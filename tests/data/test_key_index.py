"""KeyIndex does what a dictionary does, KeySet what a set does."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from finerank.data.key_index import KeyIndex, KeySet, first_of_equals

KEYS = st.lists(st.tuples(st.integers(0, 5) | st.integers(0, 2**64 - 1), st.sampled_from([0, 1, 2**63])), max_size=40)


def array(keys: list[tuple[int, int]]) -> np.ndarray:
    return np.array(keys, np.uint64).reshape(-1, 2)


@settings(max_examples=200, deadline=None)
@given(st.lists(KEYS, max_size=6))
def test_index_equals_a_dictionary(batches: list[list[tuple[int, int]]]):
    index, expected = KeyIndex(bits=3), {}
    for keys in batches:
        fresh = [key for key in dict.fromkeys(keys) if key not in expected]
        assert index.find(array(fresh)).tolist() == [-1] * len(fresh)
        index.add(array(fresh))
        expected.update(zip(fresh, range(len(expected), len(expected) + len(fresh)), strict=True))
        assert len(index) == len(expected)
    everything = [key for keys in batches for key in keys] + [(7, 7), (0, 0), (2**64 - 1, 0)]
    assert index.find(array(everything)).tolist() == [expected.get(key, -1) for key in everything]


@settings(max_examples=200, deadline=None)
@given(st.lists(KEYS.map(lambda keys: [key for key in keys if any(key)]), max_size=6))
def test_set_equals_a_set(batches: list[list[tuple[int, int]]]):
    seen, expected = KeySet(places=3), set()
    for keys in batches:
        new = []
        for key in keys:
            new.append(key not in expected)
            expected.add(key)
        assert seen.add_new(array(keys)).tolist() == new
        assert len(seen) == len(expected)


@settings(max_examples=200, deadline=None)
@given(KEYS)
def test_first_of_equals(keys: list[tuple[int, int]]):
    first, which = first_of_equals(array(keys))
    distinct = list(dict.fromkeys(keys))
    assert [keys[i] for i in first] == distinct
    assert [distinct[i] for i in which] == keys


def test_a_million_keys():
    keys = np.arange(2_000_000, dtype=np.uint64).reshape(-1, 2)  # neighbours, as counters are
    index = KeyIndex()
    for start in range(0, len(keys), 100_000):
        index.add(keys[start : start + 100_000])
    assert np.array_equal(index.find(keys), np.arange(len(keys)))
    assert (index.find(keys + np.uint64(1)) < 0).all()


def test_a_set_of_a_million_keys_is_small():
    keys = np.arange(2, 2_000_002, dtype=np.uint64).reshape(-1, 2)
    seen = KeySet()
    for start in range(0, len(keys), 50_000):
        assert seen.add_new(keys[start : start + 50_000]).all()
    assert not seen.add_new(keys).any() and len(seen) == len(keys)
    assert seen._keys.nbytes < 29 * len(keys)
