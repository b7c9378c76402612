"""Loading: what transformers would load, frozen and in the asked precision; every broken folder gets one sentence."""

import json
import logging
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from finerank.errors import ConfigError, ModelError
from finerank.models.load import load_model, model_digest
from finerank.models.settings import ModelSettings
from finerank.models.tokenizer import load_tokenizer
from tiny import FAMILIES, save_tiny, tiny_config, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_loads_as_transformers_loads_it(family, tmp_path):
    folder = save_tiny(tmp_path / family, family)
    loaded = load_model(ModelSettings(load=str(folder), dtype="fp32", device="cpu"))
    assert type(loaded.model) is type(tiny_model(family))
    assert not loaded.model.training and not any(p.requires_grad for p in loaded.model.parameters())
    expected = tiny_model(family).state_dict()
    assert loaded.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.model.state_dict().items())
    assert loaded.source.name == str(folder.resolve()) and loaded.source.path == folder
    assert loaded.tokenizer.pad_token_id == 2


def test_bf16_is_one_rounding_of_the_stored_weights(tiny_folder):
    loaded = load_model(ModelSettings(load=str(tiny_folder), bf16=True, device="cpu"))
    expected = tiny_model().state_dict()
    assert all(torch.equal(v, expected[n].bfloat16()) for n, v in loaded.model.state_dict().items())


def test_sharded_weights_load_and_a_missing_shard_is_named(tmp_path):
    tiny_model().save_pretrained(tmp_path, max_shard_size="40KB")
    tiny_tokenizer().save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    model = load_model(ModelSettings(load=str(tmp_path), dtype="fp32", device="cpu")).model
    assert torch.equal(model.lm_head.weight, tiny_model().lm_head.weight)
    shards[1].unlink()
    with pytest.raises(ModelError, match=rf"lacks 1 of {len(shards)} weight files, e.g. {shards[1].name}"):
        load_model(ModelSettings(load=str(tmp_path), device="cpu"))


def test_old_pytorch_weights_load_without_running_pickled_code(tmp_path):
    folder = save_tiny(tmp_path / "old")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    model = load_model(ModelSettings(load=str(folder), dtype="fp32", device="cpu")).model
    assert torch.equal(model.lm_head.weight, tiny_model().lm_head.weight)
    harm = folder / "harm"
    torch.save({"lm_head.weight": _TouchesAFile(str(harm))}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError):
        load_model(ModelSettings(load=str(folder), device="cpu"))
    assert not harm.exists()


class _TouchesAFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_random_start_is_loud_seeded_and_leaves_the_random_state(tmp_path, caplog):
    tiny_config("qwen3").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    settings = ModelSettings(model_config=str(tmp_path / "config.json"), dtype="fp32", device="cpu")
    before = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        first = load_model(settings, seed=7)
    assert "RANDOM WEIGHTS" in caplog.text
    assert torch.equal(before, torch.get_rng_state())
    again, other = load_model(settings, seed=7), load_model(settings, seed=8)
    assert torch.equal(first.model.lm_head.weight, again.model.lm_head.weight)
    assert not torch.equal(first.model.lm_head.weight, other.model.lm_head.weight)
    assert first.source == again.source != other.source and first.source.path is None


def test_digest_tells_models_apart(tmp_path):
    one, same, other = (save_tiny(tmp_path / str(i), seed=seed) for i, seed in enumerate((0, 0, 1)))
    assert model_digest(one) == model_digest(same) != model_digest(other)


@pytest.fixture
def broken(tmp_path):
    """A tiny model folder to break."""
    return save_tiny(tmp_path / "broken")


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def tear(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


BREAKAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), "is no model folder: it has no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not readable JSON"),
    "config without type": (lambda f: (f / "config.json").write_text("{}"), "names no model_type"),
    "unknown type": (
        lambda f: change_config(f, model_type="nothing"),
        "type 'nothing', which transformers does not know",
    ),
    "own code": (
        lambda f: change_config(f, model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
        "brings its own Python code",
    ),
    "no causal model": (lambda f: change_config(f, model_type="clip"), "no causal language model"),
    "quantised": (lambda f: change_config(f, quantization_config={"quant_method": "gptq"}), r"quantised \(gptq\)"),
    "wrong sizes": (
        lambda f: change_config(f, intermediate_size=48),
        r"6 tensors do not fit config.json, e.g. .*down_proj.weight is \[32, 64\], not",
    ),
    "more layers": (lambda f: change_config(f, num_hidden_layers=3), "lacks 9 of its model's tensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has a config.json but no weights"),
    "torn weights": (tear, r"model.safetensors is torn: \d+ bytes, but its header promises"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "no safetensors file or is torn"),
    "text as weights": (lambda f: (f / "model.safetensors").write_text("hello world!"), "no safetensors file"),
    "a missing tensor": (drop_a_tensor, "lacks 1 of its model's tensors, e.g. model.layers.1.mlp.up_proj.weight"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer with .* --tokenizer-name-or-path"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "Cannot load the tokenizer"),
    "small embeddings": (
        lambda f: save_tiny(f, vocab_size=300),
        "tokenizer has 384 ids, the model only 300 embeddings",
    ),
    "adapter": (
        lambda f: ((f / "config.json").unlink(), (f / "adapter_config.json").write_text("{}")),
        "is an adapter, not a base model: give --load BASE --lora-load",
    ),
    "Megatron": (
        lambda f: ((f / "config.json").unlink(), (f / "latest_checkpointed_iteration.txt").write_text("1")),
        "is a Megatron checkpoint: convert it",
    ),
}


@pytest.mark.parametrize("kind", BREAKAGES)
def test_a_broken_folder_is_one_sentence(broken, kind):
    damage, sentence = BREAKAGES[kind]
    damage(broken)
    with pytest.raises(ModelError, match=sentence) as caught:
        load_model(ModelSettings(load=str(broken), device="cpu"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "No model is named: give --load smollm2-135m"),
        ({"load": "./nowhere"}, "There is no model at ./nowhere"),
        ({"load": "missing.gguf"}, "There is no model at missing.gguf"),
        ({"load": "a/b/c"}, "There is no model at a/b/c"),
        ({"load": __file__}, "is a file, not a model"),
        ({"model_config": "/nowhere/config.json"}, "is no config.json and no folder"),
        ({"load": "x", "bf16": True, "dtype": "fp32"}, "contradict"),
        ({"load": "x", "device": "abacus"}, "--device abacus is no device"),
        ({"load": "x", "device": "xpu"}, "--device xpu is not supported"),
    ],
)
def test_wrong_settings_are_one_sentence(settings, sentence):
    with pytest.raises((ConfigError, ModelError), match=sentence) as caught:
        load_model(ModelSettings(**settings))
    assert "\n" not in str(caught.value)


def test_load_and_model_config_exclude_each_other(tiny_folder):
    with pytest.raises(ConfigError, match="both given"):
        load_model(ModelSettings(load=str(tiny_folder), model_config=str(tiny_folder), device="cpu"))


def test_the_tokenizer_may_lie_elsewhere(tiny_folder, tmp_path):
    bare = tmp_path / "bare"
    tiny_model().save_pretrained(bare)
    settings = ModelSettings(load=str(bare), tokenizer_name_or_path=str(tiny_folder), device="cpu")
    assert load_tokenizer(settings).get_vocab() == tiny_tokenizer().get_vocab()


def test_a_missing_pad_token_becomes_eos(tiny_folder, tmp_path):
    folder = tmp_path / "no_pad"
    shutil.copytree(tiny_folder, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(ModelSettings(load=str(folder))).pad_token == "<|im_end|>"


def test_transformers_verbosity_is_as_before(tiny_folder):
    before = transformers.utils.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled()
    load_model(ModelSettings(load=str(tiny_folder), device="cpu"))
    assert before == (transformers.utils.logging.get_verbosity(), transformers.utils.logging.is_progress_bar_enabled())
