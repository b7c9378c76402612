"""The tokenizer inside a GGUF file, with the splitting rule that its name stands for.

A GGUF file holds vocabulary, merges and the *name* of the rule that splits text before merging
(`tokenizer.ggml.pre`). The rule decides the ids: taken wrongly, "  12" becomes other tokens than the model was trained
on, and nothing complains. So only names whose rule is known are read (`PRE_TOKENIZERS`); for the others the user names
a tokenizer. Rules as in llama.cpp's src/llama-vocab.cpp and the models' own tokenizer.json.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

if TYPE_CHECKING:
    from finerank.models.gguf_file import GGUFFile

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # values of tokenizer.ggml.token_type

_LETTERS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(*before: pre_tokenizers.PreTokenizer, use_regex: bool) -> pre_tokenizers.PreTokenizer:
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return pre_tokenizers.Sequence([*before, last]) if before else last


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return _byte_level(pre_tokenizers.Split(Regex(pattern), behavior="isolated"), use_regex=False)


PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: _byte_level(use_regex=True),
    "smollm": lambda: _byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True),
    "llama-bpe": lambda: _split(_LETTERS % r"\p{N}{1,3}"),
    "qwen2": lambda: _split(_LETTERS % r"\p{N}"),
}
"""Value of `tokenizer.ggml.pre` -> its splitting rule."""


def build_tokenizer(file: "GGUFFile") -> Any | None:
    """The file's tokenizer as a transformers fast tokenizer, or None when the file's kind or rule is not known."""
    from transformers import PreTrainedTokenizerFast

    rule = file.value("tokenizer.ggml.pre")
    if file.value("tokenizer.ggml.model") != "gpt2" or rule not in PRE_TOKENIZERS:
        return None
    tokens: list[str] = file.need("tokenizer.ggml.tokens")
    kinds: list[int] = file.need("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in file.need("tokenizer.ggml.merges")]
    vocabulary = {t: i for i, (t, k) in enumerate(zip(tokens, kinds, strict=True)) if k in (_NORMAL, _CONTROL)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rule == "llama-bpe"))
    backend.pre_tokenizer = PRE_TOKENIZERS[rule]()
    backend.decoder = decoders.ByteLevel()
    if rule == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.add_tokens(
        [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {short: file.value(f"tokenizer.ggml.{long}_token_id") for short, long in names.items()}
    if file.value("tokenizer.ggml.add_bos_token", rule == "llama-bpe") and ids["bos"] is not None:
        bos = tokens[ids["bos"]]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, ids["bos"])]
        )
    special = {f"{short}_token": tokens[i] for short, i in ids.items() if i is not None}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=file.need("{arch}.context_length"),
        **special,
    )
    tokenizer.chat_template = file.value("tokenizer.chat_template")
    return tokenizer
