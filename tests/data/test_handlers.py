"""Handlers: good rows, each kind of bad row, and nothing but BadRow for any row at all."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finerank import registry
from finerank.data.handlers import detect_handler, make_handler
from finerank.data.rows import BadRow
from finerank.data.types import Conversation
from finerank.errors import ConfigError

NAMES = registry.names("finerank.data.handlers")

GOOD: dict[str, dict[str, Any]] = {
    "alpaca": {"instruction": "I", "input": "X", "output": "A", "system": "S", "history": [["u", "a"]]},
    "alpaca_pairwise": {"instruction": "I", "input": "", "chosen": "A", "rejected": "B"},
    "sharegpt": {"conversations": [{"from": "human", "value": "U"}, {"from": "gpt", "value": "A"}], "tools": ""},
    "sharegpt_pairwise": {
        "conversations": [{"from": "human", "value": "U"}],
        "chosen": {"from": "gpt", "value": "A"},
        "rejected": {"from": "gpt", "value": "B"},
    },
    "messages": {"messages": [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]},
    "prompt_completion": {"prompt": "U", "completion": "A"},
    "pretrain": {"text": "words"},
}


def test_every_handler_has_a_good_row_here():
    assert set(GOOD) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_good_rows_are_told_apart_and_converted(name: str):
    handler = detect_handler([GOOD[name]])
    assert handler is not None and handler.name == name
    conversation = handler.convert(GOOD[name])
    assert conversation.messages[-1].trained
    assert not any(m.trained for m in conversation.messages if m.role in ("system", "user", "tool"))
    assert (conversation.rejected is not None) == name.endswith("pairwise")


def test_alpaca_text_history_and_system():
    [system, u, a, asked, answer] = make_handler("alpaca").convert(GOOD["alpaca"]).messages
    assert (system.content, u.content, a.content, asked.content, answer.content) == ("S", "u", "a", "I\nX", "A")
    assert a.trained and answer.trained
    only_last = make_handler("alpaca", mask_history=True).convert(GOOD["alpaca"]).messages
    assert [m.trained for m in only_last] == [False, False, False, False, True]
    as_upstream = make_handler("AlpacaStyleInstructionHandler").convert(GOOD["alpaca"]).messages
    assert [m.role for m in as_upstream] == ["user", "assistant"]


def test_columns_can_be_renamed():
    handler = make_handler("alpaca", map_keys={"prompt": "q", "response": "r", "query": ""})
    [asked, answer] = handler.convert({"q": "Q", "r": "R", "input": "unused"}).messages
    assert (asked.content, answer.content) == ("Q", "R")
    detected = detect_handler([{"q": "Q", "r": "R"}], map_keys={"prompt": "q", "response": "r"})
    assert detected is not None and detected.name == "alpaca"
    with pytest.raises(BadRow, match="no column 'q'"):
        handler.convert({"r": "R"})
    with pytest.raises(ConfigError, match="Did you mean 'response'"):
        make_handler("alpaca", map_keys={"respnse": "r"})
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "me", "assistant_tag": "it"}
    handler = make_handler("sharegpt", map_keys={"messages": "talk", "tags": tags})
    row = {"talk": [{"who": "me", "says": "U"}, {"who": "it", "says": "A"}]}
    assert len(handler.convert(row).messages) == 2
    detected = detect_handler([row], map_keys={"messages": "talk", "tags": tags})
    assert detected is not None and detected.name == "sharegpt" and len(detected.convert(row).messages) == 2
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    chat = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    detected = detect_handler([{"messages": chat}], map_keys={"messages": "messages", "tags": tags})
    assert detected is not None and detected.name == "sharegpt"
    for keys, name in (
        (("from", "value", "human", "gpt"), "sharegpt"),
        (("role", "content", "user", "assistant"), "messages"),
    ):
        row = {"talk": [{keys[0]: keys[2], keys[1]: "U"}, {keys[0]: keys[3], keys[1]: "A"}]}
        detected = detect_handler([row], map_keys={"messages": "talk"})
        assert detected is not None and detected.name == name and len(detected.convert(row).messages) == 2


def turns(*roles: str) -> list[dict[str, str]]:
    return [{"from": role, "value": f"text {i}"} for i, role in enumerate(roles)]


BAD = [
    ({"instruction": "I", "output": None}, "null"),
    ({"instruction": "I", "output": " \n"}, "empty"),
    ({"instruction": "", "input": "", "output": "A"}, "instruction is empty"),
    ({"instruction": 3, "output": "A"}, "a number, not text"),
    ({"instruction": "I", "output": ["A"]}, "a list, not text"),
    ({"instruction": "I\0", "output": "A"}, "NUL"),
    ({"instruction": "I", "output": "\ud800"}, "not valid Unicode"),
    ({"instruction": "I", "output": "A", "history": [["u"]]}, "pairs"),
    ({"conversations": turns("gpt", "human", "gpt")}, "first turn is from the assistant"),
    ({"conversations": turns("human", "gpt", "human")}, "last turn is not an answer"),
    ({"conversations": turns("human", "human", "gpt")}, "alternate"),
    ({"conversations": turns("system", "system", "human", "gpt")}, "more than one system"),
    ({"conversations": turns("human", "martian")}, "unknown role"),
    ({"conversations": []}, "no turns"),
    ({"conversations": "text"}, "not a list"),
    ({"conversations": [None]}, "not an object"),
    ({"conversations": turns("human", "gpt"), "tools": "{"}, "tools"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "not text"),
    ({"messages": [{"role": "user", "content": "U"}, {"role": "assistant", "tool_calls": [3]}]}, "tool call"),
    ({"prompt": "", "completion": "A"}, "prompt is empty"),
    ({"text": "  "}, "empty"),
]


NEEDED = [
    ("alpaca", {"instruction": "I"}, "output"),
    ("alpaca", {"output": "A"}, "instruction"),
    ("alpaca_pairwise", {"instruction": "I", "chosen": "A"}, "rejected"),
    ("alpaca_pairwise", {"instruction": "I", "rejected": "A"}, "chosen"),
    ("sharegpt", {"text": "T"}, "conversations"),
    ("sharegpt_pairwise", {"conversations": turns("human"), "rejected": turns("gpt")[0]}, "chosen"),
    ("messages", {"text": "T"}, "messages"),
    ("prompt_completion", {"prompt": "P"}, "completion"),
    ("prompt_completion", {"completion": "P"}, "prompt"),
    ("pretrain", {"prompt": "P"}, "text"),
]


@pytest.mark.parametrize(("name", "row", "column"), NEEDED)
def test_a_missing_column_is_named(name: str, row: dict[str, Any], column: str):
    with pytest.raises(BadRow, match=f"^no column '{column}'$"):
        make_handler(name).convert(row)


def test_an_unknown_role_is_named_where_rows_are_told_apart():
    with pytest.raises(ConfigError, match="Did you mean 'prompt'"):
        detect_handler([{"q": "Q", "a": "A"}], map_keys={"promt": "q", "response": "a"})


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_bad_rows_say_why(row: dict[str, Any], reason: str):
    handler = detect_handler([row])
    assert handler is not None
    with pytest.raises(BadRow) as error:
        handler.convert(row)
    assert reason in error.value.reason


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["gpt", "user"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["from", "value", "role", "content", "tool_calls", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)
columns = st.sampled_from(
    [
        "instruction",
        "input",
        "output",
        "history",
        "system",
        "conversations",
        "messages",
        "tools",
        "chosen",
        "rejected",
        "prompt",
        "completion",
        "response",
        "text",
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(columns, anything, max_size=6), st.sampled_from(NAMES))
def test_any_row_gives_a_conversation_or_a_bad_row(row: dict[str, Any], name: str):
    try:
        conversation = make_handler(name).convert(row)
    except BadRow as error:
        assert error.reason and len(error.reason) < 120
    else:
        assert isinstance(conversation, Conversation) and conversation.messages[-1].content.strip()
        for message in conversation.messages:
            message.content.encode("utf-8")


def test_an_unknown_handler_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match="Did you mean 'AlpacaStyleInstructionHandler'"):
        make_handler("AlpacaStyleInstructionHandlr")
