"""Alpaca rows with two answers: instruction, input, chosen, rejected.

    {"instruction": "Say hello.", "input": "", "chosen": "Hello!", "rejected": "No."}

`prompt` is read where there is no `instruction`. A list of answers counts by its first.
"""

from typing import Any

from finerank.data.handlers import Columns, Row
from finerank.data.handlers._text import answer_of, conversation_of
from finerank.data.handlers.alpaca import prompt_turns
from finerank.data.rows import BadRow
from finerank.data.types import Conversation, Message

NAMES = ("AlpacaStylePairwiseHandler",)
KEYS = ("prompt", "query", "chosen", "rejected", "history", "system")
ORDER = 2


def matches(row: Row) -> bool:
    """Whether a row has the columns of this form."""
    return "chosen" in row and "rejected" in row and ("instruction" in row or isinstance(row.get("prompt"), str))


def convert(row: Row, columns: Columns) -> Conversation:
    """The row as a conversation with a rejected answer. Raises BadRow."""
    if "instruction" not in row and "prompt" not in columns.by_role and isinstance(row.get("prompt"), str):
        columns = Columns({**columns.by_role, "prompt": "prompt"}, columns.named)
    system, turns = prompt_turns(row, columns)
    chosen = answer_of(_first(columns.need(row, "chosen", "chosen")), "the chosen answer")
    rejected = answer_of(_first(columns.need(row, "rejected", "rejected")), "the rejected answer")
    turns.append(Message(role="assistant", content=chosen, trained=True))
    worse = Message(role="assistant", content=rejected, trained=True)
    return conversation_of(turns, system=system, rejected=worse)


def _first(value: Any) -> Any:
    if isinstance(value, list):
        if not value:
            raise BadRow("an answer is an empty list")
        return value[0]
    return value
