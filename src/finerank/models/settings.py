"""Settings of the base model; defaults only here."""

from dataclasses import dataclass

from finerank.config import setting


@dataclass(kw_only=True)
class VocabularySettings:
    """Tokens that the base model does not have."""

    add_tokens: list[str] = setting(
        [], help="new tokens, e.g. '<tool>' '</tool>'; only their rows of the vocabulary are trained"
    )


@dataclass(kw_only=True)
class SourceSettings:
    """Which base model and tokenizer."""

    load: str | None = setting(
        None,
        help="base model: alias (smollm2-135m), folder, hub id or .gguf file",
        flags=("--base-model", "--model-name-or-path"),
    )
    model_config: str | None = setting(None, help="config.json (or its folder) of a model to initialise at random")
    tokenizer_name_or_path: str | None = setting(
        None, help="tokenizer folder or hub id when it is not with the model", flags=("--tokenizer-model",)
    )
    revision: str | None = setting(None, help="hub revision of the base model")
    trust_remote_code: bool = setting(False, help="run the Python code that a model folder brings along")


@dataclass(kw_only=True)
class ModelSettings(SourceSettings):
    """The same, in which precision, where."""

    dtype: str = setting(
        "auto", choices=("auto", "bf16", "fp32"), help="base weights: auto takes bf16 where it is fast"
    )
    load_4bit: bool = setting(
        False, help="QLoRA: keep the base's linears in 4 bits (NF4, double quantisation)", flags=("--qlora",)
    )
    load_8bit: bool = setting(False, help="keep the base's linears in 8 bits")
    bf16: bool = setting(False, help="same as --dtype bf16, as Megatron spells it")
    device: str = setting("auto", help="cpu, cuda, cuda:N, mps or auto")
