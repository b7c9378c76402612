"""Pairs of answers and plain text: what becomes of rows in the stages dpo and pt."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finerank.data.dataset import Splits, load_splits
from finerank.data.loader import BatchPlan
from finerank.data.pairs import PairDataset
from finerank.data.settings import DataSettings
from finerank.data.templates import load_template
from finerank.errors import ConfigError, DataError
from finerank.recipes import preprocess
from tiny import save_tiny, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def load(path: Path | str, **settings: Any) -> Splits:
    values = DataSettings(data_path=[str(path)], **{"stage": "dpo", **settings})
    return load_splits(values, TOKENIZER, load_template(values, TOKENIZER), seed=1)


def pair(i: int, **changes: Any) -> dict[str, Any]:
    row = {"instruction": f"Say {i}.", "chosen": f"I say {i}, gladly.", "rejected": "No." + " No." * (i % 4)}
    return {**row, **changes}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs_of(data: Any) -> list[list[tuple[list[int], list[int]]]]:
    return [[(ids.tolist(), labels.tolist()) for ids, labels in data.sequences(i)] for i in range(len(data))]


def test_a_pair_shares_its_prompt_and_trains_its_answers(tmp_path: Path):
    data = load(write(tmp_path / "rows.jsonl", [pair(i) for i in range(9)])).train
    assert isinstance(data, PairDataset)
    for i, ((chosen, chosen_labels), (rejected, rejected_labels)) in enumerate(pairs_of(data)):
        prompt = TOKENIZER.apply_chat_template(
            [{"role": "user", "content": f"Say {i}."}], add_generation_prompt=True, return_dict=False
        )
        assert chosen[: len(prompt)] == rejected[: len(prompt)] == prompt
        for ids, labels, answer in (
            (chosen, chosen_labels, f"I say {i}, gladly."),
            (rejected, rejected_labels, "No." + " No." * (i % 4)),
        ):
            assert TOKENIZER.decode(ids[len(prompt) :]).startswith(answer)
            trained = [label for label in labels if label != -100]
            assert labels[: len(prompt)] == [-100] * len(prompt) and trained == ids[len(prompt) :][: len(trained)]
        assert data.lengths[i] == len(chosen) + len(rejected)


def test_the_real_rows(shared: Path):
    splits = load(shared / "data" / "dpo_en_demo.json", val_set_size=30, seq_length=4096)
    assert splits.receipt["rows_read"] == 300 == splits.receipt["rows_kept"] + splits.receipt["rows_dropped"]
    assert len(splits.train) + len(splits.valid) == splits.receipt["rows_kept"] and len(splits.valid) == 30


def test_equal_answers_are_dropped_and_counted(tmp_path: Path):
    rows = [pair(0), pair(1, rejected="I say 1, gladly."), pair(2), pair(3, chosen=" ")]
    path = write(tmp_path / "rows.jsonl", rows)
    splits = load(path)
    assert len(splits.train) == 2
    dropped = splits.receipt["files"][0]["dropped"]
    assert dropped["the chosen and the rejected answer are equal"] == {"count": 1, "first_rows": [2]}
    assert splits.receipt["rows_dropped"] == 2
    with pytest.raises(DataError, match="row 2: the chosen and the rejected answer are equal; correct the row"):
        load(path, strict=True)


def test_a_long_pair_keeps_one_prompt(tmp_path: Path):
    rows = [
        pair(0, instruction="word " * 100, chosen="yes " * 90, rejected="no " * 5),
        pair(1, instruction="word " * 100, chosen="yes", rejected="no " * 40),
    ]
    splits = load(write(tmp_path / "rows.jsonl", rows), seq_length=64)
    assert splits.receipt["truncated"] == 2
    for (chosen, chosen_labels), (rejected, rejected_labels) in pairs_of(splits.train):
        assert max(len(chosen), len(rejected)) <= 64
        first = [int(np.argmax(np.array(labels) != -100)) for labels in (chosen_labels, rejected_labels)]
        assert first[0] == first[1] and chosen[: first[0]] == rejected[: first[1]]


def test_pairs_that_are_equal_once_cut_are_dropped(tmp_path: Path):
    rows = [pair(0), pair(1, instruction="x", chosen="yes " * 200 + "a", rejected="yes " * 200 + "b")]
    splits = load(write(tmp_path / "rows.jsonl", rows), seq_length=64)
    assert len(splits.train) == 1 and splits.receipt["rows_dropped"] == 1


@pytest.mark.parametrize("pack", [True, False])
def test_both_answers_lie_in_the_same_micro_batch(tmp_path: Path, pack: bool):
    data = load(write(tmp_path / "rows.jsonl", [pair(i) for i in range(23)])).train
    data = data.with_reference(np.arange(46, dtype=np.float32).reshape(23, 2))
    settings = DataSettings(
        global_batch_size=8, micro_batch_tokens=150, micro_batch_size=None if pack else 3, pack=pack
    )
    plan = BatchPlan(data, settings, seed=3, num_epochs=1, pad_token_id=2)
    seen = []
    for step in range(plan.num_steps):
        for batch in plan.micro_batches(step):
            assert batch.reference.tolist() == [[2.0 * row, 2.0 * row + 1] for row in batch.rows]
            if pack:
                edges = batch.cu_seqlens.tolist()
                found = [batch.input_ids[0, a:b].tolist() for a, b in itertools.pairwise(edges)]
            else:
                lengths = batch.attention_mask.sum(1).tolist()
                found = [ids[:n].tolist() for ids, n in zip(batch.input_ids, lengths, strict=True)]
            assert found == [ids.tolist() for row in batch.rows for ids, _ in data.sequences(row)]
            seen += batch.rows
    assert sorted(seen) == list(range(23))


def test_subsets_keep_pairs_and_references_together(tmp_path: Path):
    data = load(write(tmp_path / "rows.jsonl", [pair(i) for i in range(6)])).train
    part = data.with_reference(np.arange(12, dtype=np.float32).reshape(6, 2)).subset(np.array([4, 1]))
    assert pairs_of(part) == [pairs_of(data)[4], pairs_of(data)[1]]
    assert part.reference.tolist() == [[8, 9], [2, 3]] and part.digest != data.digest


def test_indexed_pairs_equal_those_of_rows(tmp_path: Path):
    rows = [pair(i) for i in range(7)] + [pair(7, rejected="I say 7, gladly.")]
    path = write(tmp_path / "rows.jsonl", rows)
    tiny = save_tiny(tmp_path / "tiny")
    preprocess.run(
        preprocess.Settings(
            input=[str(path)],
            output_prefix=str(tmp_path / "indexed"),
            tokenizer_name_or_path=str(tiny),
            handler_name="AlpacaStylePairwiseHandler",
        )
    )
    indexed = load(tmp_path / "indexed")
    assert pairs_of(indexed.train) == pairs_of(load(path).train)
    assert indexed.receipt["rows_dropped"] == 1
    cut = load(tmp_path / "indexed", seq_length=24)
    assert cut.receipt["truncated"] > 0 and int(cut.train.chosen.lengths.max()) <= 24
    with pytest.raises(DataError, match="pair 8: the chosen and the rejected answer are equal"):
        load(tmp_path / "indexed", strict=True)
    with pytest.raises(DataError, match="holds pairs of a chosen and a rejected answer, and --stage sft trains on"):
        load(tmp_path / "indexed", stage="sft")


SFT = [{"instruction": "Say it.", "output": "It."}]
TEXT = [{"text": "The moon goes around the earth."}]


@pytest.mark.parametrize(
    ("rows", "stage", "said"),
    [
        (SFT, "dpo", "instructions with one answer each, and --stage dpo trains on pairs .*; give --stage sft"),
        (SFT, "pt", "instructions with one answer each, and --stage pt trains on plain text; give --stage sft"),
        ([pair(0)], "sft", "pairs of a chosen and a rejected answer, and --stage sft .*; give --stage dpo"),
        ([pair(0)], "pt", "pairs of a chosen and a rejected answer, and --stage pt .*; give --stage dpo"),
        (TEXT, "dpo", "plain text, and --stage dpo trains on pairs .*; give --stage pt"),
    ],
)
def test_rows_of_another_stage_are_refused(tmp_path: Path, rows: list, stage: str, said: str):
    with pytest.raises(DataError, match=said):
        load(write(tmp_path / "rows.jsonl", rows), stage=stage)


@pytest.mark.parametrize("stage", ["pt", "dpo"])
@pytest.mark.parametrize("name", ["mask_history", "train_on_prompt"])
def test_settings_without_effect_are_refused(tmp_path: Path, stage: str, name: str):
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} has no effect with --stage {stage}"):
        load(write(tmp_path / "rows.jsonl", [pair(0)]), stage=stage, **{name: True})


BOOK = "One line.\nAnother one.\n\n\nA second paragraph\nof two lines.\n"


@pytest.mark.parametrize(
    ("sample_by", "texts"),
    [
        ("line", ["One line.", "Another one.", "A second paragraph", "of two lines."]),
        ("paragraph", ["One line.\nAnother one.", "A second paragraph\nof two lines."]),
        ("document", ["One line.\nAnother one.\n\n\nA second paragraph\nof two lines."]),
    ],
)
def test_texts_end_with_the_end_of_text_token(tmp_path: Path, sample_by: str, texts: list[str]):
    path = tmp_path / "book.txt"
    path.write_text(BOOK, encoding="utf-8")
    data = load(path, stage="pt", sample_by=sample_by).train
    assert [data.ids(i).tolist() for i in range(len(data))] == [
        [*TOKENIZER.encode(text), TOKENIZER.eos_token_id] for text in texts
    ]
    assert all((data.labels(i) == data.ids(i)).all() for i in range(len(data)))


def test_sample_by_without_plain_text_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="--sample-by document has no effect: no file is plain text"):
        load(write(tmp_path / "rows.jsonl", TEXT), stage="pt", sample_by="document")
