"""Our files in the real PEFT, and PEFT's files here."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_inject import IDS, grown

from finerank.adapters.files import load_adapter, read_adapter_config, save_adapter
from finerank.errors import AdapterError
from tiny import tiny_model

peft = pytest.importorskip("peft")

SEPARATE = {"lora_target_modules": ["all-linear"]}
GROUPED = {"lora_target_modules": ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]}


def largest(a, b):
    return (a - b).abs().max().item()


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen2", "qwen3", "gemma3", "mistral", "mixtral"])
@pytest.mark.parametrize("settings", [SEPARATE, GROUPED], ids=["separate", "grouped"])
def test_peft_reads_ours(tmp_path, family, settings):
    model = tiny_model(family)
    targets = settings if family != "mixtral" else {"lora_target_modules": settings["lora_target_modules"][:2]}
    adapters = grown(model, **targets)
    ours = model(IDS).logits
    save_adapter(adapters, tmp_path, base_model_name="tiny")
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path)
    assert largest(theirs(IDS).logits, ours) < 1e-5
    assert largest(ours, tiny_model(family)(IDS).logits) > 1e-2
    assert len(theirs.peft_config["default"].target_modules) <= 7


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True, "lora_rank_pattern": {"down_proj": 7, r"1\.self_attn\.q_proj": 2}},
        {"lora_alpha_pattern": {"linear_fc1": 5.0}, "lora_alpha": 12.5},
        {"lora_target_modules": [r".*\.1\..*proj"]},
        {"lora_target_modules": ["layers.0.self_attn.k_proj", "lm_head"]},
        {"lora_dropout": 0.3},
    ],
    ids=["ranks", "alphas", "pattern", "names", "dropout"],
)
def test_peft_reads_every_setting(tmp_path, settings):
    model = tiny_model()
    adapters = grown(model, **settings)
    ours = model(IDS).logits
    save_adapter(adapters, tmp_path, base_model_name="tiny")
    theirs = peft.PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert largest(theirs(IDS).logits, ours) < 1e-5


def test_auto_peft_model_reads_ours(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    adapters = grown(model)
    ours = model(IDS).logits
    save_adapter(adapters, tmp_path / "adapter", base_model_name=str(tmp_path / "base"))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert largest(theirs(IDS).logits, ours) < 1e-5


def test_peft_warns_about_nothing_in_ours(tmp_path, recwarn):
    save_adapter(grown(tiny_model()), tmp_path, base_model_name="tiny")
    peft.PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert not [str(w.message) for w in recwarn if "adapter" in str(w.message).lower()]


def by_peft(folder, model=None, grow=True, **config):
    """A PEFT adapter written by PEFT; returns its logits."""
    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    model = peft.get_peft_model(model or tiny_model(), peft.LoraConfig(**values))
    if grow:
        g = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for name, p in sorted(model.named_parameters()):
                if "lora_" in name:
                    p.copy_(0.3 * torch.randn(p.shape, generator=g))
    model.save_pretrained(folder)
    return model.eval()(IDS).logits


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"target_modules": ["q_proj", "v_proj"]},
        {"use_rslora": True, "rank_pattern": {"o_proj": 9}, "alpha_pattern": {r"0\.mlp\.up_proj": 3}},
        {"target_modules": r".*\.0\.mlp\..*_proj", "lora_dropout": 0.1},
        {"layers_to_transform": [1], "target_modules": ["q_proj"]},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"init_lora_weights": "gaussian"},
    ],
    ids=["all", "two", "patterns", "regex", "layers", "exclude", "init"],
)
def test_we_read_peft(tmp_path, config):
    theirs = by_peft(tmp_path, **config)
    model = tiny_model()
    adapters = load_adapter(model, tmp_path)
    assert largest(model(IDS).logits, theirs) < 1e-5
    assert not any(p.requires_grad for p in adapters.parameters())


def test_what_we_read_from_peft_peft_reads_back(tmp_path):
    theirs = by_peft(tmp_path / "a", target_modules=["q_proj"], layers_to_transform=[1], alpha_pattern={"q_proj": 3})
    save_adapter(load_adapter(tiny_model(), tmp_path / "a"), tmp_path / "b", base_model_name="tiny")
    again = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "b")
    assert largest(again(IDS).logits, theirs) < 1e-5


def test_gpt2_with_its_transposed_linears(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    def model():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()

    ours_model = model()
    adapters = grown(ours_model)
    ours = ours_model(IDS).logits
    save_adapter(adapters, tmp_path, base_model_name="tiny")
    assert largest(peft.PeftModel.from_pretrained(model(), tmp_path)(IDS).logits, ours) < 1e-5
    back = model()
    load_adapter(back, tmp_path)
    assert largest(back(IDS).logits, ours) == 0
    adapters.merge_()
    assert largest(ours_model(IDS).logits, ours) < 1e-4


@pytest.mark.parametrize("settings", [SEPARATE, GROUPED], ids=["separate", "grouped"])
def test_round_trip_is_bit_equal_and_keeps_sharing(tmp_path, settings):
    model = tiny_model()
    adapters = grown(model, **settings)
    save_adapter(adapters, tmp_path / "a", base_model_name="tiny")
    again = load_adapter(tiny_model(), tmp_path / "a", trainable=True)
    assert all(p.requires_grad for p in again.parameters())
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in adapters.named_parameters()]
    for (_, p), (_, q) in zip(again.named_parameters(), adapters.named_parameters(), strict=True):
        assert torch.equal(p, q)
    save_adapter(again, tmp_path / "b", base_model_name="tiny")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_sharing_ends_where_another_program_changed_one_copy(tmp_path):
    save_adapter(grown(tiny_model(), **GROUPED), tmp_path, base_model_name="tiny")
    path = tmp_path / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"] += 1
    save_file(tensors, path, metadata)
    layers = load_adapter(tiny_model(), tmp_path).layers
    q, k, v = (layers[f"model.layers.0.self_attn.{n}_proj"].lora_A for n in "qkv")
    assert q is v and k is not q


def test_names_and_keys_are_sorted(tmp_path):
    save_adapter(grown(tiny_model(), **GROUPED), tmp_path, base_model_name="tiny")
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {
            "finerank_shared_lora_A": "linear_fc1 linear_fc2 linear_proj linear_qkv",
            "format": "pt",
        }
    names = list(load_file(tmp_path / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight" in names and len(names) == 28
    config = read_adapter_config(tmp_path)
    assert list(config) == sorted(config)
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


def test_bytes_are_the_same_in_another_process(tmp_path):
    """Dictionaries of the safetensors library change their order from process to process."""
    program = (
        "import sys; sys.path.insert(0, 'tests'); sys.path.insert(0, 'tests/adapters')\n"
        "from test_inject import grown; from tiny import tiny_model; from pathlib import Path\n"
        "from finerank.adapters.files import save_adapter\n"
        "adapters = grown(tiny_model(), lora_target_modules=['linear_qkv'])\n"
        "save_adapter(adapters, Path(sys.argv[1]), base_model_name='t')\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "a")], check=True)
    save_adapter(grown(tiny_model(), lora_target_modules=["linear_qkv"]), tmp_path / "b", base_model_name="t")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    "config, word",
    [
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"target_modules": ["embed_tokens"], "use_dora": True}, "embed_tokens"),
    ],
)
def test_features_that_are_not_supported_are_named(tmp_path, config, word):
    by_peft(tmp_path, grow=False, **config)
    with pytest.raises(AdapterError, match=word):
        load_adapter(tiny_model(), tmp_path)


def write(path, content):
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)


def edit_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "break_it, word",
    [
        (lambda f: (f / "adapter_config.json").unlink(), "holds no adapter_config.json"),
        (lambda f: write(f / "adapter_config.json", "{"), "cannot be read"),
        (lambda f: write(f / "adapter_config.json", "[1]"), "only LORA"),
        (lambda f: edit_config(f, peft_type="IA3"), "IA3"),
        (lambda f: edit_config(f, r=5), "rank 4"),
        (lambda f: edit_config(f, r="x"), "'x'"),
        (lambda f: edit_config(f, lora_alpha=None), "lora_alpha"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "missing"),
        (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "pickle"),
        (lambda f: write(f / "adapter_model.safetensors", b"x" * 100), "damaged"),
        (
            lambda f: write(f / "adapter_model.safetensors", (f / "adapter_model.safetensors").read_bytes()[:-10]),
            "damaged",
        ),
    ],
)
def test_broken_files_are_named(tmp_path, break_it, word):
    save_adapter(grown(tiny_model()), tmp_path, base_model_name="tiny")
    break_it(tmp_path)
    with pytest.raises(AdapterError, match=word) as caught:
        load_adapter(tiny_model(), tmp_path)
    assert "\n" not in str(caught.value)


def test_another_base_is_named(tmp_path):
    save_adapter(grown(tiny_model()), tmp_path, base_model_name="the/base")
    with pytest.raises(AdapterError, match=r"another base.*32 to 64.*the/base|another base.*the/base"):
        load_adapter(tiny_model(intermediate_size=48), tmp_path)
    with pytest.raises(AdapterError, match="does not have"):
        load_adapter(tiny_model(num_hidden_layers=1), tmp_path)
