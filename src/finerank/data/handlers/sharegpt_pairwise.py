"""ShareGPT rows with two answers: an odd number of turns, then chosen and rejected.

{"conversations": [{"from": "human", "value": "Hi"}],
 "chosen": {"from": "gpt", "value": "Hello!"}, "rejected": {"from": "gpt", "value": "Go away."}}
"""

from typing import Any

from finerank.data.handlers import Columns, Row
from finerank.data.handlers._text import answer_of, conversation_of, optional_text, tools_of
from finerank.data.handlers.sharegpt import turn_of, turns_of
from finerank.data.rows import BadRow
from finerank.data.types import Conversation, Message

NAMES = ("SharegptStylePairwiseHandler",)
KEYS = ("messages", "tags", "system", "tools", "chosen", "rejected")
ORDER = 1


def matches(row: Row) -> bool:
    """Whether a row has the columns of this form."""
    return "conversations" in row and "chosen" in row and "rejected" in row


def convert(row: Row, columns: Columns) -> Conversation:
    """The row as a conversation with a rejected answer. Raises BadRow."""
    turns = turns_of(row, columns)
    chosen = _answer(columns.need(row, "chosen", "chosen"), columns)
    rejected = _answer(columns.need(row, "rejected", "rejected"), columns)
    return conversation_of(
        [*turns, chosen],
        system=optional_text(columns.get(row, "system", "system"), "system"),
        tools=tools_of(columns.get(row, "tools", "tools")),
        rejected=rejected,
    )


def _answer(value: Any, columns: Columns) -> Message:
    if isinstance(value, str):
        return Message(role="assistant", content=answer_of(value), trained=True)
    message = turn_of(value, columns.by_role.get("tags"))
    if message.role not in ("assistant", "function"):
        raise BadRow("chosen or rejected is not from the assistant")
    return message
