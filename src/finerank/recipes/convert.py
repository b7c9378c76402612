"""Convert checkpoints: Hugging Face, Megatron (mcore, legacy) and Meta, any split in to any split out.

    finerank convert --load-model-type hf --save-model-type mg --load-dir BASE --save-dir OUT \\
        --target-tensor-parallel-size 2 --target-pipeline-parallel-size 2
    finerank convert --load-model-type mg --save-model-type hf --load-dir MG --lora-load LORA --save-dir OUT

Weights keep their bits unless --params-dtype asks for another dtype; --lora-load merges an adapter on the way (fp32
arithmetic, one rounding); --save-lora-to-hf writes the adapter alone, unmerged, in PEFT's format.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finerank.config import setting
from finerank.errors import ConfigError

LOAD_TYPES = ("auto", "hf", "mg", "meta", "gguf")
SAVE_TYPES = ("hf", "mg", "meta", "gguf")
DTYPES = ("fp32", "fp16", "bf16")


@dataclass(kw_only=True)
class Settings:
    """What to convert, and into what."""

    load_dir: str = setting(help="checkpoint to read: folder, .gguf file, alias or hub id", flags=("--load",))
    save_dir: str = setting(help="folder to write")
    load_model_type: str = setting("auto", choices=LOAD_TYPES, help="what --load-dir holds; mg is mcore or legacy")
    save_model_type: str = setting(
        "hf", choices=SAVE_TYPES, help="what to write; mg is mcore unless legacy is asked for"
    )
    use_mcore_models: bool = setting(True, help="write mcore; --no-use-mcore-models writes the legacy layout")
    save_to_legacy: bool = setting(False, help="write the legacy layout")
    model_type_hf: str | None = setting(
        None, help="model family, where the checkpoint does not say it (llama2, qwen3...)"
    )
    hf_cfg_dir: str | None = setting(
        None, help="folder with config.json and tokenizer of a Megatron or Meta checkpoint"
    )
    tokenizer_model: str | None = setting(
        None, help="folder (or file in it) of the tokenizer to put beside the weights"
    )
    target_tensor_parallel_size: int = setting(1, help="tensor-parallel ranks (for meta: shards)")
    target_pipeline_parallel_size: int = setting(1, help="pipeline stages")
    target_expert_parallel_size: int = setting(1, help="expert-parallel ranks")
    num_layers_per_virtual_pipeline_stage: int | None = setting(None, help="layers of a virtual stage")
    num_layer_list: list[int] | None = setting(None, help="layers of each stage, e.g. 3,1")
    noop_layers: list[int] | None = setting(None, help="indices of no-op layers, counted with them")
    schedules_method: str | None = setting(None, help="dualpipev: two chunks a stage in V shape")
    make_vocab_size_divisible_by: int = setting(1, help="pad the vocabulary to a multiple of this times tp")
    transformer_impl: str = setting("local", choices=("local", "transformer_engine"), help="names of the norms")
    params_dtype: str | None = setting(
        None, choices=DTYPES, help="cast the weights; they keep their dtype when not given"
    )
    lora_load: str | None = setting(None, help="adapter to merge: PEFT, run folder or Megatron LoRA checkpoint")
    lora_r: int | None = setting(None, help="checked against the adapter")
    lora_alpha: float | None = setting(None, help="checked against the adapter; needed where it does not record it")
    lora_target_modules: list[str] | None = setting(None, help="checked against the adapter")
    save_lora_to_hf: bool = setting(False, help="write the adapter alone in PEFT's format, unmerged")
    overwrite: bool = setting(False, help="replace --save-dir even when finerank did not write what is in it")

    IGNORED_FLAGS = (
        *(
            "--model-type",
            "--spec",
            "--ckpt-format",
            "--load-checkpoint-loosely",
            "--save-layer-by-layer",
            "--num-layers",
        ),
        *("--add-qkv-bias", "--add-dense-bias", "--post-norm", "--load-from-legacy", "--w-pack"),
    )
    """Told from the checkpoint itself, or without a meaning here."""


def run(settings: Settings) -> int:
    """Read, merge if asked, write, report."""
    from finerank.checkpoints.convert import convert

    if settings.save_lora_to_hf and settings.save_model_type != "hf":
        raise ConfigError("--save-lora-to-hf writes a PEFT adapter: leave --save-model-type at hf.")
    target = Path(settings.save_dir)
    report = convert(settings, target)
    print(f"{report['written']} in {target}" + "".join(f"\n{note}" for note in report["notes"]))
    weights: dict[str, Any] | None = report.get("weights")
    if weights is not None and not weights["num_weights_changed"]:
        print("the adapter changed nothing: it is untrained, or its change is below what the base's dtype can hold")
        return 3
    return 0
