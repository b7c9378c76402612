"""Every kind of adapter through `finerank tune`: it learns, resumes exactly, runs in PEFT with our logits, merges."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from finerank import cli
from finerank.files import sha256_file
from finerank.generate.load import load_generator
from finerank.generate.settings import GeneratorSettings
from tiny import save_tiny, write_say_rows

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = ["--dtype", "fp32", "--device", "cpu", "--seq-length", "96", "--lora-r", "4", "--log-interval", "1000"]
FAST += ["--lr", "0.01", "--global-batch-size", "8", "--val-set-size", "8", "--save-interval-minutes", "0"]
FAST += ["--threads", "1", "--no-tune-runtime", "--train-iters", "6"]
IDS = torch.arange(48).reshape(2, 24) * 7 % 384

TARGETS = "--lora-target-modules"
PATTERNS = ["--lora-rank-pattern", "q_proj=2", "layers.1.mlp.down_proj=6", "--lora-alpha-pattern", "q_proj=3"]
EXPERTS = [TARGETS, "q_proj", "gate_up_proj", "down_proj"]
KINDS: dict[str, tuple[str, list[str]]] = {
    "rslora": ("llama", ["--use-rslora"]),
    "patterns": ("llama", [TARGETS, "q_proj", "down_proj", *PATTERNS]),
    "rslora-patterns": ("llama", [TARGETS, "q_proj", "down_proj", "--use-rslora", *PATTERNS]),
    "dora": ("llama", ["--use-dora"]),
    "dora-rslora-patterns": ("qwen2", [TARGETS, "q_proj", "down_proj", "--use-dora", "--use-rslora", *PATTERNS]),
    "dora-saved": ("llama", ["--use-dora", "--lora-modules-to-save", "model.norm", "lm_head"]),
    "loraplus": ("llama", ["--loraplus-lr-ratio", "4"]),
    "loraplus-embedding": ("llama", [TARGETS, "q_proj", "embed_tokens", "--loraplus-lr-ratio", "4"]),
    "pissa": ("llama", ["--init-lora-weights", "pissa"]),
    "pissa-patterns": ("llama", [TARGETS, "q_proj", "down_proj", "--init-lora-weights", "pissa", *PATTERNS]),
    "eva": ("llama", ["--init-lora-weights", "eva"]),
    "eva-dora-rslora": ("llama", ["--init-lora-weights", "eva", "--use-dora", "--use-rslora"]),
    "saved": ("llama", [TARGETS, "v_proj", "--lora-modules-to-save", "input_layernorm", "embed_tokens", "lm_head"]),
    "saved-tied": (
        "llama_tied",
        [TARGETS, "v_proj", "--lora-modules-to-save", "embed_tokens", "--ensure-weight-tying"],
    ),
    "embedding-head": ("llama", [TARGETS, "q_proj", "embed_tokens", "lm_head"]),
    "embedding-tied": ("llama_tied", [TARGETS, "q_proj", "embed_tokens", "--ensure-weight-tying"]),
    "head-tied": ("llama_tied", [TARGETS, "q_proj", "lm_head"]),
    "tokens": ("llama", [TARGETS, "q_proj", "--add-tokens", "<tool>", "</tool>"]),
    "tokens-dora-tied": ("llama_tied", [TARGETS, "q_proj", "--use-dora", "--add-tokens", "<tool>"]),
    "experts": ("mixtral", EXPERTS),
    "experts-shared-names": ("mixtral", [TARGETS, "linear_qkv", "linear_fc1", "linear_fc2"]),
    "experts-rslora-patterns": ("qwen3_moe", [*EXPERTS, "--use-rslora", "--lora-rank-pattern", "experts.down_proj=2"]),
    "experts-loraplus-saved": (
        "qwen3_moe",
        [*EXPERTS, "--loraplus-lr-ratio", "4", "--lora-modules-to-save", "lm_head"],
    ),
    "experts-tokens": ("mixtral", [*EXPERTS, "--add-tokens", "<tool>"]),
    "experts-saved-router": ("mixtral", [TARGETS, "q_proj", "--lora-modules-to-save", "mlp.gate", "mlp.experts"]),
    "experts-4bit": ("mixtral", [*EXPERTS, "--load-4bit"]),
}
"""By name: family and flags."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for family in {family for family, _ in KINDS.values()}:
        save_tiny(folder / family, family)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_say_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", before="<tool>")


def tune(base: Path, rows: Path, run: Path, *flags: str) -> int:
    return cli.main(["tune", "--load", str(base), "--data-path", str(rows), "--output-dir", str(run), *FAST, *flags])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_from_rows_to_a_merged_model(bases: Path, rows: Path, tmp_path: Path, kind: str):
    family, flags = KINDS[kind]
    if "--load-4bit" in flags:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    run, base = tmp_path / "run", bases / family
    assert tune(base, rows, run, *flags, "--save-interval", "3", "--keep-last", "9") == 0
    results = json.loads((run / "results.json").read_text())
    assert results["after_eval_loss"] < 0.97 * results["before_eval_loss"]
    assert tune(base, rows, tmp_path / "again", *flags, "--resume", str(run / "checkpoint-3")) == 0
    file = "adapter_model.safetensors"
    assert sha256_file(run / file) == sha256_file(tmp_path / "again" / file)

    # PEFT has the base as it came, a 4-bit run's generator would quantise it
    own = GeneratorSettings(load=str(run), dtype="fp32", device="cpu", base_precision="original")
    ours = logits(load_generator(own).model)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if ours.shape[-1] > plain.vocab_size:
        plain.resize_token_embeddings(ours.shape[-1], mean_resizing=False)
    theirs = logits(peft.PeftModel.from_pretrained(plain, run))
    known = slice(0, 384)  # a new row that is not trained is nobody's business
    assert (ours - theirs)[..., known].abs().max() < 1e-5
    if "tokens" in kind:
        assert (ours - theirs).abs().max() < 1e-5

    assert cli.main(["merge", str(run), "--save-dir", str(tmp_path / "merged")]) == 0
    merged = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    if "--load-4bit" not in flags:
        assert (ours - merged).abs().max() < 1e-4
    answers = json.loads((tmp_path / "merged" / "merge_report.json").read_text())["answers"]
    assert answers["mean_kl"] < 1e-6 and answers["greedy_agreement"] == 1


@pytest.mark.parametrize(
    ("family", "flags", "words"),
    [
        ("llama", [TARGETS, "q_proj", "embed_tokens", "--use-dora"], "--use-dora is for linears"),
        ("mixtral", [*EXPERTS, "--use-dora"], "--use-dora is for linears"),
        ("mixtral", [*EXPERTS, "--lora-dropout", "0.1"], "--lora-dropout cannot be applied to"),
        ("mixtral", [*EXPERTS, "--init-lora-weights", "eva"], "--init-lora-weights eva is no start for"),
        ("mixtral", [*EXPERTS, "--lu-lora-final-layer-index", "0"], "to the local rule, which cannot train it"),
        ("llama", [TARGETS, "gate_up_proj"], "matches no linear"),
        ("llama", ["--loraplus-lr-embedding", "1e-5"], "no effect without --loraplus-lr-ratio"),
        ("llama", ["--lora-modules-to-save", "mlp"], "name those"),
        ("llama", [TARGETS, "q_proj", "lm_head", "--lora-modules-to-save", "lm_head"], "name it once"),
        ("llama", [TARGETS, "embed_tokens", "--add-tokens", "<a>"], "cannot have a low-rank adapter too"),
        ("llama", ["--ensure-weight-tying"], "has no effect"),
        ("llama", ["--lora-rank-pattern", "o_prog=3"], "matches no adapted linear"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    bases: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    family: str,
    flags: list[str],
    words: str,
):
    assert tune(bases / family, rows, tmp_path / "run", *flags) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said


def test_going_on_from_megatron_equals_going_on_from_our_own(bases: Path, rows: Path, tmp_path: Path):
    base, flags = bases / "mixtral", ["--save-interval", "3", "--keep-last", "9"]
    assert tune(base, rows, tmp_path / "first", *EXPERTS) == 0
    assert cli.main(["export", str(tmp_path / "first"), "--to", "mcore", "--save-dir", str(tmp_path / "mcore")]) == 0
    for name in ("first", "mcore"):
        assert tune(base, rows, tmp_path / f"from_{name}", "--lora-load", str(tmp_path / name), *flags) == 0
    again = [tmp_path / "again", "--lora-load", str(tmp_path / "mcore"), *flags]
    assert tune(base, rows, *again, "--resume", str(tmp_path / "from_mcore" / "checkpoint-3")) == 0
    from safetensors.torch import load_file

    ours, theirs, resumed = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("from_first", "from_mcore", "again")
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
        assert torch.equal(resumed[name], theirs[name])
