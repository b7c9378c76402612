"""Text to token ids: many texts at once, and special-token text inside user data stays text.

    encoder = TextEncoder(tokenizer)
    text = "<|im_start|>user\\n" + encoder.protect(row["instruction"]) + "<|im_end|>\\n"
    ids, = encoder.encode([text])

A template's own `<|im_end|>` is one control token; the same letters typed by a user are ordinary text. `protect` puts a
mark in place of each special token in a user's text; `encode` cuts such a text at the template's control tokens, puts
the letters back, and encodes each piece with the control tokens turned off. Texts without marks, which are nearly all,
are encoded whole and in batches.
"""

import functools
import hashlib
import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from finerank.data.rows import BadRow
from finerank.data.words import Ids, WordCache, flat_ids, put_in
from finerank.errors import DataError

_MARK = "\U0010fffd"  # a private-use character that no text should hold; where one does, it is protected as well
_MARKED = re.compile(f"{_MARK}([0-9]+){_MARK}")


class TextEncoder:
    """A tokenizer as the data pipeline uses it: no special tokens added, none made from user text.

    Args:
        tokenizer: a `transformers` tokenizer, fast or slow.
        allow_special_tokens: let special-token text in user data become control tokens.
    """

    def __init__(self, tokenizer: Any, *, allow_special_tokens: bool = False):
        self.tokenizer = tokenizer
        self.allow_special_tokens = allow_special_tokens
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()  # a tokenizer.json may ask for either
            self._backend.no_padding()
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {str(t) for t in tokenizer.all_special_tokens} | {str(t) for t in added.values() if t.special}
        self.special_tokens = sorted(special - {""}, key=lambda t: (-len(t), t))
        self._special = re.compile("|".join(map(re.escape, self.special_tokens)) or r"(?!)")
        self._to_protect = re.compile("|".join(map(re.escape, [_MARK, *self.special_tokens])))
        self._first_letters = sorted({_MARK, *(token[0] for token in self.special_tokens)})

    def __getstate__(self) -> dict[str, Any]:
        """What a worker process is sent; what is computed once is computed there again."""
        return {"tokenizer": self.tokenizer, "allow_special_tokens": self.allow_special_tokens}

    def __setstate__(self, state: dict[str, Any]) -> None:
        TextEncoder.__init__(self, state["tokenizer"], allow_special_tokens=state["allow_special_tokens"])

    @functools.cached_property
    def digest(self) -> str:
        """Hex SHA-256 of all that decides which ids a text gets."""
        if self._backend is not None:
            content = self._backend.to_str()
        else:
            content = repr((type(self.tokenizer).__name__, sorted(self.tokenizer.get_vocab().items())))
        return hashlib.sha256(f"{content}{self.special_tokens}".encode("utf-8", "surrogatepass")).hexdigest()

    def protect(self, text: str) -> str:
        """User text in which special tokens will stay text. Raises BadRow where the tokenizer cannot do that."""
        if self.allow_special_tokens:
            return text
        for letter in self._first_letters:  # much faster to look for than the expression
            if letter in text:
                break
        else:
            return text
        if self._to_protect.search(text) is None:
            return text
        if not self.is_piecewise:
            raise BadRow("special-token text, which this tokenizer cannot keep as text (see --allow-special-tokens)")
        things = [_MARK, *self.special_tokens]
        return self._to_protect.sub(lambda m: f"{_MARK}{things.index(m[0])}{_MARK}", text)

    def restore(self, text: str) -> str:
        """The user's letters again; undoes `protect`."""
        things = [_MARK, *self.special_tokens]
        return _MARKED.sub(lambda m: things[int(m[1])], text)

    def token_id(self, token: str) -> int | None:
        """The id of a token that is in the vocabulary as it is spelled, else None."""
        found = self.tokenizer.convert_tokens_to_ids(token)
        if found is None or self.tokenizer.convert_ids_to_tokens(found) != token:
            return None
        return int(found)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; control tokens in it become their ids, protected ones stay text."""
        flat, lengths = self.encode_flat(texts)
        ids, ends = flat.tolist(), np.cumsum(lengths).tolist()
        return [ids[start:end] for start, end in itertools.pairwise([0, *ends])]

    def encode_flat(self, texts: Sequence[str]) -> Ids:
        """The same as arrays: all ids, one text after the other, and how many each text has."""
        marked = {i: self._encode_marked(text) for i, text in enumerate(texts) if _MARK in text}
        plain = [text if i not in marked else "" for i, text in enumerate(texts)] if marked else texts
        if self._word_cache is not None:
            ids = self._word_cache.encode(plain)
        elif self._backend is not None:
            ids = flat_ids([e.ids for e in self._backend.encode_batch_fast(plain, add_special_tokens=False)])
        else:
            ids = flat_ids([self.tokenizer.encode(text, add_special_tokens=False) if text else [] for text in plain])
        return put_in(ids, marked)

    def _encode_marked(self, text: str) -> list[int]:
        ids: list[int] = []
        at = 0
        for match in self._special.finditer(text):
            ids += self._encode_as_text(self.restore(text[at : match.start()]))
            ids.append(self.tokenizer.convert_tokens_to_ids(match[0]))
            at = match.end()
        return ids + self._encode_as_text(self.restore(text[at:]))

    def _encode_as_text(self, text: str) -> list[int]:
        if self._backend is None:
            return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return self._text_backend.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _word_cache(self) -> WordCache | None:
        return None if self._backend is None else WordCache.for_backend(self._backend)

    @functools.cached_property
    def _text_backend(self) -> Any:
        from tokenizers import Tokenizer

        copy = Tokenizer.from_str(self._backend.to_str())  # the switch must not touch the user's own tokenizer
        copy.encode_special_tokens = True
        return copy

    @functools.cached_property
    def is_piecewise(self) -> bool:
        """Whether a text cut at a control token or a line end encodes to the same ids as the whole text.

        Not so for tokenizers that put a space before each text they encode.
        """
        whole, first, second = self.encode(["user\nHello there", "user\n", "Hello there"])
        if whole != first + second:
            return False
        if not self.special_tokens:
            return True
        special = self.special_tokens[0]
        whole, first, second = self.encode([f"a b{special}Hello there", "a b", "Hello there"])
        return whole == [*first, self.tokenizer.convert_tokens_to_ids(special), *second]

    def encode_with_starts(self, text: str) -> tuple[list[int], list[int]]:
        """Ids of one text and where in the text, in characters, each token starts. Needs a fast tokenizer."""
        if self._backend is None:
            raise DataError("this template needs a fast tokenizer; choose a named template with --prompt-type")
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]
