"""`--method full` from rows to a model that every verb finds; kept, resumed, refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finerank import cli
from finerank.files import sha256_file
from tiny import save_broken, save_tiny, write_say_rows

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = ["--device", "cpu", "--seq-length", "96", "--log-interval", "1000", "--lr", "0.003", "--global-batch-size", "8"]
FAST += ["--val-set-size", "8", "--save-interval-minutes", "0", "--no-tune-runtime", "--method", "full"]
MODEL = Path("model") / "model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "llama", "llama_tied", num_hidden_layers=3, hidden_size=64)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_say_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


def tune(base: Path, rows: Path, run: Path, *flags: str) -> int:
    return cli.main(["tune", "--load", str(base), "--data-path", str(rows), "--output-dir", str(run), *FAST, *flags])


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


@pytest.fixture(scope="module")
def whole(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert (
        tune(base, rows, run, "--dtype", "bf16", "--train-iters", "8", "--save-interval", "3", "--keep-last", "9") == 0
    )
    return run


def test_it_learns_and_leaves_a_model(base: Path, whole: Path) -> None:
    found = results(whole)
    assert found["after_eval_loss"] < 0.9 * found["before_eval_loss"] and found["method"] == "full"
    tensors, before = load_file(whole / MODEL), load_file(base / "model.safetensors")
    assert tensors.keys() == before.keys() and all(t.dtype == torch.bfloat16 for t in tensors.values())
    assert found["model_sha256"] == sha256_file(whole / MODEL) and "adapter_sha256" not in found
    assert found["trained_parameters"] == sum(t.numel() for t in tensors.values())
    assert not (whole / "adapter_config.json").exists() and not list(whole.glob("checkpoint-*/adapter*"))
    card = (whole / "README.md").read_text()
    assert "AutoModelForCausalLM" in card and "adapter" not in card.lower() and found["model_sha256"] in card


@pytest.mark.parametrize(
    "flags",
    [
        ["--dtype", "bf16"],
        ["--dtype", "fp32", "--no-pack", "--micro-batch-size", "3", "--async-save"],
        ["--dtype", "bf16", "--micro-batch-size", "auto", "--final-adapter", "best", "--add-tokens", "<new>"],
    ],
    ids=["bf16", "fp32-padded", "bf16-auto-best-tokens"],
)
def test_a_resumed_run_leaves_the_same_bytes(base: Path, rows: Path, tmp_path: Path, flags: list[str]) -> None:
    flags = [*flags, "--train-iters", "7"]
    assert tune(base, rows, tmp_path / "whole", *flags, "--save-interval", "3", "--keep-last", "9") == 0
    middle = tmp_path / "whole" / "checkpoint-3"
    state = load_file(middle / "state.safetensors")
    assert all(t.dtype == torch.float32 for t in state.values())
    assert {name.partition("/")[0] for name in state} == {"parameter", "optimizer"}
    again = tmp_path / "again"
    assert tune(base, rows, again, *flags, "--resume", str(middle)) == 0
    assert sha256_file(again / MODEL) == sha256_file(tmp_path / "whole" / MODEL)
    last = [load_file(run / "checkpoint-7" / "state.safetensors") for run in (tmp_path / "whole", again)]
    assert last[0].keys() == last[1].keys() and all(torch.equal(last[0][name], last[1][name]) for name in last[0])


def test_every_verb_finds_the_model(base: Path, rows: Path, whole: Path, tmp_path: Path, capsys) -> None:
    capsys.readouterr()
    flags = ["--greedy", "--device", "cpu", "--max-new-tokens", "6"]
    assert cli.main(["generate", "Say red.", "--load", str(whole), *flags]) == 0
    answer = capsys.readouterr().out
    assert cli.main(["generate", "Say red.", "--load", str(whole / "model"), *flags]) == 0
    assert capsys.readouterr().out == answer and answer.strip()

    gguf, mcore, back = tmp_path / "gguf", tmp_path / "mcore", tmp_path / "back"
    assert cli.main(["convert", "--load-dir", str(whole), "--save-model-type", "gguf", "--save-dir", str(gguf)]) == 0
    to = ["--save-model-type", "mg", "--target-tensor-parallel-size", "2", "--save-dir", str(mcore)]
    assert cli.main(["convert", "--load-dir", str(whole), *to]) == 0
    assert cli.main(["convert", "--load-dir", str(mcore), "--save-dir", str(back), "--hf-cfg-dir", str(base)]) == 0
    wanted = load_file(whole / MODEL)
    assert all(torch.equal(t, wanted[n]) for n, t in load_file(back / "model.safetensors").items() if n in wanted)

    assert cli.main(["report", str(whole), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "SHA-256 of the model" in page and results(whole)["model_sha256"] in page

    run = tmp_path / "adapter"
    on_it = ["tune", "--load", str(whole), "--data-path", str(rows), "--output-dir", str(run), "--device", "cpu"]
    assert cli.main([*on_it, "--train-iters", "2", "--no-tune-runtime", "--lr", "0.01"]) == 0
    assert cli.main(["merge", str(run), "--save-dir", str(tmp_path / "merged")]) == 0


def test_where_an_adapter_is_needed_one_sentence_says_so(base: Path, whole: Path, rows: Path, tmp_path, capsys) -> None:
    out = ["--save-dir", str(tmp_path / "out")]
    lora = ["tune", "--load", str(base), "--data-path", str(rows), "--output-dir", str(tmp_path / "run")]
    for command in (
        ["merge", str(whole), *out],
        ["merge", "--load", str(base), "--lora-load", str(whole), *out],
        ["merge", "--adapters", f"{whole}:0.5", f"{whole}:0.5", *out],
        ["export", str(whole), "--to", "peft", *out],
        ["convert", "--load-dir", str(base), "--lora-load", str(whole), *out],
        ["generate", "hello", "--load", str(base), "--lora-load", str(whole)],
        [*lora, "--lora-load", str(whole)],
    ):
        capsys.readouterr()
        assert cli.main(command) == 2, command
        said = capsys.readouterr().err
        assert "was trained with --method full and holds a whole model, no adapter" in said and "Traceback" not in said
    assert cli.main(["generate", "hello", "--load", str(whole / "checkpoint-3")]) == 2
    assert "holds the state of a run of --method full, not a model" in capsys.readouterr().err


def test_a_model_is_not_written_over_unless_asked(base: Path, rows: Path, whole: Path, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    flags = ["--dtype", "bf16", "--train-iters", "1"]
    assert tune(base, rows, run, *flags) == 2 and "holds a finished run" in capsys.readouterr().err
    over = [*flags, "--overwrite-output-dir"]
    assert tune(run, rows, run, *over) == 2 and tune(run / "model", rows, run, *over) == 2
    assert "holds the model that --load names" in capsys.readouterr().err and (run / MODEL).is_file()
    assert tune(base, rows, run, *over) == 0 and sha256_file(run / MODEL) != results(whole)["model_sha256"]
    # a run of another kind removes it; a folder of that name that no run made stays
    lora = ["tune", "--load", str(base), "--data-path", str(rows), "--output-dir", str(run), "--device", "cpu"]
    assert cli.main([*lora, "--train-iters", "1", "--no-tune-runtime", "--overwrite-output-dir"]) == 0
    assert not (run / "model").exists()
    other = tmp_path / "other"
    shutil.copytree(base, other / "model")
    assert tune(base, rows, other, *over) == 2 and "was not written by a run" in capsys.readouterr().err
    assert sorted(p.name for p in (other / "model").iterdir()) == sorted(p.name for p in base.iterdir())


def test_preferences_against_the_model_as_it_was(base: Path, tmp_path: Path, capsys) -> None:
    """The reference is the base, also in a resumed run that has to compute it anew."""
    import math

    pairs = tmp_path / "pairs.jsonl"
    words = ["red", "green", "blue", "one", "two", "three", "cat", "dog"]
    made = [
        {"instruction": f"Say {w} {i}.", "chosen": f"yes, {w}", "rejected": f"no {w}"} for i, w in enumerate(words * 5)
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in made))
    flags = ["--stage", "dpo", "--dtype", "fp32", "--train-iters", "6", "--save-interval", "3", "--keep-last", "9"]
    run, again = tmp_path / "run", tmp_path / "again"
    assert tune(base, pairs, run, *flags) == 0
    assert results(run)["before_eval_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert results(run)["after_eval_loss"] < 0.5
    capsys.readouterr()
    assert tune(base, pairs, again, *flags, "--no-data-cache", "--resume", str(run / "checkpoint-3")) == 0
    assert "one pass" in capsys.readouterr().err and sha256_file(again / MODEL) == sha256_file(run / MODEL)


def test_plain_text(base: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"the {i % 5} comes after the {(i + 4) % 5}\n" for i in range(40)))
    assert tune(base, texts, tmp_path / "run", "--stage", "pt", "--train-iters", "6", "--dtype", "bf16") == 0
    found = results(tmp_path / "run")
    assert found["after_eval_loss"] < 0.9 * found["before_eval_loss"]


def test_a_broken_step_is_replayed(base: Path, rows: Path, tmp_path: Path, capsys) -> None:
    broken = save_broken(tmp_path / "broken", base, weight="model.layers.2.mlp.up_proj.weight", at=(0, 0))
    run = tmp_path / "run"
    assert tune(broken, rows, run, "--dtype", "bf16", "--no-pack", "--eval-iters", "1", "--train-iters", "2") == 4
    replay = run / "nonfinite-step-1.safetensors"
    assert cli.main(["tune", "--config", str(run / "config.yaml"), "--replay", str(replay)]) == 4
    assert "model.layers.2.mlp.up_proj" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--load-4bit"], "trains every weight, and quantised ones cannot be: leave out --load-4bit"),
        (["--load-8bit"], "leave out --load-8bit"),
        (["--lora-load", "somewhere"], "starts from a model, not from an adapter: merge it first"),
        (["--lora-r", "8"], "--lora-r has no effect with --method full"),
        (["--lora-dropout", "0.1"], "--lora-dropout has no effect"),
        (["--use-dora"], "--use-dora has no effect"),
        (["--lora-target-modules", "q_proj"], "--lora-target-modules has no effect"),
        (["--lora-modules-to-save", "lm_head"], "--lora-modules-to-save has no effect"),
        (["--loraplus-lr-ratio", "4"], "--loraplus-lr-ratio has no effect"),
        (["--lu-lora-final-layer-index", "1"], "--lu-lora-final-layer-index has no effect"),
        (["--qlora-save-dequantize"], "needs a quantised base"),
        (["--method", "fool"], "full"),
    ],
)
def test_refusals_are_one_sentence(
    base: Path, rows: Path, tmp_path: Path, capsys, flags: list[str], words: str
) -> None:
    assert tune(base, rows, tmp_path / "run", *flags) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said and not (tmp_path / "run" / "config.yaml").exists()
