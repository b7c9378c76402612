"""Bring a trained adapter into the format another program loads, and prove that it is the same.

    finerank export runs/first --to hf --save-dir merged                    merged Hugging Face folder
    finerank export runs/first --to peft --for vllm --save-dir adapter      the adapter, checked for vLLM
    finerank export runs/first --to gguf-lora --for llama.cpp --save-dir g  adapter.gguf for `--lora`
    finerank export runs/first --to mcore --target-tensor-parallel-size 2 --save-dir lora

`--to peft|gguf-lora` write the adapter; `hf|meta|gguf` write the base with the adapter merged; `mcore|legacy` write
what `--lora-form` says. `--for` names the engine that is to load it: what it would refuse or silently ignore is said
before anything is written. What was written is read back and compared; status 3 when it does not hold.
"""

from dataclasses import dataclass
from pathlib import Path

from finerank.checkpoints.settings import AdapterOnBaseSettings
from finerank.config import setting
from finerank.errors import AdapterError, ConfigError

TARGETS = ("peft", "hf", "mcore", "legacy", "meta", "gguf-lora", "gguf")


@dataclass(kw_only=True)
class Settings(AdapterOnBaseSettings):
    """What to export, into what, for whom."""

    save_dir: str = setting(help="folder to write", flags=("--output-dir",))
    to: str = setting(help="what to write", choices=TARGETS)
    engine: str | None = setting(
        None, help="program that is to load it", choices=("vllm", "llama.cpp", "peft"), flags=("--for",)
    )
    fold: bool = setting(False, help="one rank and one alpha for all modules: fold patterns and rsLoRA into lora_B")
    lora_form: str = setting(
        "filtered",
        choices=("filtered", "full", "merged"),
        help="mcore and legacy: the adapter alone, base and adapter, or the merged base",
    )
    target_tensor_parallel_size: int = setting(1, help="mcore and legacy: tensor-parallel ranks; meta: shards")
    target_pipeline_parallel_size: int = setting(1, help="mcore and legacy: pipeline stages")
    target_expert_parallel_size: int = setting(1, help="mcore and legacy: expert-parallel ranks")
    num_layers_per_virtual_pipeline_stage: int | None = setting(
        None, help="mcore and legacy: layers of a virtual stage"
    )
    num_layer_list: list[int] | None = setting(None, help="mcore and legacy: layers of each stage, e.g. 3,1")


def run(settings: Settings) -> int:
    """Check for the engine, write, read back, report; 0, or 3 when what was written does not hold up."""
    from finerank.checkpoints import export
    from finerank.checkpoints.open import named_base, open_adapter, open_base
    from finerank.checkpoints.output import output_folder
    from finerank.checkpoints.preflight import blocking, fold, preflight
    from finerank.checkpoints.quantized_base import base_as_trained
    from finerank.checkpoints.report import describe, verdict

    if (settings.run is None) == (settings.lora_load is None):
        raise ConfigError("Name the adapter once: finerank export RUN --to FORMAT, or with --lora-load ADAPTER.")
    adapter_folder = Path(settings.run or settings.lora_load or "")
    base_name = settings.load or named_base(adapter_folder)
    base = open_base(base_name)
    if not export.writes_adapter(settings):
        base = base_as_trained(base, adapter_folder, settings.base_precision)
    adapter = open_adapter(
        adapter_folder,
        hf_config=base.config,
        lora_r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_target_modules=settings.lora_target_modules,
    )
    export.check_flags(settings)
    if settings.engine is not None:
        findings = preflight(adapter, base, engine=settings.engine, to=settings.to)
        for finding in findings:
            print(f"{settings.engine} {finding}", flush=True)
        if refused := blocking(findings, fold=settings.fold):
            raise AdapterError(f"{settings.engine} cannot take this export: {refused[0].what}; {refused[0].fix}.")
    if settings.fold:
        adapter = fold(adapter)
    target, sources = Path(settings.save_dir), [Path(base_name), base.folder, adapter_folder]
    with output_folder(target, sources=sources, overwrite=settings.overwrite) as folder:
        report = export.write(settings, base, adapter, folder)
        report.update(base=base_name, adapter=str(adapter_folder), to=settings.to, engine=settings.engine)
        export.save_report(report, folder)
    print(f"{export.describe_adapter(report) if 'modules' in report else describe(report)}\n{settings.to} in {target}")
    problem = export.adapter_verdict(report) if "modules" in report else verdict(report)
    if problem is not None:
        print(f"NOT PROVEN: {problem}")
    return 3 if problem else 0
