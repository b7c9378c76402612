"""`--stage pt` and `--stage dpo` from rows to a merged model: they learn what they should, and resume exactly."""

import json
import math
from pathlib import Path

import pytest

from finerank import cli
from finerank.files import sha256_file
from finerank.train import reference
from tiny import save_broken, save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

FLAGS = ["--dtype", "fp32", "--device", "cpu", "--seq-length", "96", "--lora-r", "4", "--log-interval", "1000"]
FLAGS += ["--lr", "0.01", "--global-batch-size", "8", "--save-interval-minutes", "0"]
FLAGS += ["--threads", "1", "--no-tune-runtime"]
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "llama", "llama", num_hidden_layers=4, hidden_size=64)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pairs whose chosen answer is always the polite one."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    words = ["red", "green", "blue", "one", "two", "three", "cat", "dog"]
    path.write_text(
        "".join(
            json.dumps({"instruction": f"Say {w} {i}.", "chosen": f"yes, {w} it is", "rejected": f"no {w}, go"}) + "\n"
            for i, w in enumerate(words * 5)
        )
    )
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    words = ["red", "green", "blue", "one", "two", "three", "cat", "dog"]
    path.write_text("".join(f"the {words[i % 8]} comes after the {words[(i + 7) % 8]}\n" for i in range(40)))
    return path


def tune(base: Path, rows: Path, run: Path, *flags: str, held_out: int = 8) -> int:
    given = ["--load", str(base), "--data-path", str(rows), "--output-dir", str(run), "--val-set-size", str(held_out)]
    return cli.main(["tune", *given, *FLAGS, *flags])


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


LOSSES: dict[str, list[str]] = {
    "sigmoid": ["--dpo-label-smoothing", "0.1"],
    "hinge": [],
    "ipo": [],
    "simpo": ["--simpo-gamma", "1"],
    "orpo": [],
    "dpo with a supervised part": ["--pref-ftx", "0.2"],
    "dpo, padded": ["--no-pack", "--micro-batch-size", "2"],
    "dpo, lu": ["--lu-lora-final-layer-index", "1"],
    "dpo, 4bit": ["--load-4bit"],
    "dpo, pissa": ["--init-lora-weights", "pissa"],
    "dpo, auto": ["--micro-batch-size", "auto"],
}


@pytest.mark.parametrize("kind", LOSSES)
def test_preferences_are_learned_and_resumed_exactly(kind: str, base: Path, pairs: Path, tmp_path: Path) -> None:
    if "4bit" in kind:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    loss = "sigmoid" if kind.startswith("dpo") else kind
    flags = ["--stage", "dpo", "--pref-loss", loss, *LOSSES[kind], "--train-iters", "10", "--save-interval", "4"]
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert tune(base, pairs, whole, *flags, "--keep-last", "9") == 0
    found, rows = results(whole), metrics(whole)
    assert found["after_eval_loss"] < found["before_eval_loss"] and found["loss_unit"] == "per pair"
    assert found["eval_measures"]["rewards/accuracies"] == 1.0
    assert rows[-1]["eval_rewards/margins"] > rows[0]["eval_rewards/margins"]
    assert rows[-1]["rewards/chosen"] - rows[-1]["rewards/rejected"] == pytest.approx(rows[-1]["rewards/margins"])
    assert tune(base, pairs, again, *flags, "--resume", str(whole / "checkpoint-4")) == 0
    assert sha256_file(again / ADAPTER) == sha256_file(whole / ADAPTER)


def test_before_training_dpo_knows_no_preference(base: Path, pairs: Path, tmp_path: Path) -> None:
    assert tune(base, pairs, tmp_path / "run", "--stage", "dpo", "--train-iters", "1") == 0
    row = metrics(tmp_path / "run")[0]
    assert row["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert abs(row["eval_rewards/margins"]) < 1e-4


def test_the_reference_is_computed_once(
    base: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--stage", "dpo", "--train-iters", "6", "--save-interval", "3", "--keep-last", "9"]
    assert tune(base, pairs, tmp_path / "run", *flags) == 0
    assert capsys.readouterr().err.count("one pass over them") == 2  # rows to train on, rows held out
    assert tune(base, pairs, tmp_path / "beta", *flags, "--pref-beta", "0.5") == 0
    assert "one pass" not in capsys.readouterr().err
    digest = sha256_file(tmp_path / "run" / ADAPTER)
    assert sha256_file(tmp_path / "beta" / ADAPTER) != digest

    # without the kept numbers, a resumed run finds the same ones: of the base, not of what was restored
    monkeypatch.setattr(reference, "_read", lambda *a: None)
    assert tune(base, pairs, tmp_path / "again", *flags, "--resume", str(tmp_path / "run" / "checkpoint-3")) == 0
    assert "one pass" in capsys.readouterr().err and sha256_file(tmp_path / "again" / ADAPTER) == digest


def test_a_damaged_reference_file_is_made_anew(base: Path, pairs: Path, tmp_path: Path, capsys) -> None:
    from finerank.files import cache_folder

    flags = ["--stage", "dpo", "--train-iters", "2"]
    assert tune(base, pairs, tmp_path / "run", *flags) == 0
    files = sorted((cache_folder() / "reference").iterdir())
    for file in files:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    capsys.readouterr()
    assert tune(base, pairs, tmp_path / "again", *flags) == 0
    assert capsys.readouterr().err.count("one pass") == len(files) == 2
    assert sha256_file(tmp_path / "again" / ADAPTER) == sha256_file(tmp_path / "run" / ADAPTER)


def test_going_on_from_an_adapter_takes_it_as_the_reference(base: Path, pairs: Path, tmp_path: Path) -> None:
    assert tune(base, pairs, tmp_path / "first", "--stage", "dpo", "--train-iters", "6") == 0
    first = ["--lora-load", str(tmp_path / "first")]
    assert tune(base, pairs, tmp_path / "second", *first, "--stage", "dpo", "--train-iters", "2") == 0
    row = metrics(tmp_path / "second")[0]
    assert row["eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert results(tmp_path / "second")["base_eval_loss"] == row["eval_loss"]


def test_from_pairs_to_a_merged_model(base: Path, pairs: Path, tmp_path: Path, capsys) -> None:
    run, merged = tmp_path / "run", tmp_path / "merged"
    assert tune(base, pairs, run, "--stage", "dpo", "--train-iters", "10") == 0
    card = (run / "README.md").read_text()
    assert "| held-out loss | per pair |" in card and "rewards/accuracies: 1.0000" in card and "pref_loss" in card
    assert "100.0% of the held-out pairs" in capsys.readouterr().out
    assert cli.main(["merge", str(run), "--save-dir", str(merged)]) == 0
    assert json.loads((merged / "merge_report.json").read_text())["answers"]["greedy_agreement"] == 1.0
    flags = ["--greedy", "--device", "cpu", "--dtype", "fp32", "--max-new-tokens", "4"]
    assert cli.main(["generate", "Say red 0.", "--load", str(merged), *flags]) == 0


def test_a_broken_step_over_pairs_is_replayed(base: Path, pairs: Path, tmp_path: Path, capsys) -> None:
    broken = save_broken(tmp_path / "broken", base, weight="model.layers.2.mlp.up_proj.weight", at=(0, 0))
    run = tmp_path / "run"
    flags = ["--stage", "dpo", "--pref-loss", "orpo", "--train-iters", "2", "--no-pack"]
    assert tune(broken, pairs, run, *flags, held_out=0) == 4
    capsys.readouterr()
    replay = run / "nonfinite-step-1.safetensors"
    assert cli.main(["tune", "--config", str(run / "config.yaml"), "--replay", str(replay)]) == 4
    assert "model.layers.2.mlp.up_proj" in capsys.readouterr().out
    # and with numbers of a reference, which the file holds
    assert tune(broken, pairs, tmp_path / "dpo", "--stage", "dpo", "--no-pack") == 4
    assert "reference log-probability of pair 0 is not finite" in capsys.readouterr().err


def test_plain_text_is_continued_and_resumed_exactly(base: Path, texts: Path, tmp_path: Path) -> None:
    flags = ["--stage", "pt", "--train-iters", "10", "--save-interval", "4"]
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert tune(base, texts, whole, *flags, "--keep-last", "9") == 0
    found = results(whole)
    assert found["after_eval_loss"] < 0.8 * found["before_eval_loss"] and found["loss_unit"] == "nats per token"
    assert tune(base, texts, again, *flags, "--resume", str(whole / "checkpoint-4")) == 0
    assert sha256_file(again / ADAPTER) == sha256_file(whole / ADAPTER)
    assert cli.main(["merge", str(whole), "--save-dir", str(tmp_path / "merged")]) == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--pref-beta", "0.2"], "no effect with --stage sft"),
        (["--stage", "dpo", "--pref-loss", "sigmod"], "sigmoid"),
        (["--stage", "dpo", "--pref-beta", "0"], "--pref-beta must be above 0"),
        (["--stage", "dpo", "--dpo-label-smoothing", "0.5"], "below 0.5"),
        (["--stage", "dpo", "--pref-loss", "ipo", "--dpo-label-smoothing", "0.1"], "no effect with --pref-loss ipo"),
        (["--stage", "dpo", "--simpo-gamma", "1"], "no effect with --pref-loss sigmoid"),
        (["--stage", "pt"], "pairs of a chosen and a rejected answer"),
        (["--stage", "dpo", "--train-on-prompt"], "no effect with --stage dpo"),
        (
            ["--stage", "dpo", "--lu-lora-final-layer-index", "1", "--lu-lora-rule", "frozen", "--cache-boundary"],
            "leave it out",
        ),
    ],
)
def test_bad_flags_are_one_sentence(
    base: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], words: str
) -> None:
    assert tune(base, pairs, tmp_path / "run", *flags) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said
