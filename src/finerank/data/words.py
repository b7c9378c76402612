"""Words that were encoded before need not be encoded again: an exact cache in front of a byte-level BPE tokenizer.

    cache = WordCache.for_backend(tokenizer.backend_tokenizer)      None where the tokenizer is of another kind
    ids, lengths = cache.encode(["The quick brown fox", ...])

A byte-level BPE tokenizer first cuts a text into words by a fixed pattern and then encodes each word by itself. So the
ids of a text are those of its words, one after the other. All texts of a batch are cut at once (`cut`), each word is a
key of 128 bits, and one look-up finds the ids of all (`key_index`). Used only where that can be said for certain:

    the tokenizer's normalizer is none or NFC, its steps are known ones, and its words are cut by one of `cut.PATTERNS`;
    the text is of characters that `cut.KNOWN` lists: ASCII, Latin letters and common signs;
    added tokens inside the text are found as the tokenizer finds them: the leftmost, of these the longest.

All other texts go to the tokenizer. Words get their ids from the tokenizer itself, a probe of random texts is compared
before the cache is used at all, and one text in 512 is compared while it is used: a difference is a bug and stops.

Shapes: C characters, W words, T tokens.
"""

import hashlib
import itertools
import json
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from finerank.data import cut
from finerank.data.key_index import KeyIndex, first_of_equals

Ids = tuple[np.ndarray, np.ndarray]
"""int32, the ids of several texts, one text after the other; int64, how many each text has."""

_KNOWN = re.compile(f"[{cut.KNOWN}]*")
_MOST_WORDS = 200_000
_CHECK_EVERY = 512
_BATCH = 1 << 18
"""Characters worked on at once: their arrays stay in the processor's cache."""
_LONGEST_TEXT = 1 << 20

_KEY_BYTES = 16
_KEPT_BITS = np.array(  # [17, 2], for a word of so many bytes: which bits of its key count
    [[(1 << 8 * min(n, 8)) - 1, (1 << 8 * max(n - 8, 0)) - 1] for n in range(_KEY_BYTES + 1)], np.uint64
)


class WordCache:
    """Encodes texts word by word; see the module's docstring for when it may."""

    def __init__(self, backend: Any, pattern: str, added: Sequence[str]):
        self._backend = backend
        self._pattern = pattern
        self._added = re.compile("|".join(map(re.escape, added)) or r"(?!)")
        self._words = _Words(backend)
        self._count = 0

    @classmethod
    def for_backend(cls, backend: Any) -> "WordCache | None":
        """A cache that was compared with the tokenizer on random texts; None where it cannot be exact."""
        state = json.loads(backend.to_str())
        pattern = _pattern(state)
        added = state.get("added_tokens") or []
        plain = all(not t["lstrip"] and not t["rstrip"] and not t["single_word"] for t in added)
        contents = sorted((t["content"] for t in added), key=lambda t: (-len(t), t))
        if pattern is None or not plain or any("\0" in text for text in contents):
            return None
        cache = cls(backend, pattern, contents)
        probe = _probe()
        ids, lengths = cache._by_words(probe)
        expected, whole = flat_ids(cache._whole(probe))
        return cache if np.array_equal(ids, expected) and np.array_equal(lengths, whole) else None

    def encode(self, texts: Sequence[str]) -> Ids:
        """Ids of each text, equal to the tokenizer's without added special tokens."""
        other = [i for i, text in enumerate(texts) if not _is_known(text)]
        known = list(texts)
        for i in other:
            known[i] = ""
        batches = [self._by_words(batch) for batch in _batches(known)]
        found = np.concatenate([np.zeros(0, np.int32), *(ids for ids, _ in batches)])
        lengths = np.concatenate([np.zeros(0, np.int64), *(lengths for _, lengths in batches)])
        self._check(known, found, lengths)
        whole = self._whole([texts[i] for i in other]) if other else []
        return put_in((found, lengths), dict(zip(other, whole, strict=True)))

    def _by_words(self, texts: Sequence[str]) -> Ids:
        if len(self._words) > _MOST_WORDS or len(self._words.ids) > 16 * _MOST_WORDS:
            self._words = _Words(self._backend)
        joined = "\0".join(["", *texts, ""])
        data = joined.encode() + bytes(_KEY_BYTES)
        if is_ascii := joined.isascii():
            points_C = np.frombuffer(data, np.uint8, len(joined))
        else:
            points_C = np.frombuffer(joined.encode("utf-16-le"), "<u2")
        starts_W = self._word_starts(joined, points_C)
        num_bytes = len(joined)
        if not is_ascii:
            widths = (1 + (points_C >= 0x80) + (points_C >= 0x800)).astype(np.int64)
            ends = np.cumsum(widths)
            starts_W, num_bytes = (ends - widths)[starts_W], int(ends[-1])
        number_W = self._words.find(data, starts_W, np.diff(starts_W, append=num_bytes))
        ids, ends_W = self._words.ids_of(number_W)
        return ids, np.diff(ends_W[number_W == _SEPARATOR])

    def _word_starts(self, joined: str, points_C: np.ndarray) -> np.ndarray:
        """Where words, added tokens and separators begin, in characters."""
        classes_C = cut.classes_of(points_C)
        spans = np.array([match.span() for match in self._added.finditer(joined)], np.int64).reshape(-1, 2)
        for start, end in spans.tolist():
            classes_C[start:end] = cut.EDGE
        begins_C = cut.word_begins(self._pattern, points_C, classes_C)
        separators = np.flatnonzero(points_C == 0)
        begins_C[separators] = True
        begins_C[separators[:-1] + 1] = True
        begins_C[spans] = True
        return np.flatnonzero(begins_C)

    def _whole(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _check(self, texts: Sequence[str], ids: np.ndarray, lengths: np.ndarray) -> None:
        before, self._count = self._count, self._count + len(texts)
        picked = range(-before % _CHECK_EVERY, len(texts), _CHECK_EVERY)
        ends = np.cumsum(lengths)
        for i, whole in zip(picked, self._whole([texts[i] for i in picked]), strict=True):
            found = ids[ends[i] - lengths[i] : ends[i]].tolist()
            assert whole == found, f"the word cache differs from the tokenizer on {texts[i]!r}"


_SEPARATOR = 0


class _Words:
    """Words by number, and their ids, asked of the tokenizer at first sight."""

    def __init__(self, backend: Any):
        self._backend = backend
        self._index = KeyIndex()
        self._index.add(np.zeros((1, 2), np.uint64))  # the separator, which has no ids
        self._starts, self._counts = np.zeros((2, 1), np.int64)
        self.ids = np.zeros(0, np.int32)

    def __len__(self) -> int:
        return len(self._index)

    def find(self, data: bytes, starts_W: np.ndarray, lengths_W: np.ndarray) -> np.ndarray:
        """int64 [W], the number of each word of `data`, which has 16 bytes more than the words."""
        keys_W2 = _keys(data, starts_W, lengths_W)
        number_W = self._index.find(keys_W2)
        missing = np.flatnonzero(number_W < 0)
        if len(missing):
            first, which = first_of_equals(keys_W2[missing])
            new = missing[first]
            spans = zip(starts_W[new].tolist(), lengths_W[new].tolist(), strict=True)
            number_W[missing] = len(self) + which
            self._index.add(keys_W2[new])
            self._learn([data[start : start + length].decode() for start, length in spans])
        return number_W

    def ids_of(self, number_W: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int32 [T], the ids of words one after the other; int64 [W], where in it each word's ids end."""
        counts_W = self._counts[number_W]
        ends_W = np.cumsum(counts_W)
        shift = np.repeat(self._starts[number_W] - (ends_W - counts_W), counts_W)
        return self.ids[shift + np.arange(len(shift))], ends_W

    def _learn(self, words: Sequence[str]) -> None:
        encoded = self._backend.encode_batch_fast(words, add_special_tokens=False)
        ids, counts = flat_ids([encoding.ids for encoding in encoded])
        self._starts = np.append(self._starts, len(self.ids) + np.cumsum(counts) - counts)
        self._counts = np.append(self._counts, counts)
        self.ids = np.append(self.ids, ids)


def _keys(data: bytes, starts_W: np.ndarray, lengths_W: np.ndarray) -> np.ndarray:
    """uint64 [W, 2]: the bytes of each word, zeros after them; of a longer word, a hash of 128 bits."""
    eights = np.ascontiguousarray(np.ndarray(len(data) - 7, "<u8", data, strides=(1,)))  # eight bytes from each on
    keys_W2 = np.stack([eights[starts_W], eights[starts_W + 8]], axis=1)
    keys_W2 &= _KEPT_BITS[np.minimum(lengths_W, _KEY_BYTES)]
    for i in np.flatnonzero(lengths_W > _KEY_BYTES).tolist():
        word = data[starts_W[i] : starts_W[i] + lengths_W[i]]
        keys_W2[i] = np.frombuffer(hashlib.blake2b(word, digest_size=_KEY_BYTES).digest(), np.uint64)
    return keys_W2


def flat_ids(ids: Sequence[Sequence[int]]) -> Ids:
    """Lists of ids as arrays."""
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths


def put_in(ids: Ids, others: Mapping[int, Sequence[int]]) -> Ids:
    """The ids with those of some texts, which have none yet, put into their places."""
    flat, lengths = ids
    if not others:
        return ids
    lengths = lengths.copy()
    ends = np.cumsum(lengths)
    pieces, at = [], 0
    for i in sorted(others):
        assert lengths[i] == 0
        pieces += [flat[at : ends[i]], np.array(others[i], np.int32)]
        at = ends[i]
        lengths[i] = len(others[i])
    return np.concatenate([*pieces, flat[at:]]), lengths


def _is_known(text: str) -> bool:
    known = text.isascii() or _KNOWN.fullmatch(text) is not None
    return known and len(text) <= _LONGEST_TEXT and "\0" not in text


def _batches(texts: Sequence[str]) -> list[list[str]]:
    batches: list[list[str]] = []
    room = 0
    for text in texts:
        if len(text) > room:
            batches.append([])
            room = _BATCH
        batches[-1].append(text) if batches else batches.append([text])
        room -= len(text)
    return batches


def _pattern(state: dict[str, Any]) -> str | None:
    """The pattern that cuts texts into words; None for a tokenizer of another kind."""
    normalizer, model = state.get("normalizer"), state.get("model") or {}
    if (normalizer or {}).get("type") not in (None, "NFC") or model.get("type") != "BPE" or model.get("dropout"):
        return None
    step = state.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", []) if step.get("type") == "Sequence" else [step]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    by_regex, first = steps[-1].get("use_regex", True), steps[:-1]
    if by_regex and not first:
        return cut.GPT2
    if by_regex and len(first) == 1 and first[0] == {"type": "Digits", "individual_digits": True}:
        return cut.GPT2_DIGITS
    if not by_regex and len(first) == 1 and first[0].get("type") == "Split":
        spelled = first[0].get("pattern", {}).get("Regex")
        isolated = first[0].get("behavior") == "Isolated" and not first[0].get("invert")
        return spelled if isolated and spelled in cut.PATTERNS else None
    return None


def _probe() -> list[str]:
    """Random texts in which words, numbers, signs and all kinds of white space meet."""
    draw = random.Random(0)
    parts = [chr(i) for i in range(0x2200) if _KNOWN.fullmatch(chr(i))]
    parts += ["the", "It's", "I'LL", "don't", " 've", "2024", "3.14", "  ", "\n\n", "\r\n"]
    parts += [chr(i) for i in range(1, 128)] * 4 + [" "] * 60
    parts += ["word", "Word", "x", ", ", ". ", "!?", "\t", " \n", "  a", "' s"]
    return ["".join(draw.choice(parts) for _ in range(draw.randrange(1, 60))) for _ in range(800)]
