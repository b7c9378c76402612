"""No template: for plain text, which needs none. A conversation is refused with the names to choose from."""

import hashlib
from collections.abc import Sequence

from finerank.data.encode import TextEncoder
from finerank.data.templates import Template, Turn
from finerank.data.types import Conversation, Message
from finerank.errors import DataError


class NoTemplate(Template):
    """Stands in where the tokenizer has no chat template and none was named."""

    name = "none"

    def __init__(self, encoder: TextEncoder, known: Sequence[str]):
        self.encoder = encoder
        self.known = list(known)
        self.digest = hashlib.sha256(f"none {encoder.digest} {encoder.allow_special_tokens}".encode()).hexdigest()
        eos = encoder.tokenizer.eos_token_id
        self.stop_ids = () if eos is None else (int(eos),)

    def turns(self, conversation: Conversation) -> list[Turn]:
        raise self._error()

    def one_turn(self, messages: Sequence[Message], answer: str | None) -> Turn:
        raise self._error()

    def _error(self) -> DataError:
        return DataError(
            "This tokenizer has no chat template, and none was named; give --prompt-type with one of "
            f"{', '.join(self.known)}."
        )
