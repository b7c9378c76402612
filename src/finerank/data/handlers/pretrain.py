"""Plain text for continued pretraining: every token is trained, and no template is put around it.

    {"text": "The moon goes around the earth in 27.3 days."}

A text longer than `--seq-length` becomes several samples.
"""

from finerank.data.handlers import Columns, Row
from finerank.data.handlers._text import answer_of
from finerank.data.types import Conversation, Message

NAMES = ("GeneralPretrainHandler",)
KEYS = ("text",)
ORDER = 7

ROLE = "text"
"""The role of the one message that such a row has."""


def matches(row: Row) -> bool:
    """Whether a row has the columns of this form."""
    return "text" in row


def convert(row: Row, columns: Columns) -> Conversation:
    """The row as one text. Raises BadRow."""
    text = answer_of(columns.need(row, "text", "text"), "the text")
    return Conversation(messages=(Message(role=ROLE, content=text, trained=True),))
