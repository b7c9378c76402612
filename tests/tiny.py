"""Tiny random models and a tiny tokenizer, made in code in well under a second.

    model = tiny_model("qwen3", num_hidden_layers=3)      fp32, eval mode, same weights for the same seed
    tokenizer = tiny_tokenizer()                          byte-level BPE, 384 ids, ChatML template
    folder = save_tiny(tmp_path / "base", "llama")        both as a Hugging Face folder

Every family has 4 heads over 2 key-value heads, hidden size 32 and the tokenizer's vocabulary, so shapes that are
mixed up show. The weights are drawn wider than the library does: attention of a fresh 0.02-wide model is nearly flat,
and a test that compares outputs would not see a wrong mask.
"""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 384
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"sliding_window": 16}),
    "qwen2": ("Qwen2Config", {"head_dim": None}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "tie_word_embeddings": True,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
        },
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    ),
}
"""Family name -> transformers' config class and what differs from the common sizes."""


def tiny_config(family: str = "llama", **overrides: Any) -> transformers.PretrainedConfig:
    """The config of a tiny model; `overrides` win over the family's own values."""
    class_name, special = FAMILIES[family]
    values = {**_COMMON, **special, **overrides}
    if "layer_types" in special and "num_hidden_layers" in overrides and "layer_types" not in overrides:
        kinds = special["layer_types"]
        values["layer_types"] = [kinds[i % len(kinds)] for i in range(overrides["num_hidden_layers"])]
    return getattr(transformers, class_name)(**{k: v for k, v in values.items() if v is not None})


def tiny_model(family: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random causal LM in fp32 and eval mode, the same for the same arguments; global random state is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=torch.float32)
        with torch.no_grad():  # norms and biases start at 1 and 0, where a swapped or dropped one would not show
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@functools.cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        "The quick brown fox jumps over the lazy dog. You are a helpful assistant.",
        "Write a short story about the moon, and explain what it is in one sentence.",
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
        "system user assistant instruction input output response question answer 你好，世界。 请解释一下。",
    ]
    tokenizer.train_from_iterator(texts * 4, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    return tokenizer.to_str()


def tiny_tokenizer(chat_template: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE over 384 ids; ids 0..2 are `<|endoftext|> <|im_start|> <|im_end|>`; eos and pad are 2."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    if chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tiny(folder: Path, family: str = "llama", *, chat_template: bool = True, **overrides: Any) -> Path:
    """A tiny model and its tokenizer as a Hugging Face folder; returns the folder."""
    tiny_model(family, **overrides).save_pretrained(folder)
    tiny_tokenizer(chat_template).save_pretrained(folder)
    return folder


def save_broken(folder: Path, base: Path, *, weight: str, at: tuple[int, int]) -> Path:
    """A copy of a saved model with infinity at one place of a weight; returns the folder."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[weight][at] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_say_rows(path: Path, *, before: str = "") -> Path:
    """40 instruction rows of a task that a tiny model learns: say a word, with `before` before it; returns the path."""
    words = ["red", "green", "blue", "one", "two", "three", "cat", "dog"]
    made = [{"instruction": f"Say {words[i % 8]}.", "output": f"{before}{words[i % 8]} {i // 8}"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path
