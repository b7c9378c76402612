"""Write an adapter or the merged model in one format, read it back, and report whether it is the same."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from finerank.checkpoints.expert_factors import expand_experts
from finerank.checkpoints.formats import hf, legacy, mcore, meta, peft
from finerank.checkpoints.lora import Adapter, Factors
from finerank.checkpoints.megatron import Target
from finerank.checkpoints.merge import merged_model, plan_merge
from finerank.checkpoints.open import formats
from finerank.checkpoints.report import merge_report
from finerank.checkpoints.weights import BaseModel
from finerank.errors import AdapterError, ConfigError

MAX_DELTA_ERROR = 1e-6
"""Bound on the error of an exported adapter's `scale * B A`, relative to the largest entry of that product."""


class ExportSettings(Protocol):
    """The settings of `finerank export`; see `recipes/export.py`."""

    to: str
    lora_form: str
    fold: bool
    target_tensor_parallel_size: int
    target_pipeline_parallel_size: int
    target_expert_parallel_size: int
    num_layers_per_virtual_pipeline_stage: int | None
    num_layer_list: list[int] | None
    proof: str
    max_kl: float


def check_flags(s: ExportSettings) -> None:
    """Raise ConfigError for a flag that would have no effect on this target."""
    is_megatron = s.to in ("mcore", "legacy")
    wrong = {
        "--target-tensor-parallel-size": s.target_tensor_parallel_size != 1 and not is_megatron and s.to != "meta",
        "--target-pipeline-parallel-size": s.target_pipeline_parallel_size != 1 and not is_megatron,
        "--target-expert-parallel-size": s.target_expert_parallel_size != 1 and not is_megatron,
        "--num-layers-per-virtual-pipeline-stage": s.num_layers_per_virtual_pipeline_stage is not None
        and not is_megatron,
        "--num-layer-list": s.num_layer_list is not None and not is_megatron,
        "--lora-form": s.lora_form != "filtered" and not is_megatron,
        "--fold": s.fold and not writes_adapter(s),
    }
    for flag, is_wrong in wrong.items():
        if is_wrong:
            raise ConfigError(f"{flag} has no effect on --to {s.to}; leave it out.")


def writes_adapter(s: ExportSettings) -> bool:
    """The export holds the adapter, not a merged model."""
    return s.to in ("peft", "gguf-lora") or (s.to in ("mcore", "legacy") and s.lora_form != "merged")


def write(s: ExportSettings, base: BaseModel, adapter: Adapter, folder: Path) -> dict[str, Any]:
    """Write into an existing empty folder and return the report."""
    if writes_adapter(s):
        if s.to in ("mcore", "legacy"):  # Megatron has local experts
            adapter = expand_experts(adapter, base.config)
        notes, again = _write_adapter(s, base, adapter, folder)
        return {**compare_adapters(adapter, again), "notes": list(notes)}
    plan = plan_merge(base, adapter)
    merged = merged_model(base, plan)
    with tempfile.TemporaryDirectory(prefix="finerank-export-") as scratch:
        if adapter.rows:  # the adapter's own tokenizer has the tokens
            merged = replace(merged, folder=_texts(base, Path(adapter.source), Path(scratch) / "texts"))
        _write_merged(s, merged, folder)
        readable = folder if s.to == "hf" else _read_back(s, merged, folder, Path(scratch))
        report = merge_report(base, adapter, merged, readable, proof=s.proof, max_kl=s.max_kl)
    return {**report, "notes": list(plan.notes)}


def _target(s: ExportSettings) -> Target:
    return Target(
        tp=s.target_tensor_parallel_size,
        pp=s.target_pipeline_parallel_size,
        ep=s.target_expert_parallel_size,
        layers_per_virtual_stage=s.num_layers_per_virtual_pipeline_stage,
        num_layer_list=s.num_layer_list,
    )


def _write_adapter(
    s: ExportSettings, base: BaseModel, adapter: Adapter, folder: Path
) -> tuple[tuple[str, ...], Adapter]:
    """(notes, the adapter as read back)."""
    if s.to == "peft":
        peft.write_adapter(adapter, folder)
        return (), peft.read_adapter(folder)
    if s.to == "gguf-lora":
        gguf = formats()["gguf"]
        return gguf.write_adapter(adapter, folder, base=base), gguf.read_adapter(folder, hf_config=base.config)
    form = mcore if s.to == "mcore" else legacy
    notes = form.write_adapter(adapter, folder, base=base, target=_target(s), with_base=s.lora_form == "full")
    return notes, form.read_adapter(folder, hf_config=base.config)


def _write_merged(s: ExportSettings, merged: BaseModel, folder: Path) -> None:
    if s.to == "hf":
        hf.write(merged, folder)
    elif s.to == "meta":
        meta.write(merged, folder, num_shards=s.target_tensor_parallel_size)
    elif s.to == "gguf":
        formats()["gguf"].write(merged, folder)
    else:
        (mcore if s.to == "mcore" else legacy).write(merged, folder, target=_target(s))


def _texts(base: BaseModel, adapter: Path, folder: Path) -> Path:
    """A folder of the base's texts with the adapter's tokenizer."""
    folder.mkdir()
    hf.copy_text_files(base.folder, folder)
    hf.copy_tokenizer(adapter, folder)
    return folder


def _read_back(s: ExportSettings, merged: BaseModel, folder: Path, scratch: Path) -> Path:
    """What was written, as a Hugging Face folder that transformers can load."""
    if s.to == "gguf":
        from finerank.models.gguf_file import convert_gguf

        convert_gguf(next(folder.glob("*.gguf")), scratch)
        return scratch
    read = {"meta": meta.read, "mcore": mcore.read, "legacy": legacy.read}[s.to]
    again = read(folder, hf_config=dict(merged.config))
    hf.write(replace(again, folder=merged.folder), scratch)
    return scratch


def compare_adapters(before: Adapter, after: Adapter) -> dict[str, Any]:
    """Is the exported adapter the same change? Errors are of `scale * B A`, in fp64.

    Raises:
        AdapterError: modules are missing or were added.
    """
    extra = {name for name in set(after.factors) - set(before.factors) if after.factors[name].b_OR.count_nonzero()}
    missing = set(before.factors) - set(after.factors)
    if missing or extra:
        raise AdapterError(f"The exported adapter does not have the same modules: {sorted(missing | extra)[0]}.")
    rows: list[dict[str, Any]] = []
    for name, factors in before.factors.items():
        error, largest = _delta_error(factors, after.factors[name])
        rows.append({"name": name, "max_error": error, "max_entry": largest, "relative": error / (largest or 1.0)})
    return {
        "modules": rows,
        "num_modules": len(rows),
        "num_modules_changed_nothing": sum(row["max_entry"] == 0 for row in rows),
        "max_relative_error": max((row["relative"] for row in rows), default=0.0),
        "bound": {"max_relative_error": MAX_DELTA_ERROR},
    }


def _delta_error(before: Factors, after: Factors) -> tuple[float, float]:
    """(largest difference of the products, largest entry), computed in blocks of rows."""
    error = largest = 0.0
    for start in range(0, before.b_OR.shape[0], 1024):
        rows = slice(start, start + 1024)
        old = before.scale * (before.b_OR[rows].double() @ before.a_RI.double())
        new = after.scale * (after.b_OR[rows].double() @ after.a_RI.double())
        error = max(error, float((old - new).abs().max()))
        largest = max(largest, float(old.abs().max()))
    if (before.magnitude_O is None) != (after.magnitude_O is None) or (
        before.magnitude_O is not None
        and after.magnitude_O is not None
        and not torch.equal(before.magnitude_O, after.magnitude_O)
    ):
        return float("inf"), largest
    return error, largest


def adapter_verdict(report: dict[str, Any]) -> str | None:
    """What does not hold up of an exported adapter, in words; None when all is well."""
    if report["num_modules"] and report["num_modules_changed_nothing"] == report["num_modules"]:
        return "the adapter changes nothing: it is untrained"
    bound = report["bound"]["max_relative_error"]
    if not report["max_relative_error"] <= bound:
        return f"the exported change differs by {report['max_relative_error']:.3g} of its largest entry, over {bound:g}"
    return None


def describe_adapter(report: dict[str, Any]) -> str:
    """A few lines for the terminal."""
    text = (
        f"{report['num_modules']} modules read back; their change differs by at most "
        f"{report['max_relative_error']:.3g} of its largest entry"
    )
    return "\n".join([text, *report["notes"]])


def save_report(report: dict[str, Any], folder: Path) -> None:
    """Write `merge_report.json`."""
    hf.write_json(folder / "merge_report.json", report)
