"""GGUF files: written here by the gguf package as llama.cpp lays them out, read back bit for bit."""

import json

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from finerank.errors import ModelError
from finerank.models.gguf_file import GGUFFile, _llama3_rope, convert_gguf, unpermute
from finerank.models.gguf_tokenizer import PRE_TOKENIZERS
from finerank.models.load import load_model
from finerank.models.settings import ModelSettings
from finerank.models.tokenizer import load_tokenizer
from tiny import tiny_model, tiny_tokenizer

ARCHES = {"llama": "llama", "llama_tied": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Tiny family -> GGUF architecture."""

Q8_0 = gguf.GGMLQuantizationType.Q8_0


def llama_cpp_permute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """As llama.cpp's convert_hf_to_gguf.py reorders q and k of llama models."""
    half = rows.shape[0] // num_heads // 2
    return rows.reshape(num_heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(path, family="llama", *, quantise=None, pre="smollm", skip=(), extra=None, **metadata):
    """A tiny model of `family` as a GGUF file; `quantise` names a type for the matrices."""
    model, arch = tiny_model(family), ARCHES[family]
    config, tokenizer = model.config, tiny_tokenizer()
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(getattr(config, "head_dim", 8))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    backend = tokenizer.backend_tokenizer
    tokens = [backend.id_to_token(i) for i in range(len(tokenizer))]
    merges = json.loads(backend.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges([" ".join(m) for m in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(tokenizer.chat_template)
    for key, value in metadata.items():
        writer.add_uint32(f"{arch}.{key}", value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    tensors = dict(model.state_dict())
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for name, value in tensors.items():
        stem, _, suffix = name.rpartition(".")
        found = f"{names.get_name(stem)}.{suffix}"
        if found in skip:
            continue
        rows = value.numpy()
        if arch == "llama" and "attn_q." in found:
            rows = llama_cpp_permute(rows, config.num_attention_heads)
        if arch == "llama" and "attn_k." in found:
            rows = llama_cpp_permute(rows, config.num_key_value_heads)
        if quantise is not None and rows.ndim > 1:
            writer.add_tensor(found, gguf.quantize(rows, quantise), raw_dtype=quantise)
        else:
            writer.add_tensor(found, np.ascontiguousarray(rows))
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("family", ARCHES)
def test_weights_come_back_bit_for_bit(family, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", family)
    loaded = load_model(ModelSettings(load=str(path), dtype="fp32", device="cpu"))
    expected = tiny_model(family)
    assert loaded.model.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(v, expected.state_dict()[n]) for n, v in loaded.model.state_dict().items())
    ids = torch.arange(12).view(1, -1)
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, expected(ids).logits)
    again = load_model(ModelSettings(load=str(path), dtype="fp32", device="cpu"))
    assert again.source == loaded.source, "the converted folder is used again"


def test_quantised_weights_are_the_packages_own_dequantisation_in_bf16(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "qwen3", quantise=Q8_0)
    model = load_model(ModelSettings(load=str(path), dtype="bf16", device="cpu")).model
    for name, value in tiny_model("qwen3").state_dict().items():
        if value.dim() > 1:
            value = torch.from_numpy(gguf.dequantize(gguf.quantize(value.numpy(), Q8_0), Q8_0))
        assert torch.equal(model.state_dict()[name], value.bfloat16()), name


def test_unpermute_undoes_llama_cpp():
    rows = np.arange(4 * 8 * 3).reshape(32, 3)
    assert np.array_equal(unpermute(torch.from_numpy(llama_cpp_permute(rows, 4)), 4).numpy(), rows)


TEXTS = [
    "Explain  12 moons",
    "你好，世界。 请 3.14",
    "a\n\n  b\t c'll DON'T x1y22",
    "  12   345",
    "é\u0301 <|im_end|> ok",
]


def test_the_tokenizer_comes_back_equal(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    tokenizer, expected = load_tokenizer(ModelSettings(load=str(path))), tiny_tokenizer()
    assert tokenizer.get_vocab() == expected.get_vocab()
    assert tokenizer.chat_template == expected.chat_template
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    for text in TEXTS:
        assert tokenizer(text).input_ids == expected(text).input_ids
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("gpt-2", [" ", " 12", "  ", " 345"]),
        ("smollm", ["  ", "1", "2", "   ", "3", "4", "5"]),
        ("llama-bpe", [" ", " ", "12", "  ", " ", "345"]),
        ("qwen2", [" ", " ", "1", "2", "  ", " ", "3", "4", "5"]),
    ],
)
def test_splitting_rules_differ_at_spaces_and_digits(rule, expected):
    pieces = [piece.replace("Ġ", " ") for piece, _ in PRE_TOKENIZERS[rule]().pre_tokenize_str("  12   345")]
    assert pieces == expected


def test_llama3_rope_factors_become_its_four_parameters(tmp_path):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, head_dim=128, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 128, 2).double() / 128)

    class File:
        path = "x.gguf"

        def read(self, name):
            return (plain / scaled.double()).float()

    assert _llama3_rope(File(), 500000.0, 128) == {k: v for k, v in rope.items() if k != "rope_theta"}
    with pytest.raises(ModelError, match="match no published rope scaling"):
        _llama3_rope(File(), 10000.0, 128)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"skip": ("blk.1.ffn_up.weight",)}, "has no tensor for model.layers.1.mlp.up_proj.weight"),
        ({"extra": {"blk.0.strange.weight": np.ones(4, np.float32)}}, "no llama model has, e.g. blk.0.strange.weight"),
        ({"expert_count": 4}, "holds experts"),
    ],
)
def test_what_cannot_be_read_exactly_is_refused(tmp_path, options, sentence):
    path = write_gguf(tmp_path / "m.gguf", **options)
    with pytest.raises(ModelError, match=sentence):
        load_model(ModelSettings(load=str(path), device="cpu"))
    assert not list(tmp_path.glob("**/*aside*"))


def test_an_unknown_splitting_rule_asks_for_a_tokenizer(tmp_path, tiny_folder):
    path = write_gguf(tmp_path / "m.gguf", pre="mystery")
    with pytest.raises(ModelError, match="name one with --tokenizer-name-or-path"):
        load_model(ModelSettings(load=str(path), device="cpu"))
    load_model(ModelSettings(load=str(path), tokenizer_name_or_path=str(tiny_folder), device="cpu"))


def test_torn_and_foreign_files(tmp_path):
    path = write_gguf(tmp_path / "m.gguf")
    torn = tmp_path / "torn.gguf"
    for keep in (path.stat().st_size - 100, 2000, 4):
        torn.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(ModelError, match="torn"):
            GGUFFile(torn)
    torn.write_text("not a model")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        GGUFFile(torn)
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match="holds a 'mamba' model; GGUF files are read for llama, qwen2, qwen3"):
        convert_gguf(tmp_path / "other.gguf", tmp_path)


def test_ignore_merges_is_llama_bpe_only(tmp_path):
    for pre, expected in (("llama-bpe", True), ("qwen2", False)):
        tokenizer = load_tokenizer(ModelSettings(load=str(write_gguf(tmp_path / f"{pre}.gguf", pre=pre))))
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        assert isinstance(backend.model, models.BPE) and backend.model.ignore_merges is expected
        assert (tokenizer("moon").input_ids[0] == 1) is expected, "llama 3 puts its begin token first"
        assert isinstance(tokenizer, type(AutoTokenizer.from_pretrained(tokenizer.name_or_path)))
