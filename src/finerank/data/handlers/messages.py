"""Rows in the form of chat programs: messages with role and content, and perhaps tools.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}

A content may be a list of text parts. An assistant's `tool_calls` become a call, a `tool` message its result.
"""

import json
from typing import Any

from finerank.data.handlers import Columns, Row
from finerank.data.handlers._text import answer_of, conversation_of, list_of, optional_text, text_of, tools_of
from finerank.data.rows import BadRow
from finerank.data.types import Conversation, Message

NAMES = ("OpenAIInstructionHandler",)
KEYS = ("messages", "system", "tools")
ORDER = 3


def matches(row: Row) -> bool:
    """Whether a row has the columns of this form."""
    return "messages" in row


def convert(row: Row, columns: Columns) -> Conversation:
    """The row as a conversation. Raises BadRow."""
    listed = list_of(columns.need(row, "messages", "messages"), "messages")
    system = optional_text(columns.get(row, "system", "system"), "system")
    return conversation_of(
        [message_of(m) for m in listed], system=system, tools=tools_of(columns.get(row, "tools", "tools"))
    )


def message_of(message: Any) -> Message:
    """One message; shared with the prompt-completion form. Raises BadRow."""
    if not isinstance(message, dict):
        raise BadRow("a message is not an object")
    role, content = message.get("role"), _joined(message.get("content"))
    if role == "assistant" and message.get("tool_calls"):
        if content:
            raise BadRow("a message has both a text and tool calls")
        return Message(role="function", content=_calls(message["tool_calls"]), trained=True)
    if role == "assistant":
        return Message(role="assistant", content=answer_of(content, "an answer"), trained=True)
    role = "system" if role == "developer" else role
    if role not in ("system", "user", "tool"):
        raise BadRow("a message has an unknown role")
    return Message(role=role, content=text_of(content, "a message"))


def _joined(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        raise BadRow("a message has a part that is not text")
    return "".join(part["text"] for part in content)


def _calls(calls: Any) -> str:
    shown = []
    for call in list_of(calls, "tool calls"):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow("a tool call has no name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                raise BadRow("a tool call's arguments are not JSON") from None
        shown.append({"name": text_of(function["name"], "a tool call's name"), "arguments": arguments})
    return text_of(json.dumps(shown[0] if len(shown) == 1 else shown, ensure_ascii=False), "a tool call")
