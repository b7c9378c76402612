"""Modules trained whole, and adapters on embedding and head: against the real PEFT."""

import copy

import pytest
import torch
from peft_pair import IDS, check_pair, check_reading, grown, our_gradients

from finerank.adapters.files import load_adapter, save_adapter
from finerank.adapters.inject import inject_adapters
from finerank.adapters.settings import AdapterSettings
from finerank.errors import AdapterError, ConfigError
from tiny import tiny_model

pytest.importorskip("peft")

BOTH = ["embed_tokens", "lm_head"]
FAMILIES = ["llama", "llama_tied", "qwen3", "gemma3"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("names", [BOTH, ["embed_tokens"], ["lm_head"]], ids=["both", "embedding", "head"])
def test_saved_whole_equals_peft(tmp_path, family, names):
    _, adapters, grads, _ = check_pair(tmp_path, family, lora_modules_to_save=names)
    assert adapters.config["modules_to_save"] == sorted(names)
    assert all(p.dtype == torch.float32 for p in adapters.parameters())
    assert sum(name.endswith(("embed_tokens.weight", "lm_head.weight")) for name in grads) == len(names)


@pytest.mark.parametrize("family", ["llama_tied", "gemma3"])
@pytest.mark.parametrize("names", [BOTH, ["lm_head"]], ids=["both", "head"])
def test_saved_whole_and_tied_equals_peft(tmp_path, family, names):
    _, adapters, grads, _ = check_pair(tmp_path, family, lora_modules_to_save=names, ensure_weight_tying=True)
    assert "model.embed_tokens.weight" in grads and "lm_head.weight" not in grads
    assert torch.equal(
        adapters.state()["base_model.model.lm_head.weight"],
        adapters.state()["base_model.model.model.embed_tokens.weight"],
    )


@pytest.mark.parametrize("names", [["model.norm"], ["q_norm", "input_layernorm"], ["gate_proj"]])
def test_other_modules_saved_whole_equal_peft(tmp_path, names):
    _, adapters, _, _ = check_pair(tmp_path, "qwen3", lora_modules_to_save=names)
    assert len(adapters.parts) == (1 if names == ["model.norm"] else 2 * len(names))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("names", [BOTH, ["embed_tokens"], ["lm_head"]], ids=["both", "embedding", "head"])
def test_low_rank_on_embedding_and_head_equals_peft(tmp_path, family, names):
    check_pair(tmp_path, family, lora_target_modules=["q_proj", *names], use_rslora=True)


@pytest.mark.parametrize("family", ["llama_tied", "gemma3"])
@pytest.mark.parametrize("names", [BOTH, ["lm_head"], ["embed_tokens"]])
def test_low_rank_on_a_tied_pair_equals_peft(tmp_path, family, names):
    settings = {"lora_target_modules": ["q_proj", *names], "ensure_weight_tying": True}
    _, _, ours, theirs = check_pair(tmp_path, family, same_names=False, **settings)
    # PEFT keeps two parameters over one memory; the gradient of the one thing that they are is the sum
    for part, twin in (("A", "B"), ("B", "A")):
        total = theirs[f"model.embed_tokens.lora_embedding_{part}"] + theirs[f"lm_head.lora_{twin}.weight"].T
        torch.testing.assert_close(ours[f"model.embed_tokens.lora_embedding_{part}"], total, rtol=1e-4, atol=2e-5)


def test_rank_and_alpha_patterns_reach_the_embedding(tmp_path):
    settings = {"lora_rank_pattern": {"embed_tokens": 7}, "lora_alpha_pattern": {"embed_tokens": 3}}
    _, adapters, _, _ = check_pair(tmp_path, "llama", lora_target_modules=["q_proj", "embed_tokens"], **settings)
    assert adapters.parts["model.embed_tokens"].lora_embedding_A.shape == (7, 384)


@pytest.mark.parametrize(
    "family, config",
    [
        ("llama", {"modules_to_save": BOTH}),
        ("llama_tied", {"modules_to_save": BOTH}),
        ("gemma3", {"modules_to_save": BOTH, "ensure_weight_tying": True}),
        ("gemma3", {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
        ("qwen2", {"modules_to_save": ["norm"]}),
        ("llama", {"target_modules": ["q_proj", *BOTH]}),
        ("qwen3", {"target_modules": ["q_proj", "embed_tokens"], "use_rslora": True}),
        ("qwen3", {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}),
        ("gemma3", {"target_modules": ["embed_tokens"], "modules_to_save": ["norm"]}),
    ],
    ids=str,
)
def test_we_read_peft(tmp_path, family, config):
    check_reading(tmp_path, family, **config)


SETTINGS = [
    {"lora_modules_to_save": BOTH},
    {"lora_modules_to_save": BOTH, "ensure_weight_tying": True},
    {"lora_modules_to_save": ["lm_head"]},
    {"lora_target_modules": ["q_proj", *BOTH]},
    {"lora_target_modules": ["q_proj", *BOTH], "ensure_weight_tying": True},
    {"lora_target_modules": ["embed_tokens"]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_ones_change_nothing_and_the_base_comes_back(settings, dtype):
    model = tiny_model("gemma3").to(dtype)
    base = model(IDS).logits
    values = {"lora_r": 4, "lora_target_modules": ["q_proj"], **settings}
    adapters = inject_adapters(model, AdapterSettings(**values), seed=1)
    assert torch.equal(model(IDS).logits, base)
    with torch.no_grad():
        for p in adapters.parameters():
            p.add_(0.1)
    assert not torch.equal(model(IDS).logits, base)
    with adapters.disabled():
        assert torch.equal(model(IDS).logits, base)
    adapters.remove()
    assert torch.equal(model(IDS).logits, base)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_merging_in_memory_gives_the_same_answers(settings):
    model = tiny_model("llama_tied")
    adapters = grown(model, **settings)
    want = model(IDS).logits
    adapters.merge_()
    torch.testing.assert_close(model(IDS).logits, want, rtol=1e-4, atol=1e-4)
    assert model.config.tie_word_embeddings is bool(settings.get("ensure_weight_tying"))
    assert not any("base_layer" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_files_come_back_bit_equal(tmp_path, settings):
    adapters = grown(tiny_model("gemma3"), **settings)
    save_adapter(adapters, tmp_path / "a", base_model_name="tiny")
    again = load_adapter(tiny_model("gemma3"), tmp_path / "a", trainable=True)
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in adapters.named_parameters()]
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), adapters.parameters(), strict=True))
    assert all(p.requires_grad for p in again.parameters())
    save_adapter(again, tmp_path / "b", base_model_name="tiny")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_saved_copy_over_bf16_is_kept_in_fp32():
    """At these learning rates bf16 alone would round almost every update away."""
    model = tiny_model("gemma3").bfloat16()
    adapters = grown(copy.deepcopy(model), lora_modules_to_save=BOTH, ensure_weight_tying=True)
    exact_model = tiny_model("gemma3").bfloat16().float()
    exact = grown(exact_model, lora_modules_to_save=BOTH, ensure_weight_tying=True)
    _, grads = our_gradients(adapters.model, adapters)
    _, want = our_gradients(exact_model, exact)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        error = (grad - want[name]).norm() / want[name].norm()
        assert error < 0.08, (name, error)


@pytest.mark.parametrize(
    "family, settings, error, words",
    [
        ("llama", {"lora_modules_to_save": ["nothing"]}, AdapterError, "nothing"),
        ("llama", {"lora_modules_to_save": ["mlp"]}, AdapterError, "gate_proj"),
        ("llama", {"lora_modules_to_save": ["act_fn"]}, AdapterError, "act_fn"),
        ("llama", {"lora_modules_to_save": ["q_proj"], "lora_target_modules": ["q_proj"]}, AdapterError, "once"),
        ("llama", {"lora_target_modules": ["embed_tokens"], "use_dora": True}, ConfigError, "embed_tokens"),
        ("llama", {"lora_modules_to_save": BOTH, "ensure_weight_tying": True}, ConfigError, "tied"),
        ("llama_tied", {"ensure_weight_tying": True}, ConfigError, "no effect"),
        (
            "llama_tied",
            {"lora_target_modules": ["embed_tokens"], "lora_modules_to_save": ["lm_head"], "ensure_weight_tying": True},
            ConfigError,
            "alike",
        ),
        ("llama", {"lora_modules_to_save": BOTH, "lu_lora_final_layer_index": 0}, ConfigError, "embed_tokens"),
        (
            "llama",
            {"lora_modules_to_save": ["layers.0.input_layernorm"], "lu_lora_final_layer_index": 0},
            ConfigError,
            "layers.0.input_layernorm",
        ),
        (
            "llama",
            {"lora_target_modules": ["all-linear", "embed_tokens"], "lu_lora_final_layer_index": 0},
            ConfigError,
            "embed_tokens",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_sentence(family, settings, error, words):
    with pytest.raises(error, match=words) as caught:
        inject_adapters(tiny_model(family), AdapterSettings(**settings), seed=1)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_saved_module_leaves_all_linear():
    adapters = inject_adapters(tiny_model(), AdapterSettings(lora_modules_to_save=["o_proj"]), seed=1)
    assert not any("o_proj" in name for name in adapters.layers)


def test_one_side_of_a_tied_pair_is_said(caplog):
    inject_adapters(tiny_model("llama_tied"), AdapterSettings(lora_modules_to_save=["lm_head"]), seed=1)
    assert "--ensure-weight-tying" in caplog.text and "embed_tokens" in caplog.text
