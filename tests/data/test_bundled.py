"""The rows that ship with finerank: how many, whole, in both languages, and no held-out question trained on."""

import json
import re
from importlib.resources import files

import pytest

BUNDLED = files("finerank.data") / "bundled"
TRAIN, HELD_OUT = "about_finerank.json", "about_finerank_held_out.json"
COUNTS = {TRAIN: 200, HELD_OUT: 41}


def text(name: str) -> str:
    return (BUNDLED / name).read_text(encoding="utf-8")


def rows(name: str) -> list[dict[str, str]]:
    return json.loads(text(name))


def question(row: dict[str, str]) -> tuple[str, str]:
    """What is asked, without regard to case, spacing and punctuation."""
    return tuple(re.sub(r"[\W_]+", " ", row[key].lower()).strip() for key in ("instruction", "input"))  # type: ignore


@pytest.mark.parametrize("name", COUNTS)
def test_count_and_fields(name: str):
    assert len(rows(name)) == COUNTS[name]
    for row in rows(name):
        assert list(row) == ["instruction", "input", "output"]
        assert all(value == value.strip() for value in row.values()), row
        assert row["instruction"] and row["output"], row


@pytest.mark.parametrize("name", COUNTS)
def test_no_question_comes_twice(name: str):
    asked = [question(row) for row in rows(name)]
    assert sorted(asked) == sorted(set(asked))


def test_no_held_out_instruction_is_trained_on():
    trained = {question(row)[0] for row in rows(TRAIN)}
    assert [row["instruction"] for row in rows(HELD_OUT) if question(row)[0] in trained] == []


@pytest.mark.parametrize("name", COUNTS)
def test_both_languages_are_present(name: str):
    chinese = sum(bool(re.search("[一-鿿]", row["instruction"])) for row in rows(name))
    assert len(rows(name)) / 5 <= chinese <= len(rows(name)) / 2


@pytest.mark.parametrize("name", COUNTS)
def test_one_row_a_line_in_one_order(name: str):
    """The file is what its rows give when written again, so a difference shows as a line and the order never moves."""
    lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows(name))
    assert text(name) == f"[\n{lines}\n]\n"


def test_the_licence_comes_with_the_rows():
    assert "CC0-1.0" in text("LICENSE.md")
