"""Checks that all handlers share: texts are texts, and turns are in an order that templates can show."""

import json
from collections.abc import Sequence
from typing import Any

from finerank.data.rows import BadRow
from finerank.data.types import Conversation, Message


def text_of(value: Any, what: str) -> str:
    """A text that can be encoded. Raises BadRow for anything else."""
    if value is None:
        raise BadRow(f"{what} is null")
    if not isinstance(value, str):
        raise BadRow(f"{what} is {_kind(value)}, not text")
    if "\0" in value:
        raise BadRow(f"{what} holds a NUL character")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRow(f"{what} is not valid Unicode text") from None
    return value


def optional_text(value: Any, what: str) -> str:
    """Like `text_of`, with null as the empty text."""
    return "" if value is None else text_of(value, what)


def answer_of(value: Any, what: str = "the answer") -> str:
    """A text that is not blank. Raises BadRow."""
    text = text_of(value, what)
    if not text.strip():
        raise BadRow(f"{what} is empty")
    return text


def list_of(value: Any, what: str) -> list[Any]:
    """A list, also one written as JSON text, as CSV files have it. Raises BadRow."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow(f"{what} is not JSON") from None
    if not isinstance(value, list):
        raise BadRow(f"{what} is {_kind(value)}, not a list")
    return value


def tools_of(value: Any) -> str | None:
    """Tool descriptions as JSON text; None for none. Raises BadRow."""
    if value is None or value == "" or value == []:
        return None
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    text = text_of(value, "tools")
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        raise BadRow("tools are not JSON") from None
    if not isinstance(parsed, list):
        raise BadRow("tools are not a list")
    return text if parsed else None


def conversation_of(
    turns: Sequence[Message], *, system: str = "", tools: str | None = None, rejected: Message | None = None
) -> Conversation:
    """Turns that begin with the user's (or a system turn), alternate and end with an answer. Raises BadRow."""
    messages = list(turns)
    if messages and messages[0].role == "system":
        system = messages.pop(0).content or system
    if any(m.role == "system" for m in messages):
        raise BadRow("more than one system turn, or one that is not the first")
    if not messages:
        raise BadRow("there are no turns")
    if messages[0].role not in ("user", "tool"):
        raise BadRow("the first turn is from the assistant")
    if messages[-1].role not in ("assistant", "function"):
        raise BadRow("the last turn is not an answer")
    for i, message in enumerate(messages):
        if (message.role in ("user", "tool")) != (i % 2 == 0):
            raise BadRow("turns do not alternate between user and assistant")
    if system:
        messages.insert(0, Message(role="system", content=system))
    return Conversation(messages=tuple(messages), rejected=rejected, tools=tools)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    names = {int: "a number", float: "a number", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), f"of type {type(value).__name__}")
