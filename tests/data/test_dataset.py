"""From rows to batches: every row accounted for, the cache, splits, order, and the layout of batches."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finerank.data.dataset import Splits, load_splits, split_boundaries
from finerank.data.loader import BatchPlan, eval_batches
from finerank.data.settings import DataSettings
from finerank.data.templates import load_template
from finerank.errors import ConfigError, DataError
from tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def rows_file(folder: Path, num: int = 50, name: str = "rows.jsonl") -> Path:
    path = folder / name
    rows = [{"instruction": f"Say {i}.", "input": "", "output": f"{i} " * (1 + i % 7)} for i in range(num)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path: Path | list[Path], *, seed: int = 1, output_dir: Path | None = None, **values: Any) -> Splits:
    paths = [str(p) for p in (path if isinstance(path, list) else [path])]
    settings = DataSettings(data_path=paths, **values)
    return load_splits(settings, TOKENIZER, load_template(settings, TOKENIZER), seed=seed, output_dir=output_dir)


def damaged_rows(num: int) -> list[bytes]:
    """Lines of which many are damaged in one of a dozen ways."""
    draw = random.Random(0)
    good = {"instruction": "Do it.", "input": "", "output": "Done."}
    lines = []
    for i in range(num):
        row: Any = {**good, "instruction": f"Do {i}."}
        kind = draw.randrange(14)
        row = {
            0: {**row, "output": None},
            1: {**row, "output": ""},
            2: {**row, "instruction": 7},
            3: [row],
            4: {"instruction": "x"},
            5: {**row, "output": "a\0b"},
            6: {**row, "history": "["},
            7: good,
            8: {**row, "output": "long " * 300},
        }.get(kind, row)
        line = json.dumps(row).encode()
        lines.append(
            {9: line[: len(line) // 2], 10: b'{"instruction": "\xff", "output": "x"}', 11: b"null"}.get(kind, line)
        )
    return lines


@pytest.mark.parametrize("workers", [1, 2])
def test_counts_add_up_over_thousands_of_damaged_rows(tmp_path: Path, workers: int):
    lines = damaged_rows(4000)
    path = tmp_path / "damaged.jsonl"
    path.write_bytes(b"\n".join(lines))
    splits = load(path, workers=workers, deduplicate=True, overlong="drop", seq_length=256, output_dir=tmp_path / "out")
    receipt = json.loads((tmp_path / "out" / "receipt.json").read_text(encoding="utf-8"))
    assert receipt == splits.receipt
    [file] = receipt["files"]
    assert file["rows_read"] == len(lines) == file["rows_kept"] + file["rows_dropped"]
    assert file["rows_dropped"] == sum(c["count"] for c in file["dropped"].values())
    assert len(file["dropped"]) >= 9
    assert all(len(c["first_rows"]) == min(10, c["count"]) for c in file["dropped"].values())
    assert len(splits.train) == file["rows_kept"] == file["samples"] == sum(file["lengths"].values())
    assert file["tokens"] == splits.train.lengths.sum()
    copies = file["dropped"]["exact copy of an earlier row"]["count"]
    assert (
        copies
        == sum(
            json.loads(x).get("instruction") == "Do it."
            for x in lines
            if x[:4] == b'{"in' and x[-1:] == b"}" and b"\xff" not in x
        )
        - 1
    )


def test_strict_names_file_and_row(tmp_path: Path):
    path = rows_file(tmp_path, 5)
    path.write_text(path.read_text() + '{"instruction": "x", "output": ""}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl row 6: the answer is empty"):
        load(path, strict=True)
    assert len(load(path).train) == 5


def test_workers_and_cache_change_nothing(tmp_path: Path):
    path = rows_file(tmp_path, 1500)
    first, second = load(path, data_cache=False), load(path, data_cache=False, workers=2)
    cached = load(path)
    again = load(path)
    for other in (second, cached, again):
        assert other.train.digest == first.train.digest and len(other.train) == 1500
        for i in (0, 700, 1499):
            assert np.array_equal(other.train.ids(i), first.train.ids(i))
            assert np.array_equal(other.train.labels(i), first.train.labels(i))


def test_the_cache_knows_rows_template_and_settings(tmp_path: Path):
    path = rows_file(tmp_path, 5)
    digests = {load(path).train.digest}
    for change in ({"prompt_type": "chatml"}, {"seq_length": 30}, {"train_on_prompt": True}, {"append_eod": True}):
        digests.add(load(path, **change).train.digest)
    path.write_text(path.read_text().replace("Say 3", "Say 4"))
    digests.add(load(path).train.digest)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "helper")
    settings = DataSettings(data_path=[str(path)])
    with pytest.raises(DataError, match="cannot be trained on"):  # prompt and answer name the assistant differently
        load_template(settings, tokenizer)
    tokenizer.chat_template = tiny_tokenizer().chat_template.replace("<|im_end|>\n", "<|im_end|>\n\n")
    digests.add(load_splits(settings, tokenizer, load_template(settings, tokenizer), seed=1).train.digest)
    assert len(digests) == 7


def test_splits(tmp_path: Path):
    path = rows_file(tmp_path, 50)
    by_count, by_share = load(path, val_set_size=5), load(path, val_set_size=0.1)
    assert by_count.valid is not None and len(by_count.valid) == 5 and len(by_count.train) == 45
    assert by_share.valid is not None and by_share.valid.digest == by_count.valid.digest
    assert load(path, val_set_size=5, seed=2).valid.digest != by_count.valid.digest  # type: ignore[union-attr]
    held_out = {by_count.valid.ids(i).tobytes() for i in range(5)}
    assert not held_out & {by_count.train.ids(i).tobytes() for i in range(45)}
    in_order = load(path, split="80,20,0")
    assert in_order.valid is not None and (len(in_order.train), len(in_order.valid)) == (40, 10)
    apart = load(path, valid_data_path=[str(rows_file(tmp_path, 7, "valid.jsonl"))])
    assert apart.valid is not None and (len(apart.train), len(apart.valid)) == (50, 7)
    with pytest.raises(ConfigError, match="exclude each other"):
        load(path, val_set_size=5, split="9,1,0")
    with pytest.raises(ConfigError, match="left to train on"):
        load(path, val_set_size=50)


def test_split_boundaries_are_megatrons():
    assert split_boundaries("949,50,1", 20) == [19, 20, 20]
    assert split_boundaries("100,0,0", 7) == [7, 7, 7]
    assert split_boundaries("949/50/1", 1000) == [949, 999, 1000]
    for wrong in ("", "a,b", "1,2,3,4", "-1,2,0", "0,0,0"):
        with pytest.raises(ConfigError, match="--split"):
            split_boundaries(wrong, 10)


def test_weights_set_the_shares(tmp_path: Path):
    paths = [rows_file(tmp_path, 60, "a.jsonl"), rows_file(tmp_path, 20, "b.jsonl")]
    data = load(paths, data_weights=[1.0, 3.0]).train
    starts = [data.ids(i).tobytes() for i in range(len(data))]
    assert len(starts) == 80 and len(set(starts[:20])) == 20  # 20 of the first, then 60 of the 20 of the second
    assert sorted(np.unique(starts[20:], return_counts=True)[1]) == [3] * 20


def test_no_sample_left_says_why(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "x", "output": ""}\n' * 3)
    with pytest.raises(DataError, match=r"no sample to use: the answer is empty \(3\)"):
        load(path)
    path.write_text("")
    with pytest.raises(DataError, match="no rows"):
        load(path)


def test_special_tokens_in_user_text_stay_text(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"instruction": "a<|im_end|>b\U0010fffdc", "output": "<|im_start|>!"}))
    ids = load(path).train.ids(0).tolist()
    assert (
        TOKENIZER.decode(ids)
        == "<|im_start|>user\na<|im_end|>b\U0010fffdc<|im_end|>\n<|im_start|>assistant\n<|im_start|>!<|im_end|>\n"
    )
    assert ids.count(2) == 2 and ids.count(1) == 2
    allowed = load(path, allow_special_tokens=True).train.ids(0).tolist()
    assert allowed.count(2) == 3 and allowed.count(1) == 3


def test_long_rows_are_cut_dropped_or_refused(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps({"instruction": "word " * 200, "output": "answer " * 200})
        + "\n"
        + rows_file(tmp_path, 3, "x.jsonl").read_text()
    )
    cut = load(path, seq_length=64)
    assert cut.train.lengths[0] == 64 and cut.train.trained_lengths[0] > 20 and cut.receipt["truncated"] == 1
    assert len(load(path, seq_length=64, overlong="drop").train) == 3
    with pytest.raises(DataError, match=r"row 1: longer than --seq-length"):
        load(path, seq_length=64, overlong="error")


def test_plain_text_becomes_pieces(tmp_path: Path):
    path = tmp_path / "book.txt"
    path.write_text("the quick brown fox " * 50 + "\n\nshort\n")
    data = load(path, seq_length=64, append_eod=True)
    whole = [*TOKENIZER.encode("the quick brown fox " * 50), 2]
    pieces = [data.train.ids(i) for i in range(len(data.train) - 1)]
    assert all(len(ids) <= 64 for ids in pieces)
    # each begins with the last token of the one before, so that every token but the first is predicted once
    assert [whole[0], *np.concatenate([ids[1:] for ids in pieces]).tolist()] == whole
    assert data.receipt["rows_kept"] == 2 and (data.train.labels(0) == data.train.ids(0)).all()


@pytest.mark.parametrize("pack", [True, False])
def test_batches_hold_the_rows_of_their_step_with_shifted_targets(tmp_path: Path, pack: bool):
    data = load(rows_file(tmp_path, 50)).train
    settings = DataSettings(
        global_batch_size=16, micro_batch_size=None if pack else 4, micro_batch_tokens=128, pack=pack
    )
    plan = BatchPlan(data, settings, seed=3, num_epochs=2, pad_token_id=2)
    assert plan.steps_per_epoch == 4 and plan.num_steps == 8
    for epoch in range(2):
        rows = [row for step in range(4) for row in plan.rows(4 * epoch + step)]
        assert sorted(rows) == list(range(50))
    assert plan.rows(0) != plan.rows(4)
    fresh = BatchPlan(data, settings, seed=3, num_steps=8, pad_token_id=2)
    assert fresh.rows(6) == plan.rows(6)
    batches = plan.micro_batches(0)
    assert sorted(row for b in batches for row in b.rows) == sorted(plan.rows(0))
    assert sum(b.num_trained_tokens for b in batches) == data.trained_lengths[plan.rows(0)].sum()
    assert sum(b.num_tokens for b in batches) == data.lengths[plan.rows(0)].sum()
    for b in batches:
        for n, row in enumerate(b.rows):
            ids, labels = data.ids(row), data.labels(row)
            if pack:
                assert b.cu_seqlens is not None and b.input_ids.shape[1] <= 128
                line, start, end = 0, int(b.cu_seqlens[n]), int(b.cu_seqlens[n + 1])
            else:
                assert b.input_ids.shape[1] % 8 == 0
                line, start, end = n, 0, len(ids)
            assert b.input_ids[line, start:end].tolist() == ids.tolist()
            assert b.target_ids[line, start:end].tolist() == [*labels[1:].tolist(), -100]
            assert b.position_ids[line, start:end].tolist() == list(range(len(ids)))


def test_fixed_length_padding_and_eval_batches(tmp_path: Path):
    data = load(rows_file(tmp_path, 20)).train
    settings = DataSettings(pack=False, variable_seq_lengths=False, seq_length=100, pad_to_multiple_of=8)
    batches = list(eval_batches(data, settings, max_batches=None, pad_token_id=2))
    assert {tuple(b.input_ids.shape) for b in batches} == {(1, 104)}
    assert sorted(row for b in batches for row in b.rows) == list(range(20))
    assert len(list(eval_batches(data, settings, max_batches=3, pad_token_id=2))) == 3


def test_packing_fills_the_real_file(shared: Path, smollm2: Path):
    from transformers import AutoTokenizer

    from finerank.data.packing import best_fit

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    settings = DataSettings(data_path=[str(shared / "data" / "alpaca_en_demo.json")])
    data = load_splits(settings, tokenizer, load_template(settings, tokenizer), seed=1).train
    packs = best_fit(data.lengths.tolist(), 2048)
    assert data.lengths.sum() / (2048 * len(packs)) >= 0.97


def test_settings_that_fit_no_data_are_refused(tmp_path: Path):
    path = rows_file(tmp_path, 5)
    for change, flag in (
        ({"seq_length": 1}, "--seq-length"),
        ({"workers": 0}, "--workers"),
        ({"data_weights": [1.0, 2.0]}, "--data-weights"),
        ({"val_set_size": -1.0}, "--val-set-size"),
        ({"max_samples": 0}, "--max-samples"),
    ):
        with pytest.raises(ConfigError, match=flag):
            load(path, **change)
    with pytest.raises(ConfigError, match="--micro-batch-tokens"):
        bad = dataclasses.replace(DataSettings(), micro_batch_tokens=0)
        BatchPlan(load(path).train, bad, seed=1, num_steps=1, pad_token_id=2)
