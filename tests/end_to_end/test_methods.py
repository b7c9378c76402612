"""LU-LoRA, QLoRA, DoRA and LoRA+ through `finerank tune`: they learn, resume exactly, and merge."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finerank import cli, config
from finerank.files import sha256_file
from finerank.generate.load import load_generator
from finerank.recipes import generate
from tiny import save_tiny, write_say_rows

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = ["--dtype", "fp32", "--device", "cpu", "--seq-length", "96", "--lora-r", "4", "--log-interval", "1000"]
FAST += ["--lr", "0.02", "--global-batch-size", "8", "--val-set-size", "8", "--save-interval-minutes", "0"]

LU = ["--lu-lora-final-layer-index", "1"]
METHODS = {
    "lora": [],
    "feedback": [*LU, "--lu-lora-rule", "feedback", "--lu-lora-r", "8"],
    "sampled": [*LU, "--lu-lora-rule", "sampled", "--lu-lora-r", "8", "--lu-lora-sample", "0.3"],
    "frozen": [*LU, "--lu-lora-rule", "frozen"],
    "mindspeed": [*LU, "--lu-lora-rule", "mindspeed", "--lu-lora-lr", "1e-3"],
    "dora": ["--use-dora"],
    "loraplus": ["--loraplus-lr-ratio", "4"],
    "pissa": ["--init-lora-weights", "pissa_niter_4", "--lora-target-modules", "linear_qkv", "linear_fc1", "o_proj"],
    "pissa-dora": ["--init-lora-weights", "pissa", "--use-dora", "--use-rslora"],
    "olora": ["--init-lora-weights", "olora", "--lora-rank-pattern", "down_proj=2"],
    "eva": ["--init-lora-weights", "eva", "--eva-rho", "3"],
    "orthogonal": ["--init-lora-weights", "orthogonal"],
    "4bit": ["--load-4bit"],
    "4bit-pissa": ["--load-4bit", "--init-lora-weights", "pissa"],
    "8bit-feedback": ["--load-8bit", *LU, "--lu-lora-rule", "feedback"],
    "4bit-sampled": ["--load-4bit", *LU, "--lu-lora-rule", "sampled"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "llama", "llama", num_hidden_layers=4, hidden_size=64)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_say_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


def tune(base: Path, rows: Path, run: Path, *flags: str) -> int:
    return cli.main(["tune", "--load", str(base), "--data-path", str(rows), "--output-dir", str(run), *FAST, *flags])


@pytest.mark.parametrize("method", METHODS)
def test_learns_and_resumes_exactly(base: Path, rows: Path, tmp_path: Path, method: str):
    if "bit" in method:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    flags = [*METHODS[method], "--train-iters", "10"]
    assert tune(base, rows, tmp_path / "whole", *flags, "--save-interval", "4", "--keep-last", "9") == 0
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["after_eval_loss"] < 0.9 * results["before_eval_loss"]
    middle = tmp_path / "whole" / "checkpoint-4"
    assert tune(base, rows, tmp_path / "again", *flags, "--resume", str(middle)) == 0
    file = "adapter_model.safetensors"
    assert sha256_file(tmp_path / "whole" / file) == sha256_file(tmp_path / "again" / file)


@pytest.mark.parametrize("method", ["feedback", "dora", "4bit", "pissa", "eva"])
def test_run_merges_into_the_whole_base(base: Path, rows: Path, tmp_path: Path, method: str):
    if "bit" in method:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    assert tune(base, rows, tmp_path / "run", *METHODS[method], "--train-iters", "6") == 0
    assert cli.main(["merge", str(tmp_path / "run"), "--save-dir", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "merge_report.json").is_file()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_base_is_loaded_as_it_was_trained(
    base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], bits: int
):
    """By generate, from the run and its checkpoint, also where --load names the base; by tune with a warning."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    run, flag = tmp_path / "run", f"--load-{bits}bit"
    more = ["--train-iters", "4", "--save-interval", "2", "--keep-last", "9", "--qlora-save-dequantize"]
    assert tune(base, rows, run, flag, *more) == 0

    def logits(*flags: str) -> torch.Tensor:
        capsys.readouterr()
        argv = ["red", "--device", "cpu", "--dtype", "fp32", *flags]
        model = load_generator(config.parse(generate.Settings, argv, verb="generate").settings).model
        with torch.no_grad():
            return model(input_ids=torch.arange(3, 20)[None]).logits

    expected, original = logits("--load", str(run), flag), logits("--load", str(run), "--base-precision", "original")
    assert not torch.equal(expected, original)
    assert torch.equal(logits("--load", str(run)), expected)
    assert torch.equal(logits("--load", str(base), "--lora-load", str(run)), expected)
    assert torch.equal(logits("--load", str(run / "checkpoint-2")), logits("--load", str(run / "checkpoint-2"), flag))
    # a base that holds the rounding already is not rounded again
    saved = logits("--load", str(run / "dequantized_base"), "--lora-load", str(run))
    torch.testing.assert_close(saved, expected, rtol=1e-4, atol=1e-4)

    # nor does merging onto it round a second time
    saved_base, merged = ["--load", str(run / "dequantized_base"), "--lora-load"], [tmp_path / "m", tmp_path / "saved"]
    assert cli.main(["merge", str(run), "--save-dir", str(merged[0])]) == 0
    assert cli.main(["merge", *saved_base, str(run), "--save-dir", str(merged[1])]) == 0
    first, second = (load_file(folder / "model.safetensors") for folder in merged)
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)

    assert cli.main(["generate", "red", "--load", str(run), "--device", "cpu", "--max-new-tokens", "2"]) == 0
    assert f"the base is loaded in {bits} bits, as in training" in capsys.readouterr().err
    assert tune(base, rows, tmp_path / "on", "--lora-load", str(run), "--train-iters", "1") == 0
    assert f"was trained over a base in {bits} bits; add {flag}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lu-lora-final-layer-index", "3"], "give 0 to 2"),
        (["--lu-lora-lr", "1e-3"], "no effect without --lu-lora-final-layer-index"),
        (["--load-4bit", "--load-8bit"], "exclude each other"),
        (["--loraplus-lr-ratio", "0"], "must be above 0"),
        (["--init-lora-weights", "pisa"], "pissa"),
        (["--init-lora-weights", "pissa", "--lora-rank-pattern", "down_proj=65"], "components"),
        (["--eva-rho", "2"], "no effect without --init-lora-weights eva"),
        (["--lu-lora-final-layer-index", "1", "--lu-lora-rule", "hebb"], "Unknown choice 'hebb'"),
    ],
)
def test_bad_flags_are_one_sentence(
    base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
):
    assert tune(base, rows, tmp_path / "run", *flags) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said


def test_an_adapter_of_other_weights_is_warned_about(
    base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert tune(base, rows, tmp_path / "run", "--train-iters", "1") == 0
    other = save_tiny(tmp_path / "other", "llama", num_hidden_layers=4, hidden_size=64, seed=3)
    for load, warned in ((base, False), (other, True)):
        capsys.readouterr()
        on = ["--lora-load", str(tmp_path / "run"), "--train-iters", "1"]
        assert tune(load, rows, tmp_path / f"on-{load.name}", *on) == 0
        assert ("was trained on other base weights than those of" in capsys.readouterr().err) is warned
