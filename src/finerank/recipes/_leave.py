"""What a run of tune writes into its folder, besides checkpoints and metrics.

describe(parts)           at the start: settings, template, receipt of the rows
leave(parts, state)       at the end: adapter or model, tokenizer, card, curve, and results.json, which says it is whole
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finerank.adapters.adapter_set import AdapterSet
from finerank.adapters.files import save_adapter
from finerank.checkpoints.quantized_base import save_dequantized
from finerank.data.settings import TemplateSettings
from finerank.files import sha256_file, write_text
from finerank.report.collect import NATS, PER_PAIR
from finerank.report.figures import loss_curve, step_parts
from finerank.train import run_folder
from finerank.train.metrics import FILE_NAME, measures_at, read_metrics
from finerank.train.progress import say
from finerank.train.state import TrainState
from finerank.train.whole_model import WholeModel, save_whole_model

if TYPE_CHECKING:
    from finerank.recipes._prepare import Parts
    from finerank.train.profile import StepProfiler

_TEMPLATE = "template.json"


def describe(parts: "Parts") -> None:
    """What this run is: its settings, rows and template."""
    run_folder.write_config(parts.folder, parts.settings)
    run_folder.write_json(parts.folder / "receipt.json", parts.splits.receipt)
    _write_template(parts, parts.folder)


def leave(parts: "Parts", state: TrainState) -> None:
    """Write the finished run, results.json last, and say what came out."""
    settings, folder, loaded = parts.settings, parts.folder, parts.loaded
    left_with = state.best_step if settings.final_adapter == "best" and state.best_step is not None else state.step
    unit = PER_PAIR if settings.stage == "dpo" else NATS
    describe(parts)  # once more, should someone have removed the folder meanwhile
    saved = _save_adapter(parts, parts.trained) if isinstance(parts.trained, AdapterSet) else _save_model(parts)
    results = run_folder.results_of(
        state,
        **saved,
        base_eval_loss=parts.base_loss,
        base_model=loaded.source.name,
        base_model_digest=loaded.source.digest,
        base_dtype=str(loaded.model.dtype).removeprefix("torch."),
        template_digest=parts.template.digest,
        data_digest=parts.splits.train.digest,
        final_adapter=settings.final_adapter,
        method=settings.method,
        stage=settings.stage,
        loss_unit=unit,
        eval_measures=measures_at(read_metrics(folder / FILE_NAME), left_with),
        trained_parameters=parts.trained.num_parameters,
    )
    write_text(folder / "README.md", run_folder.model_card(settings, results, receipt=parts.splits.receipt))
    run_folder.write_files(folder, lambda aside: loss_curve(folder / FILE_NAME, aside / "training_loss.png", unit=unit))
    if settings.qlora_save_dequantize:
        _save_dequantized(parts)
    run_folder.write_json(folder / run_folder.RESULTS, results)
    for line in run_folder.summary(folder, results):
        print(line)


def write_profile(profiler: "StepProfiler", folder: Path) -> None:
    """What `--profile` saw, as table and picture."""
    if sentence := profiler.write(folder):
        run_folder.write_files(folder, lambda aside: step_parts(folder / "profile.json", aside / "profile.png"))
        say(sentence)
    else:
        say("warning: --profile saw no step after its warm-up; give it a longer run")


def _save_adapter(parts: "Parts", adapters: AdapterSet) -> dict[str, Any]:
    name = parts.loaded.source.name
    run_folder.write_files(parts.folder, lambda aside: save_adapter(adapters, aside, base_model_name=name))
    run_folder.write_files(parts.folder, parts.loaded.tokenizer.save_pretrained)
    return {"adapter_sha256": sha256_file(parts.folder / "adapter_model.safetensors")}


def _save_model(parts: "Parts") -> dict[str, Any]:
    assert isinstance(parts.trained, WholeModel)

    def write_more(aside: Path) -> None:
        parts.loaded.tokenizer.save_pretrained(aside)
        _write_template(parts, aside)

    source = parts.loaded.source.path
    _, digest = save_whole_model(parts.trained, parts.folder, source=source, write_more=write_more)
    return {"model_sha256": digest}


def _write_template(parts: "Parts", folder: Path) -> None:
    template = parts.template
    kept = {f.name: getattr(parts.settings, f.name) for f in dataclasses.fields(TemplateSettings)}
    run_folder.write_json(folder / _TEMPLATE, {"name": template.name, "digest": template.digest, "settings": kept})


def _save_dequantized(parts: "Parts") -> None:
    settings = parts.settings
    assert settings.load is not None
    bits = 4 if settings.load_4bit else 8
    saved = save_dequantized(parts.folder, settings.load, bits, parts.loaded.model.dtype)
    size = sum(path.stat().st_size for path in saved.iterdir())
    say(f"the dequantised base is in {saved} ({size / 1e6:.1f} MB)")
