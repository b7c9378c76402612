"""Fold an adapter, or several by weight, into the base model and prove what changed.

    finerank merge runs/first --save-dir merged                            a run folder names its base itself
    finerank merge --load BASE --lora-load ADAPTER --save-dir merged
    finerank merge --adapters runs/a:0.7 runs/b:0.3 --save-dir merged      several adapters of one base
    finerank merge --adapters runs/a:0.7 runs/b:0.3 --combine svd --output-adapter both

Writes a Hugging Face folder in the base's dtype (fp32 arithmetic, one rounding) with `merge_report.json` in it: what
happened to the bits, and how far the merged model is from base and adapter on 32 prompts. Exit status 3 when that is
over --max-kl, or when the adapter changed nothing. --output-adapter writes the combined adapter itself, as PEFT does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finerank.checkpoints.settings import AdapterOnBaseSettings
from finerank.config import setting
from finerank.errors import AdapterError, ConfigError

if TYPE_CHECKING:
    from finerank.checkpoints.combine import Combined
    from finerank.checkpoints.lora import Adapter
    from finerank.checkpoints.weights import BaseModel


@dataclass(kw_only=True)
class Settings(AdapterOnBaseSettings):
    """What to merge, and where to."""

    save_dir: str | None = setting(None, help="folder for the merged model", flags=("--output-dir",))
    adapters: list[str] | None = setting(
        None, help="several adapters, each with its weight: runs/a:0.7 runs/b:0.3", split=False
    )
    combine: str | None = setting(
        None,
        choices=("cat", "svd", "linear"),
        help="how --adapters become one: cat is exact, svd the best of one rank, linear a rough sum; default cat",
    )
    svd_rank: int | None = setting(None, help="--combine svd: rank of the result; default: the adapters' highest")
    output_adapter: str | None = setting(None, help="folder for the combined adapter of --adapters, in PEFT's format")


def run(settings: Settings) -> int:
    """Merge, write, prove; 0, or 3 when the result does not hold up."""
    from finerank.checkpoints.open import named_base, open_adapter, open_base
    from finerank.checkpoints.quantized_base import base_as_trained

    _check(settings)
    if settings.adapters is not None:
        return _run_combined(settings)
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
    return _merge(settings, base, base_name, adapter, [adapter_folder])


def _check(settings: Settings) -> None:
    named = [settings.run, settings.lora_load, settings.adapters or None]
    if sum(name is not None for name in named) != 1:
        raise ConfigError(
            "Name the adapter once: finerank merge RUN --save-dir OUT, or with --lora-load ADAPTER, or several with "
            "--adapters A:0.7 B:0.3."
        )
    if settings.adapters is None:
        for name in ("combine", "svd_rank", "output_adapter"):
            if getattr(settings, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} has no effect without --adapters; give adapters there.")
    else:
        for name in ("lora_r", "lora_alpha", "lora_target_modules"):
            if getattr(settings, name) is not None:
                raise ConfigError(f"--{name.replace('_', '-')} is checked against one adapter; leave it out.")
    if settings.save_dir is None and settings.output_adapter is None:
        raise ConfigError("Missing --save-dir: give the folder to write.")


def _merge(
    settings: Settings,
    base: "BaseModel",
    base_name: str,
    adapter: "Adapter",
    folders: Sequence[Path],
    combined: "Combined | None" = None,
) -> int:
    """Write the merged model to --save-dir with its proof. `folders`: where the adapter came from."""
    from finerank.checkpoints.formats import hf
    from finerank.checkpoints.merge import merged_model, plan_merge
    from finerank.checkpoints.output import check_output, output_folder
    from finerank.checkpoints.report import describe, merge_report, verdict

    plan = plan_merge(base, adapter)
    target, sources = Path(settings.save_dir or ""), [Path(base_name), base.folder, *folders]
    check_output(target, sources=sources, overwrite=settings.overwrite)
    print(f"merging {adapter.source} into {base_name}: {plan.describe()}", flush=True)
    merged = merged_model(base, plan)
    with output_folder(target, sources=sources, overwrite=settings.overwrite) as folder:
        hf.write(merged, folder)
        hf.copy_tokenizer(folders[0], folder)
        report = merge_report(base, adapter, merged, folder, proof=settings.proof, max_kl=settings.max_kl)
        report.update(base=base_name, adapter=adapter.source, notes=[*base.notes, *plan.notes])
        if combined is not None:
            report["combined"] = combined.report()
        hf.write_json(folder / "merge_report.json", report)
    print(f"{describe(report)}\nmerged model in {target}")
    problem = verdict(report)
    if problem is not None:
        print(f"NOT PROVEN: {problem}")
    return 3 if problem else 0


def _run_combined(settings: Settings) -> int:
    """Combine --adapters; write the result as an adapter, into the base, or both."""
    from finerank.checkpoints.combine import Part, check_one_base, combine, described_runs, parse_weighted
    from finerank.checkpoints.open import open_adapter, open_base
    from finerank.checkpoints.quantized_base import base_as_trained, bits_of_run

    folders, weights = zip(*(parse_weighted(text) for text in settings.adapters or ()), strict=True)
    base = open_base(settings.load) if settings.load is not None else None
    adapters = [open_adapter(folder, hf_config=base.config if base else None) for folder in folders]
    runs = described_runs(folders)
    check_one_base(adapters, [run.base_digest for run in runs], compare_names=settings.load is None)
    parts = [Part(adapter, weight) for adapter, weight in zip(adapters, weights, strict=True)]
    combined = combine(parts, settings.combine or "cat", rank=settings.svd_rank)
    print(f"{settings.combine or 'cat'}: {combined.describe()}", flush=True)
    if len({run.template for run in runs}) > 1:
        print(f"the adapters were trained with different prompt templates; that of {folders[0]} goes with the result")
    if settings.output_adapter is not None:
        _write_adapter(settings, combined, folders)
    if settings.save_dir is None:
        return 0
    base_name = settings.load or next((a.base_model_name for a in adapters if a.base_model_name), None)
    if base_name is None:
        raise ConfigError("None of the adapters names its base model; give it with --load.")
    if settings.base_precision == "trained" and len({bits_of_run(folder) for folder in folders}) > 1:
        raise AdapterError(
            "The adapters were trained over bases of different precision; say with --base-precision which one to merge "
            "them into."
        )
    base = base_as_trained(base or open_base(base_name), folders[0], settings.base_precision)
    return _merge(settings, base, base_name, combined.adapter, folders, combined)


def _write_adapter(settings: Settings, combined: "Combined", folders: Sequence[Path]) -> None:
    from finerank.checkpoints.export import adapter_verdict, compare_adapters
    from finerank.checkpoints.formats import hf, peft
    from finerank.checkpoints.output import output_folder

    target = Path(settings.output_adapter or "")
    with output_folder(target, sources=folders, overwrite=settings.overwrite, flag="--output-adapter") as folder:
        peft.write_adapter(combined.adapter, folder)
        hf.copy_tokenizer(folders[0], folder)
        report = compare_adapters(combined.adapter, peft.read_adapter(folder))
        if (problem := adapter_verdict(report)) is not None:
            raise AdapterError(f"The combined adapter is of no use: {problem}.")
        report.update(adapter=combined.adapter.source, combined=combined.report())
        hf.write_json(folder / "merge_report.json", report)
    print(f"combined adapter in {target}")
