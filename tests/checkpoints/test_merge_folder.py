"""`finerank merge` against PEFT's own `merge_and_unload`, in every kind of adapter it can fold."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from finerank.checkpoints.formats import hf
from finerank.checkpoints.formats.peft import read_adapter
from finerank.checkpoints.merge import MergedWeights, merged_model, plan_merge
from finerank.cli import main
from finerank.errors import AdapterError, NumericsError
from tiny import save_tiny, tiny_model

IDS = torch.arange(48).reshape(2, 24) * 7 % 384


def make_adapter(model: Any, folder: Path, *, seed: int = 1, std: float = 0.1, **config: Any) -> Any:
    """A PEFT model whose factors are all random, saved to `folder`."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data += std * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(folder)
    return wrapped.eval()


def merge(base: Path, adapter: Path, out: Path, *extra: str) -> int:
    return main(
        [
            "merge",
            "--load",
            str(base),
            "--lora-load",
            str(adapter),
            "--save-dir",
            str(out),
            "--proof",
            "weights",
            *extra,
        ]
    )


def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(IDS).logits


KINDS = {
    "all-linear": {"target_modules": "all-linear", "r": 4, "lora_alpha": 6},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "r": 3, "lora_alpha": 5, "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"v_proj": 3},
    },
    "dora": {"target_modules": "all-linear", "r": 4, "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "r": 4},
    "head": {"target_modules": ["lm_head", "q_proj"], "r": 4},
    "modules_to_save": {"target_modules": ["q_proj"], "r": 4, "modules_to_save": ["lm_head", "embed_tokens"]},
    "bias": {"target_modules": ["q_proj"], "r": 4, "bias": "lora_only"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen2"])
def test_merged_logits_equal_peft(kind: str, family: str, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", family)
    wrapped = make_adapter(tiny_model(family), tmp_path / "adapter", **KINDS[kind])
    with torch.no_grad():
        expected = wrapped(IDS).logits
    assert merge(base, tmp_path / "adapter", tmp_path / "out") == 0
    assert (logits(tmp_path / "out") - expected).abs().max() < 2e-5


def test_every_tensor_equals_peft_merge_and_unload(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    wrapped = make_adapter(tiny_model(), tmp_path / "adapter", **KINDS["all-linear"])
    assert merge(base, tmp_path / "adapter", tmp_path / "out") == 0
    merged = hf.read(tmp_path / "out").weights
    expected = wrapped.merge_and_unload().state_dict()
    assert set(merged) == set(expected)
    for name, tensor in expected.items():
        assert torch.allclose(merged[name], tensor, rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_bases_keep_their_dtype_and_round_once(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model().to(dtype)
    model.save_pretrained(tmp_path / "base")
    wrapped = make_adapter(model.to(torch.float32), tmp_path / "adapter", **KINDS["all-linear"])
    assert merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out") == 0
    merged = hf.read(tmp_path / "out")
    assert merged.config["dtype"] == str(dtype).removeprefix("torch.")
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    exact = wrapped.merge_and_unload().state_dict()
    worst = 0.0
    for name, tensor in exact.items():
        got = merged.weights[name]
        assert got.dtype == dtype
        step = torch.finfo(dtype).eps * tensor.abs()
        assert ((got.float() - tensor).abs() <= 0.5 * step + 1e-6).all(), name  # half a unit in the last place
        worst = max(worst, float((got.float() - tensor).abs().max()))
    assert report["weights"]["max_rounding_error"] == pytest.approx(worst, rel=1e-3)


def test_a_blocked_merge_equals_one_product() -> None:
    from finerank.checkpoints import merge as module
    from finerank.checkpoints.lora import Factors

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(37, 11, generator=generator).to(torch.bfloat16)
    factors = Factors(torch.randn(3, 11, generator=generator), torch.randn(37, 3, generator=generator), 0.75)
    exact = weight.double() + 0.75 * factors.b_OR.double() @ factors.a_RI.double()
    blocks = module._BLOCK_ELEMENTS
    try:
        module._BLOCK_ELEMENTS = 40
        merged = weight.clone()
        report = module.add_low_rank_("w", merged, factors)
    finally:
        module._BLOCK_ELEMENTS = blocks
    assert torch.equal(merged, exact.to(torch.bfloat16))
    assert report.num_changed == int((merged.view(torch.int16) != weight.view(torch.int16)).sum())
    assert report.sum_error == pytest.approx(float((merged.double() - exact).abs().sum()), rel=1e-4)
    assert report.sum_squared_update == pytest.approx(float((exact - weight.double()).square().sum()), rel=1e-5)


def test_conv1d_weights_are_merged_transposed(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=384, n_positions=64)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "base")
    for use_dora in (False, True):
        adapter, out = tmp_path / f"adapter{use_dora}", tmp_path / f"out{use_dora}"
        fresh = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
        wrapped = make_adapter(fresh, adapter, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=use_dora)
        with torch.no_grad():
            expected = wrapped(IDS).logits
        assert merge(tmp_path / "base", adapter, out) == 0
        assert (logits(out) - expected).abs().max() < 2e-5


@pytest.mark.parametrize("kind,tied", [("all-linear", True), ("head", False), ("embedding", False)])
def test_a_tied_head_is_untied_only_where_the_adapter_changed_one_side(kind: str, tied: bool, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama_tied")
    make_adapter(tiny_model("llama_tied"), tmp_path / "adapter", **KINDS[kind])
    assert merge(base, tmp_path / "adapter", tmp_path / "out") == 0
    out = hf.read(tmp_path / "out")
    assert out.config["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in out.weights) is not tied


def test_a_resized_vocabulary_survives(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    model = tiny_model()
    model.resize_token_embeddings(390)
    config = {"target_modules": ["q_proj"], "r": 4, "modules_to_save": ["embed_tokens", "lm_head"]}
    wrapped = make_adapter(model, tmp_path / "adapter", **config)
    with torch.no_grad():
        expected = wrapped(IDS).logits
    assert merge(base, tmp_path / "adapter", tmp_path / "out") == 0
    assert hf.read(tmp_path / "out").config["vocab_size"] == 390
    assert (logits(tmp_path / "out") - expected).abs().max() < 2e-5


def test_tokenizer_and_generation_config_come_along(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    make_adapter(tiny_model(), tmp_path / "adapter", **KINDS["all-linear"])
    assert merge(base, tmp_path / "adapter", tmp_path / "out") == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_the_adapter_names_its_base_itself(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    make_adapter(model, tmp_path / "adapter", **KINDS["all-linear"])
    assert main(["merge", str(tmp_path / "adapter"), "--save-dir", str(tmp_path / "out"), "--proof", "weights"]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_shards_hold_the_same_tensors(tmp_path: Path) -> None:
    base = hf.read(save_tiny(tmp_path / "base"))
    (tmp_path / "out").mkdir()
    hf.write(base, tmp_path / "out", max_shard_bytes=20_000)
    again = hf.read(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert set(again.weights) == set(base.weights)
    assert all(torch.equal(again.weights[n], base.weights[n]) for n in base.weights)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_an_untrained_adapter_ends_with_status_3(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    assert merge(base, tmp_path / "adapter", tmp_path / "out") == 3


def test_nan_in_an_adapter_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    wrapped = make_adapter(tiny_model(), tmp_path / "adapter", **KINDS["all-linear"])
    next(p for n, p in wrapped.named_parameters() if "lora_B" in n).data[0, 0] = float("nan")
    wrapped.save_pretrained(tmp_path / "adapter")
    assert merge(base, tmp_path / "adapter", tmp_path / "out") == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_fp16_overflow_is_an_error() -> None:
    from finerank.checkpoints.lora import Factors
    from finerank.checkpoints.merge import add_low_rank_

    factors = Factors(torch.full((1, 4), 300.0), torch.full((4, 1), 300.0), 1.0)
    with pytest.raises(NumericsError, match="float16"):
        add_low_rank_("w", torch.zeros(4, 4, dtype=torch.float16), factors)


def test_a_foreign_adapter_is_refused_by_name(tmp_path: Path) -> None:
    base = hf.read(save_tiny(tmp_path / "base"))
    make_adapter(tiny_model(num_hidden_layers=3), tmp_path / "deeper", **KINDS["all-linear"])
    with pytest.raises(AdapterError, match=r"layers\.2\."):
        plan_merge(base, read_adapter(tmp_path / "deeper"))
    make_adapter(tiny_model(intermediate_size=48), tmp_path / "narrow", **KINDS["all-linear"])
    with pytest.raises(AdapterError, match=r"shape \[32, 48\].*\[32, 64\]"):
        plan_merge(base, read_adapter(tmp_path / "narrow"))


def test_a_wrong_rank_in_the_config_is_refused(tmp_path: Path) -> None:
    make_adapter(tiny_model(), tmp_path / "adapter", **KINDS["all-linear"])
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 8}))
    with pytest.raises(AdapterError, match=r"rank 4 in adapter_model\.safetensors and 8"):
        read_adapter(tmp_path / "adapter")


def test_a_folder_of_others_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_tiny(tmp_path / "base")
    make_adapter(tiny_model(), tmp_path / "adapter", **KINDS["all-linear"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    assert merge(base, tmp_path / "adapter", tmp_path / "out") == 2
    assert "not empty" in capsys.readouterr().err
    assert merge(base, tmp_path / "adapter", tmp_path, "--overwrite") == 2
    assert "holds the input" in capsys.readouterr().err
    assert merge(base, tmp_path / "adapter", tmp_path / "out", "--overwrite") == 0
    assert not (tmp_path / "out" / "thesis.txt").exists()
    assert merge(base, tmp_path / "adapter", tmp_path / "out") == 0, "a folder of ours is written again"


def test_a_plan_reads_no_weights(tmp_path: Path) -> None:
    base = hf.read(save_tiny(tmp_path / "base"))
    make_adapter(tiny_model(), tmp_path / "adapter", **KINDS["all-linear"])
    adapter = read_adapter(tmp_path / "adapter")
    (tmp_path / "base" / "model.safetensors").unlink()
    plan = plan_merge(base, adapter)
    assert "14 tensors" in plan.describe()
    weights = merged_model(base, plan).weights
    assert isinstance(weights, MergedWeights) and len(weights) == len(base.weights)
