"""One conversion: open what is there, merge on the way if asked, write what is wanted, say what was done."""

from pathlib import Path
from typing import Any, Protocol

import torch

from finerank.checkpoints.formats import hf, legacy, mcore, meta, peft
from finerank.checkpoints.lora import Adapter
from finerank.checkpoints.megatron import Target
from finerank.checkpoints.merge import MergedWeights, merged_model, plan_merge
from finerank.checkpoints.open import format_of, formats, open_adapter, open_base
from finerank.checkpoints.output import check_output, output_folder
from finerank.checkpoints.weights import BaseModel
from finerank.errors import ConfigError
from finerank.models.families import family_named

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class ConvertSettings(Protocol):
    """The settings of `finerank convert`; see `recipes/convert.py`."""

    load_dir: str
    load_model_type: str
    save_model_type: str
    use_mcore_models: bool
    save_to_legacy: bool
    model_type_hf: str | None
    hf_cfg_dir: str | None
    tokenizer_model: str | None
    target_tensor_parallel_size: int
    target_pipeline_parallel_size: int
    target_expert_parallel_size: int
    num_layers_per_virtual_pipeline_stage: int | None
    num_layer_list: list[int] | None
    noop_layers: list[int] | None
    schedules_method: str | None
    make_vocab_size_divisible_by: int
    transformer_impl: str
    params_dtype: str | None
    lora_load: str | None
    lora_r: int | None
    lora_alpha: float | None
    lora_target_modules: list[str] | None
    save_lora_to_hf: bool
    overwrite: bool


def convert(s: ConvertSettings, folder: Path) -> dict[str, Any]:
    """Convert as the settings say; returns the report that is also saved as `conversion_report.json`."""
    sources = [Path(s.load_dir), Path(s.lora_load) if s.lora_load else None]
    check_output(folder, sources=sources, overwrite=s.overwrite)
    base = open_source(s)
    adapter = open_lora(s, base)
    notes = list(base.notes)
    report: dict[str, Any] = {"load_dir": s.load_dir, "lora_load": s.lora_load, "notes": notes}
    with output_folder(folder, sources=sources, overwrite=s.overwrite) as aside:
        if s.save_lora_to_hf:
            if adapter is None:
                raise ConfigError(f"--save-lora-to-hf: {s.load_dir} holds no adapter; name one with --lora-load.")
            peft.write_adapter(adapter, aside)
            report["written"] = f"PEFT adapter of {len(adapter.factors)} modules"
        else:
            model = base
            if adapter is not None:
                plan = plan_merge(base, adapter)
                notes.append(f"merged: {plan.describe()}")
                model = merged_model(base, plan)
            report["written"] = write_model(s, model, aside)
            if isinstance(model.weights, MergedWeights):
                report["weights"] = model.weights.report.totals()
        hf.write_json(aside / "conversion_report.json", report)
    return report


def open_source(s: ConvertSettings) -> BaseModel:
    """The base model of `--load-dir`, checked against `--load-model-type`."""
    folder = Path(s.load_dir).expanduser()
    found = format_of(folder, "base") if folder.is_dir() else None
    if found in (mcore, legacy):
        name = "mg"
    else:
        name = "meta" if found is meta else "gguf" if folder.suffix == ".gguf" else "hf"
    if s.load_model_type not in ("auto", name):
        raise ConfigError(f"--load-model-type is {s.load_model_type}, but {folder} holds {name}; correct the flag.")
    options: dict[str, Any] = {}
    if name in ("mg", "meta"):
        cfg = Path(s.hf_cfg_dir).expanduser() if s.hf_cfg_dir else None
        if cfg is not None:
            options["hf_config"] = hf.read_json(cfg / "config.json")
        options["hf_folder"] = _tokenizer_folder(s) or cfg
        if name == "mg" and s.model_type_hf:
            options["family"] = family_named(s.model_type_hf)
    elif s.hf_cfg_dir:
        raise ConfigError(f"--hf-cfg-dir belongs to Megatron and Meta checkpoints; {folder} has its own config.json.")
    base = open_base(s.load_dir, **options)
    if s.model_type_hf:
        _check_family(s.model_type_hf, str(base.config.get("model_type")), folder)
    return base


def _check_family(flag: str, model_type: str, folder: Path) -> None:
    family = family_named(flag)
    is_mistral_as_llama = family.name == "llama" and model_type == "mistral"  # as MindSpeed-LLM has it
    if model_type not in family.model_types and not is_mistral_as_llama:
        raise ConfigError(f"--model-type-hf {flag} disagrees with {folder}, a {model_type}; leave it out.")


def _tokenizer_folder(s: ConvertSettings) -> Path | None:
    if s.tokenizer_model is None:
        return None
    path = Path(s.tokenizer_model).expanduser()
    folder = path if path.is_dir() else path.parent
    if not path.exists():
        raise ConfigError(f"--tokenizer-model {path} does not exist; give the tokenizer's folder.")
    return folder


def open_lora(s: ConvertSettings, base: BaseModel) -> Adapter | None:
    """The adapter of `--lora-load`, or the one inside a unified Megatron checkpoint."""
    flags: dict[str, Any] = {
        "lora_r": s.lora_r,
        "lora_alpha": s.lora_alpha,
        "lora_target_modules": s.lora_target_modules,
    }
    if s.lora_load is not None:
        return open_adapter(Path(s.lora_load), hf_config=base.config, **flags)
    folder = Path(s.load_dir).expanduser()
    found = format_of(folder, "adapter") if folder.is_dir() else None
    if found in (mcore, legacy) and found is not None and found.holds_adapter(folder):
        return found.read_adapter(folder, hf_config=base.config, **flags)
    given = [f"--{name.replace('_', '-')}" for name, value in flags.items() if value is not None]
    if given:
        raise ConfigError(f"{given[0]} has no effect: there is no adapter; name one with --lora-load.")
    return None


def write_model(s: ConvertSettings, model: BaseModel, folder: Path) -> str:
    """Write a base model as `--save-model-type` says; returns what was written in words."""
    dtype = DTYPES[s.params_dtype] if s.params_dtype else None
    if s.save_model_type == "mg":
        target = target_of(s)
        is_legacy = s.save_to_legacy or not s.use_mcore_models
        (legacy if is_legacy else mcore).write(model, folder, target=target)
        cut = f"tp {target.tp} pp {target.pp}" + (f" ep {target.ep}" if target.ep > 1 else "")
        return f"Megatron {'legacy' if is_legacy else 'mcore'} checkpoint ({cut})"
    _only_for_megatron(s, allow_tp=s.save_model_type == "meta")
    if s.save_model_type == "meta":
        meta.write(model, folder, num_shards=s.target_tensor_parallel_size, dtype=dtype)
        return f"Meta checkpoint ({s.target_tensor_parallel_size} shards)"
    if s.save_model_type == "gguf":
        formats()["gguf"].write(model, folder, dtype=dtype)
        return "GGUF file"
    hf.write(model, folder, dtype=dtype)
    return "Hugging Face folder"


def target_of(s: ConvertSettings) -> Target:
    """The cut of a Megatron checkpoint that the flags describe."""
    return Target(
        tp=s.target_tensor_parallel_size,
        pp=s.target_pipeline_parallel_size,
        ep=s.target_expert_parallel_size,
        layers_per_virtual_stage=s.num_layers_per_virtual_pipeline_stage,
        num_layer_list=s.num_layer_list,
        noop_layers=s.noop_layers or (),
        schedules_method=s.schedules_method,
        divisible_by=s.make_vocab_size_divisible_by,
        te_norms=s.transformer_impl == "transformer_engine",
        dtype=DTYPES[s.params_dtype] if s.params_dtype else None,
    )


def _only_for_megatron(s: ConvertSettings, *, allow_tp: bool) -> None:
    wrong = {
        "--target-tensor-parallel-size": s.target_tensor_parallel_size != 1 and not allow_tp,
        "--target-pipeline-parallel-size": s.target_pipeline_parallel_size != 1,
        "--target-expert-parallel-size": s.target_expert_parallel_size != 1,
        "--num-layers-per-virtual-pipeline-stage": s.num_layers_per_virtual_pipeline_stage is not None,
        "--num-layer-list": s.num_layer_list is not None,
        "--noop-layers": bool(s.noop_layers),
        "--schedules-method": s.schedules_method is not None,
        "--make-vocab-size-divisible-by": s.make_vocab_size_divisible_by != 1,
        "--save-to-legacy": s.save_to_legacy,
    }
    for flag, is_wrong in wrong.items():
        if is_wrong:
            raise ConfigError(f"{flag} has no effect on --save-model-type {s.save_model_type}; leave it out.")
