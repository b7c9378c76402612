"""Settings of the data pipeline; defaults only here."""

from dataclasses import dataclass
from typing import Any, Literal

from finerank.config import setting


@dataclass(kw_only=True)
class TemplateSettings:
    """How a conversation becomes text and ids; shared by preprocess, tune, generate, chat and evaluate."""

    prompt_type: str | None = setting(
        None, help="named prompt template, e.g. qwen3 or llama2", flags=("--prompt-template-name",)
    )
    hf_chat_template: bool | None = setting(
        None, help="use the tokenizer's own chat template (the default where it has one and no --prompt-type is given)"
    )
    enable_thinking: str = setting(
        "none", choices=("true", "false", "none"), help="thinking rule of reasoning templates"
    )
    allow_special_tokens: bool = setting(
        False, help="let special-token text inside user data become control tokens instead of staying text"
    )


@dataclass(kw_only=True)
class RowSettings(TemplateSettings):
    """How rows are read and what happens to each of them; shared by preprocess and tune."""

    handler_name: str | None = setting(
        None, help="row format, e.g. AlpacaStyleInstructionHandler; told apart when not given"
    )
    map_keys: dict[str, Any] | None = setting(None, help="columns by role, key=value or JSON, e.g. prompt=question")
    train_on_prompt: bool = setting(False, help="count the loss on prompts too", flags=("--train-on-inputs",))
    mask_history: bool = setting(False, help="count the loss on the last answer only")
    seq_length: int = setting(2048, help="longest sample in tokens", flags=("--cutoff-len", "--max-seq-length"))
    overlong: str = setting("truncate", choices=("truncate", "drop", "error"), help="what to do with longer samples")
    sample_by: str = setting(
        "line",
        choices=("line", "paragraph", "document"),
        help="plain-text files: a text is a line, a paragraph between blank lines, or the whole file",
    )
    append_eod: bool = setting(
        False, help="append the end-of-text token to each sample and train on it", flags=("--add-eos-token",)
    )
    deduplicate: bool = setting(False, help="drop exact copies of earlier samples")
    strict: bool = setting(False, help="stop at the first bad row instead of dropping and counting it")
    workers: int = setting(1, help="processes for preprocessing")


@dataclass(kw_only=True)
class BatchSettings:
    """How samples become global batches and micro-batches."""

    global_batch_size: int = setting(16, help="samples per optimizer step", flags=("--batch-size",))
    micro_batch_size: int | Literal["auto"] | None = setting(
        None,
        words=("auto",),
        help="most samples per forward pass; packed: as many as fit the token budget, padded: 1; "
        "auto: the most that memory holds (packed: sets --micro-batch-tokens)",
    )
    micro_batch_tokens: int = setting(2048, help="token budget of a packed micro-batch; never below the longest sample")
    micro_batches_at_once: int | None = setting(
        None,
        help="CPU: packed micro-batches computed side by side, each with its share of the threads; "
        "not given: 2 where the method allows it, 1 needs less memory",
    )
    pack: bool = setting(True, help="pack samples without attention between them")
    share_prompts: bool | None = setting(
        None,
        help="packs: compute once what several samples begin with (a system prompt, the prompt of a pair); "
        "not given: on the CPU, where the model and the method allow it",
    )
    variable_seq_lengths: bool = setting(
        True,
        help="padded batches: pad to the longest of the micro-batch, not to --seq-length",
        flags=("--no-pad-to-seq-lengths",),
    )
    pad_to_multiple_of: int = setting(8, help="padded batches: round their length up to a multiple")
    shuffle: bool = setting(True, help="permute the samples in each epoch")


@dataclass(kw_only=True)
class DataSettings(RowSettings, BatchSettings):
    """All that tune needs to know about data."""

    stage: str = setting(
        "sft",
        choices=("sft", "pt", "dpo"),
        help="sft: answers to instructions; pt: continued pretraining on plain text; dpo: preference tuning on pairs "
        "of a chosen and a rejected answer",
    )
    data_path: list[str] = setting([], help="rows (json jsonl csv parquet arrow txt, folder) or an indexed prefix")
    data_weights: list[float] = setting([], help="sampling weight of each --data-path")
    valid_data_path: list[str] = setting([], help="held-out rows or indexed prefix")
    val_set_size: float = setting(0.0, help="held-out samples taken from the data: a count, or a share below 1")
    split: str | None = setting(None, help="Megatron's train,valid,test weights, e.g. 949,50,1")
    max_samples: int | None = setting(None, help="use only the first samples")
    data_cache: bool = setting(True, help="keep token ids under the cache folder, keyed by content")
    template_anyway: bool = setting(
        False, help="train on an indexed prefix although it was made with another prompt template"
    )
