"""Token ids to text as they arrive: pieces that join to the whole, no half characters, nothing past a stop text.

A character may need several tokens (most Chinese ones and all emoji do in byte-level vocabularies), so a piece is held
back while its last character is incomplete; and while the end of the text could still become a stop text.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"


class TextStream:
    """The text of one growing answer.

    >>> stream = TextStream(tokenizer, stop=["\\n\\n"])
    >>> pieces = [stream.push(token) for token in ids] + [stream.finish()]
    >>> "".join(pieces) == stream.text
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.text = ""
        """What was given out so far."""
        self.stopped = False
        """Whether a stop text was met; later tokens change nothing."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []

    def push(self, token: int) -> str:
        """Take one token; returns the text that is certain now, often one word, sometimes nothing."""
        if self.stopped:
            return ""
        self._ids.append(token)
        return self._give(self._decode(), final=False)

    def finish(self) -> str:
        """The rest that was held back."""
        return "" if self.stopped else self._give(self._decode(), final=True)

    def _decode(self) -> str:
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _give(self, whole: str, *, final: bool) -> str:
        found = [(place + len(stop), place) for stop in self._stop if (place := whole.find(stop)) >= 0]
        if found:  # the one that is complete first, so that it does not matter how the text is cut into tokens
            self.stopped = True
            whole = whole[: min(found)[1]]
        elif not final:
            if whole.endswith(_INCOMPLETE):
                return ""
            whole = whole[: len(whole) - self._length_of_possible_stop(whole)]
        if not whole.startswith(self.text):  # a decoder that rewrites what it said before; what was given out stands
            return ""
        piece = whole[len(self.text) :]
        self.text += piece
        return piece

    def _length_of_possible_stop(self, whole: str) -> int:
        """How many of the last characters could be the beginning of a stop text."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(whole)), 0, -1):
            if any(stop.startswith(whole[-length:]) for stop in self._stop):
                return length
        return 0
