"""Fold an adapter into its base model and prove what changed.

    finerank merge runs/first --save-dir merged                            a run folder names its base itself
    finerank merge --load BASE --lora-load ADAPTER --save-dir merged

Writes a Hugging Face folder in the base's dtype (fp32 arithmetic, one rounding) with `merge_report.json` in it: what
happened to the bits, and how far the merged model is from base and adapter on 32 prompts. Exit status 3 when that is
over --max-kl, or when the adapter changed nothing.
"""

from dataclasses import dataclass
from pathlib import Path

from finerank.checkpoints.settings import AdapterOnBaseSettings
from finerank.errors import ConfigError


@dataclass(kw_only=True)
class Settings(AdapterOnBaseSettings):
    """What to merge, and where to."""


def run(settings: Settings) -> int:
    """Merge, write, prove; 0, or 3 when the result does not hold up."""
    from finerank.checkpoints.formats import hf
    from finerank.checkpoints.merge import merged_model, plan_merge
    from finerank.checkpoints.open import named_base, open_adapter, open_base
    from finerank.checkpoints.output import check_output, output_folder
    from finerank.checkpoints.quantized_base import base_as_trained
    from finerank.checkpoints.report import describe, merge_report, verdict

    if (settings.run is None) == (settings.lora_load is None):
        raise ConfigError("Name the adapter once: finerank merge RUN --save-dir OUT, or with --lora-load ADAPTER.")
    adapter_folder = Path(settings.run or settings.lora_load or "")
    base_name = settings.load or named_base(adapter_folder)
    base = base_as_trained(open_base(base_name), adapter_folder, settings.base_precision)
    adapter = open_adapter(
        adapter_folder,
        hf_config=base.config,
        lora_r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_target_modules=settings.lora_target_modules,
    )
    plan = plan_merge(base, adapter)
    target, sources = Path(settings.save_dir), [Path(base_name), base.folder, adapter_folder]
    check_output(target, sources=sources, overwrite=settings.overwrite)
    print(f"merging {adapter_folder} into {base_name}: {plan.describe()}", flush=True)
    merged = merged_model(base, plan)
    with output_folder(target, sources=sources, overwrite=settings.overwrite) as folder:
        hf.write(merged, folder)
        hf.copy_tokenizer(adapter_folder, folder)
        report = merge_report(base, adapter, merged, folder, proof=settings.proof, max_kl=settings.max_kl)
        report.update(base=base_name, adapter=str(adapter_folder), notes=[*base.notes, *plan.notes])
        hf.write_json(folder / "merge_report.json", report)
    print(f"{describe(report)}\nmerged model in {target}")
    problem = verdict(report)
    if problem is not None:
        print(f"NOT PROVEN: {problem}")
    return 3 if problem else 0
