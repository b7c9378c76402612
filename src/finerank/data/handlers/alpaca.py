"""Alpaca rows: instruction, input, output, and perhaps system and history.

    {"instruction": "Translate.", "input": "Guten Tag", "output": "Good day"}

The user's text is the instruction, then a line break and the input if there is one. `history` is a list of earlier
[user, assistant] pairs. Asked for by its class name, the handler reads `history` and `system` only where `--map-keys`
names them, as MindSpeed-LLM does; told apart by itself or as `alpaca` it reads them where they are.
"""

from typing import Any

from finerank.data.handlers import Columns, Row
from finerank.data.handlers._text import answer_of, conversation_of, list_of, optional_text, text_of
from finerank.data.rows import BadRow
from finerank.data.types import Conversation, Message

NAMES = ("AlpacaStyleInstructionHandler",)
KEYS = ("prompt", "query", "response", "history", "system")
ORDER = 5


def matches(row: Row) -> bool:
    """Whether a row has the columns of this form."""
    return "instruction" in row and "output" in row


def convert(row: Row, columns: Columns) -> Conversation:
    """The row as a conversation. Raises BadRow."""
    system, turns = prompt_turns(row, columns)
    answer = answer_of(columns.need(row, "response", "output"))
    turns.append(Message(role="assistant", content=answer, trained=True))
    return conversation_of(turns, system=system)


def prompt_turns(row: Row, columns: Columns) -> tuple[str, list[Message]]:
    """System text and all turns before the answer; shared with the pairwise form. Raises BadRow."""
    turns: list[Message] = []
    system = ""
    if not columns.named or "history" in columns.by_role:
        turns = _history(columns.get(row, "history", "history"))
    if not columns.named or "system" in columns.by_role:
        system = optional_text(columns.get(row, "system", "system"), "system")
    asked = text_of(columns.need(row, "prompt", "instruction"), "the instruction")
    given = optional_text(columns.get(row, "query", "input"), "the input")
    text = "\n".join(part for part in (asked, given) if part)
    if not text.strip():
        raise BadRow("the instruction is empty")
    turns.append(Message(role="user", content=text))
    return system, turns


def _history(value: Any) -> list[Message]:
    if value is None or value == "":
        return []
    turns: list[Message] = []
    for pair in list_of(value, "the history"):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow("the history is not a list of [user, assistant] pairs")
        turns.append(Message(role="user", content=text_of(pair[0], "a turn of the history")))
        turns.append(Message(role="assistant", content=text_of(pair[1], "a turn of the history"), trained=True))
    return turns
