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


class WordCache:
    """Encodes texts word by word; see the module's docstring for when it may."""

    def __init__(self, backend: Any, pattern: Any, added: list[str]):
        self._backend = backend
        self._find = pattern.findall
        self._added = re.compile("|".join(map(re.escape, added)) or r"(?!)")
        self._special = {token: backend.token_to_id(token) for token in added}
        self._ids: dict[str, list[int]] = {}
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
        return cache if cache._agrees(_probe()) else None

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, equal to the tokenizer's without added special tokens."""
        words = [self._words(text) if text.isascii() or _KNOWN.fullmatch(text) else None for text in texts]
        self._learn(words)
        rest = [text for text, own in zip(texts, words, strict=True) if own is None]
        encoded = iter(self._whole(rest) if rest else [])
        ids = self._ids
        found: list[list[int]] = []
        for own in words:
            found.append(next(encoded) if own is None else [i for word in own for i in ids[word]])
        self._check(texts, found)
        return found

    def _words(self, text: str) -> list[str] | None:
        """The words and added tokens of a text; None for one with words too long to keep."""
        if self._added.search(text) is None:
            words = self._find(text)
        else:
            words, at = [], 0
            for match in self._added.finditer(text):
                words += self._find(text[at : match.start()])
                words.append(match[0])
                at = match.end()
            words += self._find(text[at:])
        return words if max(map(len, words), default=0) <= _LONGEST_WORD else None

    def _learn(self, words: list[list[str] | None]) -> None:
        known = self._ids
        new = {word for own in words if own is not None for word in own if word not in known}
        if not new:
            return
        if len(known) + len(new) > _MOST_WORDS:
            known.clear()
            new = {word for own in words if own is not None for word in own}
        ordered = sorted(new)
        known.update(zip(ordered, self._whole(ordered), strict=True))

    def _whole(self, texts: list[str]) -> list[list[int]]:
        return [e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _check(self, texts: list[str], found: list[list[int]]) -> None:
        before, self._count = self._count, self._count + len(texts)
        picked = range(-before % _CHECK_EVERY, len(texts), _CHECK_EVERY)
        for i, ids in zip(picked, self._whole([texts[i] for i in picked]), strict=True):
            assert ids == found[i], f"the word cache differs from the tokenizer on {texts[i]!r}"

    def _agrees(self, texts: list[str]) -> bool:
        words = [self._words(text) for text in texts]
        self._learn(words)
        joined = [[i for word in own for i in self._ids[word]] for own in words if own is not None]
        return joined == self._whole([text for text, own in zip(texts, words, strict=True) if own is not None])


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
