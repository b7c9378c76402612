"""A dictionary of 128-bit keys, asked for many keys at once.

    index = KeyIndex()
    index.add(keys_N2)                      numbers the keys 0, 1, 2, ... in order
    index.find(keys_N2)                     int64 [N]: the number of each key, -1 where it is not there

Python's dictionary takes about a third of a microsecond for each word of a text and a hundred bytes for each row's
hash; this one takes a tenth of that. It is an open-addressing table in numpy arrays, each probe one step for all keys
that are not yet decided.

Shapes: N keys, two uint64 each.
"""

import numpy as np

_MIX_LOW, _MIX_HIGH, _MIX = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93))
_HALF = np.uint64(32)
_MOST_FULL = 0.7
"""Of the table's places; beyond that probes become long. A key takes 29 to 57 bytes."""


class KeyIndex:
    """Keys numbered in the order in which they were added."""

    def __init__(self, bits: int = 12):
        """Args: bits: the table begins with 2 ** bits places."""
        self._resize(bits)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def find(self, keys_N2: np.ndarray) -> np.ndarray:
        """int64 [N], the number of each key; -1 where it was never added."""
        place = self._home(keys_N2)
        number = self._number[place]
        same = _same(self._keys[place], keys_N2)
        out = np.where(same, number, -1).astype(np.int64)
        left = np.flatnonzero(~same & (number >= 0))  # another key is there: look at the next place
        place = place[left]
        while len(left):
            place = (place + 1) & self._mask
            number = self._number[place]
            same = _same(self._keys[place], keys_N2[left])
            out[left[same]] = number[same]
            on = ~same & (number >= 0)
            left, place = left[on], place[on]
        return out

    def add(self, keys_N2: np.ndarray) -> None:
        """Add keys that differ from one another and from all that are there."""
        bits = self._bits
        while self._count + len(keys_N2) > _MOST_FULL * (1 << bits):
            bits += 1
        if bits != self._bits:
            full = np.flatnonzero(self._number >= 0)
            keys, numbers = self._keys[full], self._number[full]
            self._resize(bits)
            self._place(keys, numbers)
        self._place(keys_N2, np.arange(self._count, self._count + len(keys_N2)))
        self._count += len(keys_N2)

    def add_new(self, keys_N2: np.ndarray) -> np.ndarray:
        """Add the keys that are not there yet; bool [N], whether a key was new (of equal ones, the first)."""
        is_new = self.find(keys_N2) < 0
        candidates = np.flatnonzero(is_new)
        first = candidates[first_of_equals(keys_N2[candidates])[0]]
        is_new[:] = False
        is_new[first] = True
        self.add(keys_N2[first])
        return is_new

    def _resize(self, bits: int) -> None:
        self._bits = bits
        self._mask = (1 << bits) - 1
        self._shift = np.uint64(64 - bits)
        self._keys = np.zeros((1 << bits, 2), np.uint64)
        self._number = np.full(1 << bits, -1, np.int32)

    def _home(self, keys_N2: np.ndarray) -> np.ndarray:
        mixed = keys_N2[:, 0] * _MIX_LOW ^ keys_N2[:, 1] * _MIX_HIGH
        mixed ^= mixed >> _HALF
        mixed *= _MIX
        return (mixed >> self._shift).astype(np.int64)

    def _place(self, keys_N2: np.ndarray, numbers: np.ndarray) -> None:
        place = self._home(keys_N2)
        while len(numbers):
            free = self._number[place] < 0
            self._number[place[free]] = numbers[free]  # of several at one place, the last one stays
            won = free & (self._number[place] == numbers)
            self._keys[place[won]] = keys_N2[won]
            on = ~won
            keys_N2, numbers, place = keys_N2[on], numbers[on], (place[on] + 1) & self._mask


def first_of_equals(keys_N2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted positions at which each distinct key stands first; and for each key, which of these it equals."""
    order = np.lexsort((keys_N2[:, 1], keys_N2[:, 0]))  # stable: equal keys stay in their order
    ordered = keys_N2[order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = ~_same(ordered[1:], ordered[:-1])
    group = np.cumsum(is_first) - 1
    rank = np.argsort(np.argsort(order[is_first]))
    inverse = np.empty(len(order), np.int64)
    inverse[order] = rank[group]
    return np.sort(order[is_first]), inverse


def _same(a_N2: np.ndarray, b_N2: np.ndarray) -> np.ndarray:
    same: np.ndarray = (a_N2[:, 0] == b_N2[:, 0]) & (a_N2[:, 1] == b_N2[:, 1])
    return same
