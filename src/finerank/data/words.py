"""Words that were encoded before need not be encoded again: an exact cache in front of a byte-level BPE tokenizer.

    cache = WordCache.for_backend(tokenizer.backend_tokenizer)      None where the tokenizer is of another kind
    ids = cache.encode(["The quick brown fox"])

A byte-level BPE tokenizer first cuts a text into words by a fixed pattern and then encodes each word by itself. So the
ids of a text are those of its words, one after the other, and a dictionary of words gives them several times faster
than the whole machinery. Used only where that can be said for certain:

    the tokenizer's normalizer is none or NFC, its steps are known ones, and its words are cut by GPT-2's pattern, after
    single digits where it says so, or by a pattern that its file spells out;
    the text is of ASCII, Latin letters and common signs: characters that every Unicode version classes the same, and
    that NFC leaves alone;
    the text holds no added token.

All other texts go to the tokenizer. Words get their ids from the tokenizer itself, a probe of random texts is compared
before the cache is used at all, and one text in 64 is compared while it is used: a difference is a bug and stops.
"""

import itertools
import json
import random
import re
from typing import Any

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits are cut off first, so a word ends before one as it does at the end of the text.
_GPT2_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

_KNOWN = re.compile("[\x00-\x7f\xa1-\xac\xae-\u017f\u2010-\u2015\u2018-\u201f\u2020-\u2022\u2026\u2030\u20ac\u2122]*")

_MOST_WORDS = 200_000
_LONGEST_WORD = 64
_CHECK_EVERY = 64


class _Words(dict[str, list[int]]):
    """Word -> its ids, asked of the tokenizer at first sight."""

    def __init__(self, backend: Any):
        super().__init__()
        self._backend = backend

    def __missing__(self, word: str) -> list[int]:
        ids = self._backend.encode(word, add_special_tokens=False).ids
        if len(word) <= _LONGEST_WORD:
            if len(self) >= _MOST_WORDS:
                self.clear()
            self[word] = ids
        return ids


class WordCache:
    """Encodes texts word by word; see the module's docstring for when it may."""

    def __init__(self, backend: Any, pattern: Any, added: list[str]):
        self._backend = backend
        self._find = pattern.findall
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
        if pattern is None or not plain:
            return None
        contents = sorted((t["content"] for t in added), key=lambda t: (-len(t), t))
        cache = cls(backend, pattern, contents)
        probe = _probe()
        return cache if [cache._ids(text) for text in probe] == cache._whole(probe) else None

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, equal to the tokenizer's without added special tokens."""
        rest = [i for i, text in enumerate(texts) if not (text.isascii() or _KNOWN.fullmatch(text))]
        if not rest:
            found = list(map(self._ids, texts))
        else:
            whole = dict(zip(rest, self._whole([texts[i] for i in rest]), strict=True))
            found = [whole[i] if i in whole else self._ids(text) for i, text in enumerate(texts)]
        self._check(texts, found)
        return found

    def _ids(self, text: str) -> list[int]:
        words = self._find(text) if self._added.search(text) is None else self._cut(text)
        return list(itertools.chain.from_iterable(map(self._words.__getitem__, words)))

    def _cut(self, text: str) -> list[str]:
        """The words and added tokens of a text, in order."""
        words: list[str] = []
        at = 0
        for match in self._added.finditer(text):
            words += self._find(text[at : match.start()])
            words.append(match[0])
            at = match.end()
        return words + self._find(text[at:])

    def _whole(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _check(self, texts: list[str], found: list[list[int]]) -> None:
        before, self._count = self._count, self._count + len(texts)
        picked = range(-before % _CHECK_EVERY, len(texts), _CHECK_EVERY)
        for i, ids in zip(picked, self._whole([texts[i] for i in picked]), strict=True):
            assert ids == found[i], f"the word cache differs from the tokenizer on {texts[i]!r}"


def _pattern(state: dict[str, Any]) -> Any:
    """The compiled pattern that cuts texts into words; None for a tokenizer of another kind."""
    normalizer, model = state.get("normalizer"), state.get("model") or {}
    if (normalizer or {}).get("type") not in (None, "NFC") or model.get("type") != "BPE" or model.get("dropout"):
        return None
    step = state.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", []) if step.get("type") == "Sequence" else [step]
    if not steps or steps[-1].get("type") != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    by_regex, first = steps[-1].get("use_regex", True), steps[:-1]
    if by_regex and not first:
        return _compiled(_GPT2)
    if by_regex and len(first) == 1 and first[0] == {"type": "Digits", "individual_digits": True}:
        return _compiled(_GPT2_DIGITS)
    if not by_regex and len(first) == 1 and first[0].get("type") == "Split":
        split = first[0]
        spelled = split.get("pattern", {}).get("Regex")
        if spelled and split.get("behavior") == "Isolated" and not split.get("invert"):
            return _compiled(spelled)
    return None


def _compiled(spelled: str) -> Any:
    import regex  # `transformers` needs it too; knows \p{L}

    try:
        # An unmatched character would be a word of its own for the tokenizer.
        return regex.compile(f"(?:{spelled})|.", regex.VERSION0 | regex.DOTALL)
    except regex.error:
        return None


def _probe() -> list[str]:
    """Random texts in which words, numbers, signs and all kinds of white space meet."""
    draw = random.Random(0)
    parts = [chr(i) for i in range(0x2200) if _KNOWN.fullmatch(chr(i))] + [
        "the",
        "It's",
        "I'LL",
        "don't",
        " 've",
        "2024",
        "3.14",
        "  ",
        "\n\n",
        "\r\n",
    ]
    parts += (
        [chr(i) for i in range(128)] * 4
        + [" "] * 60
        + ["word", "Word", "x", ", ", ". ", "!?", "\t", " \n", "  a", "' s"]
    )
    return ["".join(draw.choice(parts) for _ in range(draw.randrange(1, 60))) for _ in range(800)]
