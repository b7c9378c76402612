"""The report: everything a run folder says on one page that needs nothing else, and nothing from outside as markup."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import yaml

from finerank import cli
from finerank.errors import DataError
from finerank.report.collect import read_metrics, read_run
from finerank.report.document import render
from finerank.report.figures import loss_curve

EVIL = "<script>alert('x')</script>&\"中文"


def make_run(folder: Path, *, base: float = 4.0, **files: Any) -> Path:
    """A run folder as tune leaves it, with 20 steps."""
    folder.mkdir(parents=True)
    steps = [{"step": 0, "loss": None, "eval_loss": base}]
    steps += [{"step": i, "loss": base - i / 10, "eval_loss": base - 2 if i == 20 else None} for i in range(1, 21)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps), encoding="utf-8")
    receipt = {
        "files": [
            {
                "path": f"rows{EVIL}.json",
                "handler": "alpaca",
                "rows_read": 7,
                "rows_kept": 5,
                "rows_dropped": 2,
                "dropped": {"no answer": {"count": 2, "first_rows": [3, 4]}},
                "truncated": {"count": 1, "first_rows": [1]},
            }
        ],
        "notes": [EVIL],
    }
    parts = {
        "config.yaml": yaml.safe_dump({"lora_r": 8, "lr": 1e-3, "load": EVIL}, allow_unicode=True),
        "results.json": json.dumps(
            {"base_eval_loss": base, "after_eval_loss": base - 2, "versions": {"torch": "2.13.0"}}
        ),
        "receipt.json": json.dumps(receipt),
        "answers.json": json.dumps([{"prompt": "你是谁？", "base model": EVIL, "tuned model": "我是 Finny"}]),
        **files,
    }
    for name, text in parts.items():
        if text is not None:
            (folder / name).write_text(text, encoding="utf-8")
    return folder


class Page(HTMLParser):
    """Tags and text of a page; fails where tags do not close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def page_of(*runs: Path) -> Page:
    return Page(render([read_run(run) for run in runs], defaults={"lora_r": 16, "lr": 1e-3}))


def test_the_page_says_what_the_folder_says(tmp_path: Path):
    page = page_of(make_run(tmp_path / "one"))
    for said in ("finerank: one", "4.0000", "2.0000", "no answer", "3, 4", "torch 2.13.0", "你是谁？", "我是 Finny"):
        assert said in page.text, said


def test_only_settings_that_differ_are_in_sight(tmp_path: Path):
    text = page_of(make_run(tmp_path / "one")).text
    differing, folded = text.split("1 settings at their defaults")
    assert "lora_r" in differing and "lora_r" not in folded and "lr" in folded


def test_text_from_outside_is_never_markup(tmp_path: Path):
    page = page_of(make_run(tmp_path / "one"))
    assert not [tag for tag, _ in page.tags if tag in ("script", "iframe", "link", "object")]
    assert page.text.count("<script>alert('x')</script>") == 3  # as text: setting, note and answer


def test_the_page_needs_nothing_beside_it(tmp_path: Path):
    page = page_of(make_run(tmp_path / "one"))
    sources = [value or "" for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href")]
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)


def test_several_runs_stand_side_by_side_even_with_the_same_name(tmp_path: Path):
    page = page_of(make_run(tmp_path / "a" / "run", base=4.0), make_run(tmp_path / "b" / "run", base=5.0))
    first = page.text[: page.text.index("Result\n")]
    assert str(tmp_path / "a" / "run") in first and str(tmp_path / "b" / "run") in first
    assert "2.0000" in first and "3.0000" in first
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 3


def test_an_unfinished_run_can_be_looked_at(tmp_path: Path):
    files = dict.fromkeys(("results.json", "receipt.json", "answers.json", "config.yaml"))
    run = make_run(tmp_path / "one", **files)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "lo')  # the program was killed here
    assert "has not finished" in page_of(run).text
    assert len(read_metrics(run / "metrics.jsonl")) == 21


def test_a_run_without_any_step_can_be_looked_at(tmp_path: Path):
    run = make_run(tmp_path / "one")
    (run / "metrics.jsonl").write_text("")
    assert "finerank: one" in page_of(run).text


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("metrics.jsonl", '{"step": 1}\nnot json\n{"step": 2}\n', "line 2: not JSON"),
        ("metrics.jsonl", "[]\n{}\n", "line 1: not a step"),
        ("results.json", "{", "results.json is not JSON"),
        ("results.json", "[]", "must hold a dict"),
        ("answers.json", "{}", "must hold a list"),
        ("receipt.json", "[" * 100_000, "receipt.json is not JSON"),
        ("config.yaml", "a: [", "config.yaml is not YAML"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, text: str, said: str):
    run = make_run(tmp_path / "one", **{name: text})
    with pytest.raises(DataError, match=re.escape(said)) as error:
        read_run(run)
    assert "\n" not in str(error.value)


def test_the_curve_is_a_picture_and_the_same_run_gives_the_same_bytes(tmp_path: Path):
    run = make_run(tmp_path / "one")
    for name in ("a.png", "b.png"):
        loss_curve(run / "metrics.jsonl", tmp_path / name, unit="nats per token")
    pixels = matplotlib.image.imread(tmp_path / "a.png")
    assert pixels.shape[0] > 400 and pixels.shape[1] > 800
    assert pixels[..., :3].min() < 0.2 and len({tuple(p) for p in pixels[::7, ::7, :3].reshape(-1, 3)}) > 5
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_verb_writes_the_page_into_the_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = make_run(tmp_path / "one")
    assert cli.main(["report", str(run)]) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    assert (run / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_what_is_no_run_folder_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err


def test_losses_are_named_in_their_own_unit(tmp_path: Path):
    """Of a finished run as its results say, of an unfinished one by its stage."""
    pairs = {"results.json": json.dumps({"base_eval_loss": 0.69, "after_eval_loss": 0.5, "loss_unit": "per pair"})}
    tuned, preferred = make_run(tmp_path / "sft"), make_run(tmp_path / "dpo", base=0.69, **pairs)
    going = make_run(tmp_path / "going", **{"results.json": None, "config.yaml": yaml.safe_dump({"stage": "dpo"})})
    assert [read_run(run).loss_unit for run in (tuned, preferred, going)] == ["nats per token", "per pair", "per pair"]
    page = render([read_run(preferred)], defaults={})
    assert "per pair" in page and "nats" not in page


def test_two_units_are_not_one_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    units = []
    monkeypatch.setattr("finerank.report.document.compare_curves", lambda runs, png, unit: units.append(unit))
    monkeypatch.setattr("finerank.report.document._picture", lambda draw, alt: draw(tmp_path / "picture.png") or "")
    monkeypatch.setattr("finerank.report.document.loss_curve", lambda metrics, png, unit: units.append(unit))
    pairs = {"results.json": json.dumps({"base_eval_loss": 0.69, "loss_unit": "per pair"})}
    runs = [read_run(make_run(tmp_path / "sft")), read_run(make_run(tmp_path / "dpo", **pairs))]
    render(runs, defaults={})
    assert units == ["of each run in its own unit", "nats per token", "per pair"]
