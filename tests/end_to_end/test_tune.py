"""tune from rows to a run folder, on a tiny model: everything a user is promised about it."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from finerank import cli
from finerank.files import sha256_file
from tiny import save_broken

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = ["--dtype", "fp32", "--device", "cpu", "--seq-length", "128", "--lora-r", "4", "--log-interval", "1000"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 rows of a task that a tiny model learns: repeat a word."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = ["red", "green", "blue", "one", "two", "three", "cat", "dog"]
    made = [
        {"instruction": f"Say {words[i % 8]} {i // 8 + 1} times.", "output": " ".join([words[i % 8]] * (i // 8 + 1))}
        for i in range(48)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def tune(base: Path, rows: Path, run: Path, *flags: str) -> int:
    usual = ["--load", str(base), "--data-path", str(rows), "--output-dir", str(run), *FAST]
    pairs = [pair for pair in zip(usual[::2], usual[1::2], strict=True) if pair[0] not in flags]
    return cli.main(["tune", *(word for pair in pairs for word in pair), *flags])


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, rows: Path) -> Path:
    """A run that learned, with held-out rows."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    flags = ["--num-epochs", "3", "--lr", "0.02", "--val-set-size", "8", "--global-batch-size", "8"]
    assert tune(tiny_folder, rows, run, *flags) == 0
    return run


def test_the_run_folder_is_whole_and_the_task_was_learned(finished: Path) -> None:
    names = {p.name for p in finished.iterdir()}
    expected = "config.yaml metrics.jsonl adapter_config.json adapter_model.safetensors tokenizer.json README.md"
    expected += " training_loss.png results.json template.json receipt.json chat_template.jinja"
    assert set(expected.split()) <= names and not any("aside" in name or name == "run.lock" for name in names)
    found = results(finished)
    assert found["after_eval_loss"] < 0.7 * found["before_eval_loss"] and found["steps"] == 15
    assert found["adapter_sha256"] == sha256_file(finished / "adapter_model.safetensors")
    assert [row["step"] for row in metrics(finished)] == list(range(16))
    assert all(row["loss"] > 0 and row["trained_tokens"] > 0 for row in metrics(finished)[1:])
    assert (finished / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    assert "after tuning" in (finished / "README.md").read_text()


def test_peft_loads_the_adapter_with_the_same_held_out_behaviour(finished: Path, tiny_folder: Path) -> None:
    peft = pytest.importorskip("peft")
    from finerank.adapters.files import load_adapter

    ids = torch.arange(3, 40)[None]
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(finished, dtype=torch.float32).eval()
    ours = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    base = ours(ids).logits
    load_adapter(ours, finished)
    assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-5
    assert (ours(ids).logits - base).abs().max() > 0.1


def test_its_config_does_the_same_again(finished: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert cli.main(["tune", "--config", str(finished / "config.yaml"), "--output-dir", str(again)]) == 0
    assert sha256_file(again / "adapter_model.safetensors") == results(finished)["adapter_sha256"]


def test_splits_and_packing_give_the_same_adapter_up_to_rounding(tmp_path: Path, tiny_folder: Path, rows: Path) -> None:
    from safetensors.torch import load_file

    ways = {
        "packed": [],
        "packed small": ["--micro-batch-tokens", "128"],
        "padded 1x16": ["--no-pack", "--micro-batch-size", "16"],
        "padded 2x8": ["--no-pack", "--micro-batch-size", "8"],
        "padded 16x1": ["--no-pack", "--micro-batch-size", "1"],
    }
    adapters = {}
    for name, flags in ways.items():
        assert tune(tiny_folder, rows, tmp_path / name, "--train-iters", "2", "--lr", "0.01", *flags) == 0
        adapters[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    for name, tensors in adapters.items():
        assert metrics(tmp_path / name)[0]["loss"] == pytest.approx(metrics(tmp_path / "packed")[0]["loss"], rel=1e-5)
        assert metrics(tmp_path / name)[0]["grad_norm"] == pytest.approx(
            metrics(tmp_path / "packed")[0]["grad_norm"], rel=1e-4
        )
        for key, tensor in tensors.items():
            # AdamW's first steps are near the sign of the gradient: where that is almost 0, rounding shows most
            difference = (tensor - adapters["packed"][key]).abs()
            assert difference.median() < 1e-6 and difference.mean() < 1e-4, (name, key)


def test_a_finished_run_is_kept_unless_asked(finished: Path, tiny_folder: Path, rows: Path, capsys) -> None:
    before = (finished / "results.json").read_bytes()
    assert tune(tiny_folder, rows, finished, "--train-iters", "1") == 2
    assert "--overwrite-output-dir" in capsys.readouterr().err
    assert (finished / "results.json").read_bytes() == before


def test_overwriting_replaces_a_run(tmp_path: Path, tiny_folder: Path, rows: Path) -> None:
    assert tune(tiny_folder, rows, tmp_path / "run", "--train-iters", "3") == 0
    assert tune(tiny_folder, rows, tmp_path / "run", "--train-iters", "2", "--overwrite-output-dir") == 0
    assert results(tmp_path / "run")["steps"] == 2
    assert not (tmp_path / "run" / "checkpoint-3").exists()


def test_the_best_weights_can_become_the_adapter(tmp_path: Path, tiny_folder: Path, rows: Path) -> None:
    flags = ["--train-iters", "8", "--eval-interval", "1", "--val-set-size", "8"]
    flags += ["--lr", "3.0", "--lr-warmup-init", "0.02", "--lr-warmup-iters", "7"]
    assert tune(tiny_folder, rows, tmp_path, *flags, "--final-adapter", "best") == 0
    found = results(tmp_path)
    assert found["best_step"] < 8, "the learning rate was to overshoot"
    best = tmp_path / f"checkpoint-{found['best_step']}" / "adapter_model.safetensors"
    assert found["adapter_sha256"] == sha256_file(best) and found["after_eval_loss"] == found["best_eval_loss"]


def test_going_on_from_an_adapter(finished: Path, tmp_path: Path, tiny_folder: Path, rows: Path) -> None:
    flags = ["--lora-load", str(finished), "--train-iters", "2", "--val-set-size", "8", "--lr", "0.001"]
    assert tune(tiny_folder, rows, tmp_path / "more", *flags) == 0
    found = results(tmp_path / "more")
    assert found["before_eval_loss"] < 0.7 * found["base_eval_loss"]
    assert found["before_eval_loss"] == pytest.approx(results(finished)["after_eval_loss"], rel=1e-5)


def test_more_epochs_go_on_with_the_flag_only(tmp_path: Path, tiny_folder: Path, rows: Path, capsys) -> None:
    assert tune(tiny_folder, rows, tmp_path, "--train-iters", "2") == 0
    assert tune(tiny_folder, rows, tmp_path, "--train-iters", "4", "--resume", "auto") == 2
    assert "train_iters was 2, is 4" in capsys.readouterr().err
    assert tune(tiny_folder, rows, tmp_path, "--train-iters", "4", "--resume", "auto", "--resume-anyway") == 0
    assert results(tmp_path)["steps"] == 4 and [row["step"] for row in metrics(tmp_path)] == [1, 2, 3, 4]


def test_other_rows_are_refused_when_resuming(tmp_path: Path, tiny_folder: Path, rows: Path, capsys) -> None:
    assert tune(tiny_folder, rows, tmp_path / "run", "--train-iters", "2") == 0
    other = tmp_path / "other.jsonl"
    other.write_text(rows.read_text().replace("green", "white"))
    assert tune(tiny_folder, other, tmp_path / "run", "--train-iters", "2", "--resume", "auto", "--resume-anyway") == 2
    assert "data was" in capsys.readouterr().err


def test_a_broken_model_is_traced_and_replayed(tmp_path: Path, tiny_folder: Path, rows: Path, capsys) -> None:
    broken = save_broken(tmp_path / "broken", tiny_folder, weight="model.layers.1.mlp.down_proj.weight", at=(3, 5))
    run = tmp_path / "run"
    assert tune(broken, rows, run, "--train-iters", "2", "--no-pack") == 4
    said = capsys.readouterr().err
    assert "Step 1" in said and "model.layers.1.mlp.down_proj" in said and "rows " in said
    replay = run / "nonfinite-step-1.safetensors"
    assert cli.main(["tune", "--config", str(run / "config.yaml"), "--replay", str(replay)]) == 4
    assert "model.layers.1.mlp.down_proj" in capsys.readouterr().out
    healthy = ["tune", "--config", str(run / "config.yaml"), "--replay", str(replay), "--load", str(tiny_folder)]
    assert cli.main(healthy) == 0
    assert "finite this time" in capsys.readouterr().out


def test_dry_run_touches_no_file(tmp_path: Path, rows: Path, capsys) -> None:
    assert tune(tmp_path / "no model", rows, tmp_path / "run", "--dry-run") == 0
    assert yaml.safe_load(capsys.readouterr().out)["lora_r"] == 4
    assert list(tmp_path.iterdir()) == []


BAD = [
    (["--load", "{tmp}/absent"], "absent"),
    (["--load", "{tmp}"], "config.json"),
    (["--lora-r", "0"], "rank must be at least 1"),
    (["--lora-target-modules", "qproj"], "q_proj"),
    (["--lora-rnak", "4"], "Did you mean '--lora-rank'"),
    (["--data-path", "{tmp}/absent.json"], "absent.json"),
    (["--data-path", "{tmp}/empty.jsonl"], "no rows"),
    (["--data-path", "{tmp}/fields.jsonl"], "fields.jsonl"),
    (["--lr", "fast"], "--lr needs a number"),
    (["--report-to", "tensorbord"], "tensorboard"),
    (["--early-stopping-patience", "2"], "--val-set-size"),
    (["--final-adapter", "best"], "--val-set-size"),
    (["--resume", "{tmp}/checkpoint-7"], "checkpoint-7"),
    (["--replay", "{tmp}/empty.jsonl"], "replay file"),
    (["--global-batch-size", "0"], "--global-batch-size"),
    (["--config", "{tmp}/bad.yaml"], "Did you mean 'lora_r'"),
]


@pytest.mark.parametrize(("flags", "words"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_input_is_one_sentence(tmp_path, tiny_folder, rows, capsys, flags: list[str], words: str) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "fields.jsonl").write_text('{"question": 1, "nothing": 2}\n')
    (tmp_path / "bad.yaml").write_text("lora_rr: 4\n")
    run = tmp_path / "run"
    code = tune(tiny_folder, rows, run, "--train-iters", "1", *[f.format(tmp=tmp_path) for f in flags])
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and words in said[-1] and said[-1].startswith("finerank: ") and "Traceback" not in "".join(said)
    assert not run.exists(), "a run that never began leaves no folder"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path, tiny_folder: Path, rows: Path, capsys) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    assert tune(tiny_folder, rows, tmp_path / "closed" / "run", "--train-iters", "1") == 5
    assert "choose a folder you may write to" in capsys.readouterr().err


def test_twenty_steps_on_real_rows_lower_the_held_out_loss(tmp_path: Path, tiny_folder: Path, shared: Path) -> None:
    flags = ["--train-iters", "20", "--lr", "0.01", "--val-set-size", "32", "--max-samples", "400"]
    assert tune(tiny_folder, shared / "data" / "alpaca_en_demo.json", tmp_path, *flags) == 0
    found = results(tmp_path)
    assert found["after_eval_loss"] < found["before_eval_loss"] - 0.2
