"""ShareGPT rows: a list of turns with from and value, and perhaps system and tools.

    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}], "tools": "[...]"}

Turns are from human, gpt, system, function_call (made by the assistant) and observation (its result); `role` and
`content` with user, assistant and tool are read as well. `--map-keys` renames the columns (`messages`, `system`,
`tools`) and, under `tags`, the keys and names of turns: `role_tag content_tag user_tag assistant_tag observation_tag
function_tag system_tag`. Tags that are not given then have no name.
"""

from collections.abc import Mapping
from typing import Any

from finerank.data.handlers import Columns, Row
from finerank.data.handlers._text import answer_of, conversation_of, list_of, optional_text, text_of, tools_of
from finerank.data.rows import BadRow
from finerank.data.types import Conversation, Message
from finerank.errors import ConfigError, unknown_name

NAMES = ("SharegptStyleInstructionHandler",)
KEYS = ("messages", "tags", "system", "tools")
ORDER = 4

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function_call": "function",
    "system": "system",
}
_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function",
    "system_tag": "system",
}


def matches(row: Row) -> bool:
    """Whether a row has the columns of this form."""
    return "conversations" in row


def convert(row: Row, columns: Columns) -> Conversation:
    """The row as a conversation. Raises BadRow."""
    turns = turns_of(row, columns)
    system = optional_text(columns.get(row, "system", "system"), "system")
    return conversation_of(turns, system=system, tools=tools_of(columns.get(row, "tools", "tools")))


def turns_of(row: Row, columns: Columns) -> list[Message]:
    """All turns of the row in order; shared with the pairwise form. Raises BadRow."""
    listed = list_of(columns.need(row, "messages", "conversations"), "conversations")
    return [turn_of(turn, columns.by_role.get("tags")) for turn in listed]


def turn_of(turn: Any, tags: Mapping[str, str] | None) -> Message:
    """One turn. Raises BadRow for an unknown role or a text that is none."""
    if not isinstance(turn, dict):
        raise BadRow("a turn is not an object")
    roles = ROLES if not tags else _roles(tags)
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    if tags:
        role_key, content_key = tags.get("role_tag") or "from", tags.get("content_tag") or "value"
    name = turn.get(role_key)
    role = roles.get(name) if isinstance(name, str) else None
    if role is None:
        raise BadRow("a turn has an unknown role")
    if role in ("assistant", "function"):
        return Message(role=role, content=answer_of(turn.get(content_key), "an answer"), trained=True)
    return Message(role=role, content=text_of(turn.get(content_key), "a turn"))


def _roles(tags: Mapping[str, str]) -> dict[str, str]:
    for tag in tags:
        if tag not in (*_TAGS, "role_tag", "content_tag"):
            raise ConfigError("--map-keys: " + unknown_name("tag", tag, [*_TAGS, "role_tag", "content_tag"]))
    return {tags[tag]: role for tag, role in _TAGS.items() if tags.get(tag)}
