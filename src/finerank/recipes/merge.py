"""Fold an adapter into its base model and prove what changed.

    finerank merge runs/first --save-dir merged                            a run folder names its base itself
    finerank merge --load BASE --lora-load ADAPTER --save-dir merged

Writes a Hugging Face folder in the base's dtype (fp32 arithmetic, one rounding) with `merge_report.json` in it. Exit
status 3 when the adapter changed nothing.
"""

from dataclasses import dataclass
from pathlib import Path

from finerank.config import setting
from finerank.errors import ConfigError


@dataclass(kw_only=True)
class Settings:
    """What to merge, and where to."""

    run: str | None = setting(None, help="run folder or adapter folder; the same as --lora-load", positional=True)
    load: str | None = setting(
        None,
        help="base model: alias, folder of any format, hub id or .gguf file; the adapter's own base when not given",
        flags=("--base-model", "--load-dir", "--model-name-or-path"),
    )
    lora_load: str | None = setting(
        None, help="adapter: PEFT folder, run folder or Megatron LoRA checkpoint", flags=("--lora-weights",)
    )
    save_dir: str = setting(help="folder to write", flags=("--output-dir",))
    lora_r: int | None = setting(None, help="checked against the adapter")
    lora_alpha: float | None = setting(None, help="checked against the adapter; needed where it does not record it")
    lora_target_modules: list[str] | None = setting(None, help="checked against the adapter")
    overwrite: bool = setting(False, help="replace --save-dir even when finerank did not write what is in it")


def run(settings: Settings) -> int:
    """Merge, write, report; 0, or 3 when the result does not hold up."""
    from finerank.checkpoints.formats import hf
    from finerank.checkpoints.merge import MergedWeights, merged_model, plan_merge
    from finerank.checkpoints.open import named_base, open_adapter, open_base
    from finerank.checkpoints.output import output_folder

    if (settings.run is None) == (settings.lora_load is None):
        raise ConfigError("Name the adapter once: finerank merge RUN --save-dir OUT, or with --lora-load ADAPTER.")
    adapter_folder = Path(settings.run or settings.lora_load or "")
    base_name = settings.load or named_base(adapter_folder)
    base = open_base(base_name)
    adapter = open_adapter(
        adapter_folder,
        hf_config=base.config,
        lora_r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_target_modules=settings.lora_target_modules,
    )
    plan = plan_merge(base, adapter)
    print(f"merging {adapter_folder} into {base_name}: {plan.describe()}")
    merged = merged_model(base, plan)
    assert isinstance(merged.weights, MergedWeights)
    target = Path(settings.save_dir)
    with output_folder(target, sources=[base.folder, adapter_folder], overwrite=settings.overwrite) as folder:
        hf.write(merged, folder)
        hf.copy_tokenizer(adapter_folder, folder)
        totals = merged.weights.report.totals()
        report = {"base": base_name, "adapter": str(adapter_folder), "weights": totals}
        hf.write_json(folder / "merge_report.json", {**report, "tensors": merged.weights.report.rows()})
    print(
        f"merged model in {target}: {totals['share_of_weights_changed']:.2%} of "
        f"{totals['num_weights_with_adapter']:,} adapted weights changed, rounding error at most "
        f"{totals['max_rounding_error']:.3g}, mean {totals['mean_rounding_error']:.3g}"
    )
    if not totals["num_weights_changed"]:
        print("the adapter changed nothing: it is untrained, or its change is below what the base's dtype can hold")
        return 3
    return 0
