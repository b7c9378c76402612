"""Settings of what brings an adapter and its base together: merge and export; defaults only here."""

from dataclasses import dataclass

from finerank.config import setting


@dataclass(kw_only=True)
class AdapterOnBaseSettings:
    """Which adapter, on which base, and what has to be proven."""

    run: str | None = setting(None, help="run folder or adapter folder; the same as --lora-load", positional=True)
    load: str | None = setting(
        None,
        help="base model: alias, folder of any format, hub id or .gguf file; the adapter's own base when not given",
        flags=("--base-model", "--load-dir", "--model-name-or-path"),
    )
    lora_load: str | None = setting(
        None, help="adapter: PEFT folder, run folder or Megatron LoRA checkpoint", flags=("--lora-weights",)
    )
    lora_r: int | None = setting(None, help="checked against the adapter")
    lora_alpha: float | None = setting(None, help="checked against the adapter; needed where it does not record it")
    lora_target_modules: list[str] | None = setting(None, help="checked against the adapter")
    base_precision: str = setting(
        "trained",
        choices=("trained", "original", "4bit", "8bit"),
        help="base to merge onto: as the run trained it (QLoRA: dequantised), the original, or as named",
    )
    proof: str = setting(
        "auto",
        choices=("auto", "full", "weights"),
        help="full runs both models; weights looks at the bits only; auto is full where the model fits in memory",
    )
    max_kl: float = setting(0.01, help="mean KL in nats between base with adapter and merged model; over it, status 3")
    overwrite: bool = setting(False, help="replace --save-dir even when finerank did not write what is in it")
