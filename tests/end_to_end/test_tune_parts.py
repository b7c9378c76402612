"""What is trained beside the linears, from rows to a merged model: tuned, resumed, served and merged alike."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from finerank import cli
from finerank.files import sha256_file
from tiny import save_tiny

pytestmark = pytest.mark.usefixtures("one_thread")

FLAGS = ["--dtype", "fp32", "--device", "cpu", "--seq-length", "128", "--lora-r", "4", "--log-interval", "1000"]
FLAGS += ["--train-iters", "4", "--lr", "0.02"]

KINDS: dict[str, tuple[str, list[str]]] = {
    "whole": ("llama", ["--lora-modules-to-save", "embed_tokens", "lm_head"]),
    "whole and tied": ("gemma3", ["--lora-modules-to-save", "embed_tokens", "--ensure-weight-tying"]),
    "low rank": ("llama_tied", ["--lora-target-modules", "all-linear", "embed_tokens", "lm_head"]),
    "new tokens": ("llama", ["--add-tokens", "<tool>", "</tool>"]),
    "new tokens and tied": ("gemma3", ["--add-tokens", "<tool>", "</tool>", "--lora-target-modules", "q_proj"]),
    "new tokens and whole": ("llama", ["--add-tokens", "<tool>", "--lora-modules-to-save", "embed_tokens", "lm_head"]),
    "low rank and tied": ("llama_tied", ["--lora-target-modules", "q_proj", "lm_head", "--ensure-weight-tying"]),
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows that use a word which may be a token of its own."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = ["red", "green", "blue", "one"]
    made = [
        {"instruction": f"Say {words[i % 4]}.", "output": f"<tool>{words[i % 4]}</tool> " + words[i % 4]}
        for i in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def tune(base: Path, rows: Path, run: Path, *flags: str) -> int:
    given = ["--load", str(base), "--data-path", str(rows), "--output-dir", str(run), *FLAGS]
    return cli.main(["tune", *given, *flags])


def answer(capsys: pytest.CaptureFixture, *argv: str) -> str:
    capsys.readouterr()
    flags = ["--greedy", "--device", "cpu", "--dtype", "fp32", "--max-new-tokens", "12"]
    assert cli.main(["generate", "Say red.", *flags, *argv]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_from_rows_to_a_merged_model(kind: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    family, flags = KINDS[kind]
    base, run, broken, merged = (tmp_path / name for name in ("base", "run", "broken", "merged"))
    save_tiny(base, family)
    assert tune(base, rows, run, *flags, "--save-interval", "2") == 0
    digest = sha256_file(run / "adapter_model.safetensors")

    shutil.copytree(run, broken)
    shutil.rmtree(broken / "checkpoint-4")
    for name in ("results.json", "adapter_model.safetensors"):
        (broken / name).unlink()
    assert tune(base, rows, broken, *flags, "--save-interval", "2", "--resume", "auto") == 0
    assert sha256_file(broken / "adapter_model.safetensors") == digest

    assert cli.main(["merge", str(run), "--save-dir", str(merged), "--proof", "full"]) == 0
    report = json.loads((merged / "merge_report.json").read_text())
    assert report["answers"]["greedy_agreement"] == 1.0 and report["answers"]["max_logit_difference"] < 1e-3
    said = answer(capsys, "--load", str(run))
    assert answer(capsys, "--load", str(merged)) == said
    assert answer(capsys, "--load", str(base)) != said

    ours = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    peft = pytest.importorskip("peft")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if ours.config.vocab_size != theirs.config.vocab_size:
        theirs.resize_token_embeddings(ours.config.vocab_size)
    theirs = peft.PeftModel.from_pretrained(theirs, run).eval()
    ids = torch.arange(3, 40)[None]
    assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-4
