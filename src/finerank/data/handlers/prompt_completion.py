"""Rows with a prompt and its completion, each a text or a list of messages.

{"prompt": "What is the capital of France?", "completion": "Paris."}
"""

from typing import Any

from finerank.data.handlers import Columns, Row
from finerank.data.handlers._text import answer_of, conversation_of, optional_text, text_of
from finerank.data.handlers.messages import message_of
from finerank.data.rows import BadRow
from finerank.data.types import Conversation, Message

NAMES = ("PromptCompletionHandler",)
KEYS = ("prompt", "completion", "system")
ORDER = 6


def matches(row: Row) -> bool:
    """Whether a row has the columns of this form."""
    return "prompt" in row and ("completion" in row or "response" in row)


def convert(row: Row, columns: Columns) -> Conversation:
    """The row as a conversation. Raises BadRow."""
    prompt = columns.need(row, "prompt", "prompt")
    completion = columns.need(
        row, "completion", "response" if "response" in row and "completion" not in row else "completion"
    )
    turns = _turns(prompt, "user") + _turns(completion, "assistant")
    return conversation_of(turns, system=optional_text(columns.get(row, "system", "system"), "system"))


def _turns(value: Any, role: str) -> list[Message]:
    if isinstance(value, list):
        return [message_of(message) for message in value]
    if role == "assistant":
        return [Message(role=role, content=answer_of(value, "the completion"), trained=True)]
    text = text_of(value, "the prompt")
    if not text.strip():
        raise BadRow("the prompt is empty")
    return [Message(role=role, content=text)]
