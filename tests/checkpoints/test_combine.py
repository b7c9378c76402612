"""Several adapters made into one: against PEFT's `add_weighted_adapter`, and through `finerank merge --adapters`."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_merge_folder import IDS, logits, make_adapter

from finerank.checkpoints.combine import Part, combine, parse_weighted
from finerank.checkpoints.formats import hf
from finerank.checkpoints.formats.peft import read_adapter, write_adapter
from finerank.cli import main
from finerank.errors import AdapterError, ConfigError
from tiny import save_tiny, tiny_model

ALL = {"target_modules": "all-linear", "r": 4, "lora_alpha": 6}
SOME = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 8, "use_rslora": True}
OTHER_RANK = {"target_modules": ["q_proj", "o_proj"], "r": 3, "lora_alpha": 3, "rank_pattern": {"o_proj": 2}}
EMBEDDING = {"target_modules": ["embed_tokens", "q_proj"], "r": 4}

PAIRS = {"equal": (ALL, ALL), "other_modules": (ALL, SOME), "embedding": (EMBEDDING, EMBEDDING)}
RANKS = {"ranks": (ALL, OTHER_RANK)}
CASES = [(how, kind) for how in ("cat", "svd", "linear") for kind in PAIRS] + [("cat", "ranks"), ("svd", "ranks")]


def make(folder: Path, config: dict[str, Any], seed: int) -> Path:
    make_adapter(tiny_model(), folder, seed=seed, **config)
    config_path = folder / "adapter_config.json"  # PEFT leaves the name of a model made in memory empty
    config_path.write_text(json.dumps({**json.loads(config_path.read_text()), "base_model_name_or_path": "tiny"}))
    return folder


def with_peft(folders: list[Path], weights: list[float], how: str, **more: Any) -> Any:
    model = peft.PeftModel.from_pretrained(tiny_model(), folders[0], adapter_name="0")
    for i, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=str(i))
    # its configs disagree on rsLoRA, and the result takes the first one's: the scale would not be 1
    model.peft_config["0"].use_rslora = False
    names = [str(i) for i in range(len(folders))]
    model.add_weighted_adapter(names, weights, "both", combination_type=how, **more)
    model.set_adapter("both")
    return model.eval()


def deltas(model: Any) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("both").detach()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") and "both" in [*module.lora_A, *module.lora_embedding_A]
    }


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.5, -0.5]], ids=["mixed", "subtracted"])
@pytest.mark.parametrize(("how", "kind"), CASES)
def test_products_and_logits_equal_peft(how: str, kind: str, weights: list[float], tmp_path: Path) -> None:
    one, two = {**PAIRS, **RANKS}[kind]
    folders = [make(tmp_path / "a", one, 1), make(tmp_path / "b", two, 2)]
    theirs = with_peft(folders, weights, how)
    parts = [Part(read_adapter(folder), weight) for folder, weight in zip(folders, weights, strict=True)]
    combined = combine(parts, how)
    expected = deltas(theirs)
    assert set(combined.adapter.factors) == set(expected)
    for name, factors in combined.adapter.factors.items():
        delta = factors.scale * factors.b_OR @ factors.a_RI
        delta = delta.T if factors.is_embedding else delta
        assert (delta - expected[name]).abs().max() < 3e-5, name
        assert expected[name].abs().max() > 1e-3
    (tmp_path / "c").mkdir()
    write_adapter(combined.adapter, tmp_path / "c")
    with torch.no_grad():
        logits_theirs = theirs(IDS).logits
        again = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "c").eval()
        assert (again(IDS).logits - logits_theirs).abs().max() < 1e-4


@pytest.mark.parametrize("rank", [2, 5, 12])
def test_svd_error_is_what_is_left_of_the_sum(rank: int, tmp_path: Path) -> None:
    folders = [make(tmp_path / "a", ALL, 1), make(tmp_path / "b", OTHER_RANK, 2)]
    parts = [Part(read_adapter(folders[0]), 0.7), Part(read_adapter(folders[1]), 0.4)]
    combined = combine(parts, "svd", rank=rank)
    tail = total = 0.0
    for name in combined.adapter.factors:
        found = [(p.adapter.factors[name], p.weight) for p in parts if name in p.adapter.factors]
        exact = sum(w * f.scale * f.b_OR.double() @ f.a_RI.double() for f, w in found)
        singular = torch.linalg.svdvals(exact)
        tail += float(singular[rank:].square().sum())
        total += float(singular.square().sum())
        assert combined.adapter.factors[name].rank == min(rank, sum(f.rank for f, _ in found))
    assert combined.relative_error == pytest.approx((tail / total) ** 0.5, abs=1e-6)
    assert (rank == 12) == (combined.relative_error < 1e-6)
    theirs = deltas(with_peft(folders, [0.7, 0.4], "svd", svd_rank=rank))
    for name, f in combined.adapter.factors.items():
        assert (f.b_OR @ f.a_RI - theirs[name]).abs().max() < 1e-5, name


def test_errors_of_the_methods_are_ordered(tmp_path: Path) -> None:
    parts = [Part(read_adapter(make(tmp_path / str(i), ALL, i)), 0.5) for i in (1, 2)]
    errors = {how: combine(parts, how).relative_error for how in ("cat", "svd", "linear")}
    assert errors["cat"] < 1e-7 < 0.1 < errors["svd"] < errors["linear"]


def run(*arguments: Any) -> int:
    return main(["merge", *map(str, arguments)])


def test_merged_right_away_equals_the_adapter_and_peft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_tiny(tmp_path / "base")
    folders = [make(tmp_path / "a", ALL, 1), make(tmp_path / "b", OTHER_RANK, 2)]
    adapters = [f"{folders[0]}:0.7", f"{folders[1]}:0.3"]
    out = ["--save-dir", tmp_path / "out", "--output-adapter", tmp_path / "both"]
    assert run("--load", base, "--adapters", *adapters, *out) == 0
    said = capsys.readouterr().out
    assert "of its Frobenius norm" in said and "mean KL" in said
    with torch.no_grad():
        expected = with_peft(folders, [0.7, 0.3], "cat")(IDS).logits
        adapted = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "both").eval()(IDS).logits
    assert (logits(tmp_path / "out") - expected).abs().max() < 2e-5
    assert (adapted - expected).abs().max() < 2e-5
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["combined"]["relative_error"] < 1e-6 and report["answers"]["mean_kl"] < 1e-6
    assert (tmp_path / "both" / "checksums.json").is_file()


def test_combined_adapter_is_tuned_on_and_asked(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": f"say {i}", "output": f"{i} {i}"} for i in range(16)]))
    common = ["tune", "--load", str(base), "--data-path", str(rows), "--seq-length", "64", "--train-iters", "2"]
    common += ["--lora-r", "2", "--dtype", "fp32", "--lr", "0.01"]
    for name, more in (("a", []), ("b", ["--init-lora-weights", "pissa", "--seed", "2"])):
        assert main([*common, "--output-dir", str(tmp_path / name), *more]) == 0
    both = tmp_path / "both"
    assert (
        run(
            "--adapters", f"{tmp_path / 'a'}:0.5", f"{tmp_path / 'b'}:0.5", "--combine", "svd", "--output-adapter", both
        )
        == 0
    )
    assert main(["tune", *common[1:], "--lora-load", str(both), "--output-dir", str(tmp_path / "c")]) == 0
    out = tmp_path / "answers"
    assert main(
        ["generate", "--lora-load", str(both), "--prompt", "say 3", "--max-new-tokens", "4", "--output-dir", str(out)]
    ) in (0, 2)
    assert run(both, "--save-dir", tmp_path / "merged") == 0
    assert json.loads((both / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("runs/a:0.7", "runs/a", 0.7),
        ("runs/a:-1", "runs/a", -1.0),
        ("runs/a:1e-2", "runs/a", 0.01),
        ("runs/a", "runs/a", 1.0),
        (r"C:\runs\a:0.5", r"C:\runs\a", 0.5),
        (r"C:\runs\a", r"C:\runs\a", 1.0),
        ("a:b:c:2", "a:b:c", 2.0),
        ("a:b", "a:b", 1.0),
    ],
)
def test_weights_come_after_the_last_colon(text: str, path: str, weight: float) -> None:
    assert parse_weighted(text) == (Path(path), weight)


def test_a_folder_of_the_whole_name_wins(tmp_path: Path) -> None:
    (tmp_path / "a:2").mkdir()
    assert parse_weighted(str(tmp_path / "a:2")) == (tmp_path / "a:2", 1.0)
    assert parse_weighted(f"{tmp_path / 'a:2'}:3") == (tmp_path / "a:2", 3.0)


@pytest.mark.parametrize("text", ["a:0", "a:nan", "a:inf"])
def test_useless_weights_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="finite number other than 0"):
        parse_weighted(text)


def test_different_bases_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [make(tmp_path / "a", ALL, 1), make(tmp_path / "b", ALL, 2)]
    out = ["--output-adapter", tmp_path / "out"]
    for folder, name in zip(folders, ("one/base", "other/base"), strict=True):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": name}))
    assert run("--adapters", *folders, *out) == 2
    said = capsys.readouterr().err
    assert "one/base" in said and "other/base" in said and "--load" in said and "Traceback" not in said
    base = save_tiny(tmp_path / "base")
    assert run("--load", base, "--adapters", *folders, *out) == 0
    for folder, digest in zip(folders, ("1" * 64, "2" * 64), strict=True):
        (folder / "results.json").write_text(json.dumps({"base_model_digest": digest}))
    assert run("--load", base, "--adapters", *folders, *out) == 2
    assert "different base weights" in capsys.readouterr().err


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    one = read_adapter(make(tmp_path / "a", ALL, 1))
    make_adapter(tiny_model(intermediate_size=48), tmp_path / "b", **ALL)
    with pytest.raises(AdapterError, match=r"different bases.*down_proj is.*in one"):
        combine([Part(one, 1.0), Part(read_adapter(tmp_path / "b"), 1.0)], "cat")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({**ALL, "use_dora": True}, "DoRA"),
        (
            {"target_modules": ["q_proj"], "r": 4, "modules_to_save": ["lm_head"]},
            "lm_head.weight, which was trained whole",
        ),
        (OTHER_RANK, "linear needs equal ranks"),
    ],
)
def test_what_cannot_be_added_up_is_refused(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    parts = [
        Part(read_adapter(make(tmp_path / "a", ALL, 1)), 1.0),
        Part(read_adapter(make(tmp_path / "b", config, 2)), 1.0),
    ]
    with pytest.raises((AdapterError, ConfigError), match=words) as caught:
        combine(parts, "linear")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["A", "--combine", "svd", "--save-dir", "x"], "--combine has no effect without --adapters"),
        (["A", "--output-adapter", "x"], "--output-adapter has no effect without --adapters"),
        (["--adapters", "A:1", "B:1"], "Missing --save-dir"),
        (["R", "--adapters", "A:1", "B:1", "--save-dir", "x"], "Name the adapter once"),
        (["--adapters", "A:1", "B:1", "--svd-rank", "4", "--save-dir", "x"], "needs --combine svd"),
        (["--adapters", "A:1", "B:1", "--combine", "svd", "--svd-rank", "0", "--save-dir", "x"], "at least 1"),
        (["--adapters", "A:1", "B:1", "--lora-r", "4", "--save-dir", "x"], "--lora-r is checked"),
        (["--adapters", "A:1", "nowhere:1", "--save-dir", "x"], "no folder nowhere"),
        (["--adapters", "A:1", "B:1", "--output-adapter", "A"], "holds the input"),
    ],
)
def test_bad_flags_are_one_sentence(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "A", ALL, 1)
    make(tmp_path / "B", ALL, 2)
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said


def test_a_combination_that_cancels_is_no_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = make(tmp_path / "a", ALL, 1)
    assert run("--adapters", f"{one}:1", f"{one}:-1", "--combine", "linear", "--output-adapter", tmp_path / "out") == 2
    assert "changes nothing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_half_precision_factors_are_combined_in_fp32(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", ALL, 1)
    path = folder / "adapter_model.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(path).items()}, path)
    combined = combine([Part(read_adapter(folder), 0.3)], "cat")
    assert all(f.a_RI.dtype == torch.float32 for f in combined.adapter.factors.values())
    assert combined.relative_error < 1e-7


def test_transposed_linears(tmp_path: Path) -> None:
    def model() -> Any:
        torch.manual_seed(0)
        config = transformers.GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=4, n_positions=64)
        return transformers.GPT2LMHeadModel(config).eval()

    config = {"target_modules": ["c_attn", "c_fc"], "r": 4, "fan_in_fan_out": True}
    for i in (1, 2):
        make_adapter(model(), tmp_path / str(i), seed=i, **config)
    combined = combine([Part(read_adapter(tmp_path / str(i)), 0.5 * i) for i in (1, 2)], "svd", rank=3)
    theirs = peft.PeftModel.from_pretrained(model(), tmp_path / "1", adapter_name="0")
    theirs.load_adapter(tmp_path / "2", adapter_name="1")
    theirs.add_weighted_adapter(["0", "1"], [0.5, 1.0], "both", combination_type="svd", svd_rank=3)
    theirs.set_adapter("both")
    (tmp_path / "c").mkdir()
    write_adapter(combined.adapter, tmp_path / "c")
    again = peft.PeftModel.from_pretrained(model(), tmp_path / "c").eval()
    with torch.no_grad():
        assert (again(IDS).logits - theirs.eval()(IDS).logits).abs().max() < 1e-5
    assert hf.read_json(tmp_path / "c" / "adapter_config.json")["fan_in_fan_out"] is True
