"""The run folder: what tune leaves behind, and when it may be written over.

    config.yaml      all settings, resolved       metrics.jsonl, training_loss.png   how it went
    receipt.json     what became of the rows      results.json    losses, speed, digests; written last
    template.json    the prompt template's digest README.md       model card
    checkpoint-<step>/                            adapter_config.json, adapter_model.safetensors, tokenizer files
                                                  (--method full: model/, a Hugging Face folder, in place of these)

`results.json` marks a finished run. A folder with a finished run, or with checkpoints of an unfinished one, is not
written over unless asked.
"""

import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from finerank import __version__, config
from finerank.checkpoints.native import checkpoints
from finerank.errors import ConfigError
from finerank.files import discard_folder, fsync_path, storage_errors, write_text
from finerank.models.find import WHOLE_MODEL
from finerank.train.metrics import FILE_NAME
from finerank.train.state import TrainState

RESULTS, CONFIG = "results.json", "config.yaml"
NATS = "nats per token"
_OWN_FILES = (
    RESULTS,
    CONFIG,
    FILE_NAME,
    "receipt.json",
    "template.json",
    "README.md",
    "training_loss.png",
    "adapter_config.json",
    "adapter_model.safetensors",
)
_SECRETS = (
    re.compile(r"\b(?:hf|sk|ghp|gho|glpat|wandb)[_-][A-Za-z0-9_-]{16,}"),
    re.compile(r"(?<=://)[^/\s@]+:[^/\s@]+(?=@)"),
)


_IN_CARD = """
lora_target_modules lora_r lora_alpha lora_dropout use_rslora lora_rank_pattern lora_alpha_pattern seq_length
global_batch_size pack num_epochs train_iters lr min_lr lr_decay_style lr_warmup_iters lr_warmup_fraction
weight_decay adam_beta1 adam_beta2 adam_eps clip_grad seed dtype train_on_prompt prompt_type stage
"""
_PREFERENCE_IN_CARD = "pref_loss pref_beta dpo_label_smoothing simpo_gamma pref_ftx"


def check_free(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise ConfigError when a new run would mix with one that is there."""
    if resume or overwrite:
        return
    if (folder / RESULTS).exists():
        raise ConfigError(
            f"{folder} holds a finished run; choose another --output-dir, or add --overwrite-output-dir to replace it."
        )
    if checkpoints(folder):
        raise ConfigError(
            f"{folder} holds checkpoints of an unfinished run; add --resume auto to go on with it, choose another "
            "--output-dir, or add --overwrite-output-dir to replace it."
        )


def check_model_folder(folder: Path, settings: Any) -> None:
    """Raise ConfigError unless `RUN/model` may be written over, or removed with the run that made it."""
    model = folder / WHOLE_MODEL
    if not model.exists() or not (settings.method == "full" or _wrote_model(folder)):
        return
    if not _wrote_model(folder):
        raise ConfigError(f"{model} was not written by a run of --method full; choose another --output-dir.")
    named = Path(settings.load).expanduser().resolve() if settings.load else None
    if settings.resume is None and named in (folder.resolve(), model.resolve()):
        raise ConfigError(f"--output-dir {folder} holds the model that --load names; choose another folder.")


def _wrote_model(folder: Path) -> bool:
    """The folder is that of a run of `--method full`."""
    try:
        settings = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return False
    return isinstance(settings, dict) and settings.get("method") == "full"


def clear(folder: Path) -> None:
    """Remove a former run's own files, and nothing else. Raises StorageError."""
    with storage_errors(folder):
        for _, checkpoint in checkpoints(folder):
            discard_folder(checkpoint)
        if (folder / WHOLE_MODEL).is_dir() and _wrote_model(folder):
            discard_folder(folder / WHOLE_MODEL)
        for name in ("tensorboard", "boundary_cache", "dequantized_base"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in _OWN_FILES:
            (folder / name).unlink(missing_ok=True)
        for path in folder.glob("nonfinite-step-*.safetensors"):
            path.unlink()


def write_config(folder: Path, settings: Any) -> None:
    """Write the resolved settings, ready to be given to --config again: without what only started this piece."""
    values = config.to_dict(settings) | {"resume": None, "resume_anyway": False, "overwrite_output_dir": False}
    write_text(folder / CONFIG, redact(config.to_yaml(config.build(type(settings), values))))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object, sorted, whole or not at all."""
    write_text(path, redact(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)) + "\n")


def write_files(folder: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a folder aside, then move each file into `folder`; so each file is whole or absent."""
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with storage_errors(folder), tempfile.TemporaryDirectory(prefix=".finerank-aside-", dir=folder) as aside:
        write(Path(aside))
        for path in sorted(Path(aside).iterdir()):
            if path.is_file():
                fsync_path(path)
                os.replace(path, folder / path.name)
        fsync_path(folder)


def redact(text: str) -> str:
    """The text without anything that looks like an access token or a password in an address."""
    for pattern in _SECRETS:
        text = pattern.sub("(removed)", text)
    return text


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    packages = {name: metadata.version(name) for name in ("torch", "transformers", "safetensors", "tokenizers")}
    return {"finerank": __version__, "python": platform.python_version(), **packages}


def results_of(state: TrainState, *, base_eval_loss: float | None, **facts: Any) -> dict[str, Any]:
    """The content of results.json; `facts` has the digest of adapter or model.

    Losses are in `loss_unit`; speeds count steps and evaluations.
    """
    seconds = max(state.seconds, 1e-9)
    return {
        **facts,
        "base_eval_loss": base_eval_loss if base_eval_loss is not None else state.first_eval_loss,
        "before_eval_loss": state.first_eval_loss,
        "after_eval_loss": state.last_eval_loss,
        "best_eval_loss": state.best_eval_loss,
        "best_step": state.best_step,
        "last_loss": state.last_loss,
        "steps": state.step,
        "skipped_steps": state.num_skipped_steps,
        "stopped_early": state.stopped_early,
        "rows": state.rows,
        "tokens": state.tokens,
        "trained_tokens": state.trained_tokens,
        "seconds": state.seconds,
        "rows_per_second": state.rows / seconds,
        "tokens_per_second": state.tokens / seconds,
        "versions": versions(),
    }


def model_card(settings: Any, results: Mapping[str, Any], *, receipt: Mapping[str, Any]) -> str:
    """README.md of the adapter: what it is made of and how it did; no secrets, and file names without folders."""
    base, unit = results["base_model"], results.get("loss_unit", NATS)
    names = ", ".join(f"`{Path(p).name}`" for p in [*settings.data_path, *settings.valid_data_path]) or "none"
    losses = [("base model", "base_eval_loss"), ("after tuning", "after_eval_loss"), ("best", "best_eval_loss")]
    shown = [f"| {label} | {results[key]:.4f} |" for label, key in losses if results[key] is not None]
    table = [f"| held-out loss | {unit} |", "| --- | --- |", *shown] if shown else ["No held-out rows were given."]
    counts = [f"- {key.replace('_', ' ')}: {value}" for key, value in receipt.items() if isinstance(value, int | str)]
    if measures := results.get("eval_measures"):
        table += ["", *(f"- {name}: {value:.4f}" for name, value in measures.items())]
    named = f"{_IN_CARD} {_PREFERENCE_IN_CARD if settings.stage == 'dpo' else ''}".split()
    chosen = {k: v for k, v in config.to_dict(settings).items() if k in named and v not in (None, [], {})}
    header, use, licence = _words(results)
    lines = [
        "---",
        f"base_model: {json.dumps(base, ensure_ascii=False)}",
        *header,
        "",
        f"Trained with finerank {__version__}: {results['steps']} steps on {results['rows']} rows, "
        f"{results['trained_tokens']} trained tokens.",
        "",
        "## Results",
        "",
        *table,
        "",
        "## Data",
        "",
        f"Files: {names}",
        "",
        *counts,
        "",
        "## Settings",
        "",
        "```yaml",
        *(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in sorted(chosen.items())),
        "```",
        "",
        "## Use",
        "",
        "```python",
        *use,
        "",
        "## Licence",
        "",
        f"{licence} its base model: the licence of {base} applies to its use, and that of the data.",
    ]
    return redact("\n".join(lines) + "\n")


def _words(results: Mapping[str, Any]) -> tuple[list[str], list[str], str]:
    """What the card of a model and that of an adapter say differently: head, use, and what the licence is about."""
    base, is_whole = results["base_model"], "model_sha256" in results
    library, tag, title = (
        ("transformers", "full", f"{base}, fine-tuned")
        if is_whole
        else ("peft", "lora", f"A low-rank adapter for {base}")
    )
    kind, of, place = (
        ("AutoModelForCausalLM", "transformers", "this folder/model")
        if is_whole
        else ("AutoPeftModelForCausalLM", "peft", "this folder")
    )
    file, digest = (
        ("model/model.safetensors", results["model_sha256"])
        if is_whole
        else ("adapter_model.safetensors", results["adapter_sha256"])
    )
    header = [f"library_name: {library}", "pipeline_tag: text-generation", f"tags: [{tag}, finerank]", "---"]
    use = [f"from {of} import {kind}", "", f'model = {kind}.from_pretrained("{place}")', "```"]
    return (
        [*header, "", f"# {title}"],
        [*use, "", f"SHA-256 of `{file}`: `{digest}`"],
        "A tuned model is made from" if is_whole else "An adapter is a change to",
    )


def summary(folder: Path, results: Mapping[str, Any]) -> list[str]:
    """The last lines a user sees: what came out, and where it lies."""
    lines = []
    before, after = results["base_eval_loss"], results["after_eval_loss"]
    if before is not None and after is not None:
        lines.append(f"held-out loss {before:.4f} -> {after:.4f} {results.get('loss_unit', NATS)}")
    if (accuracy := (results.get("eval_measures") or {}).get("rewards/accuracies")) is not None:
        lines.append(f"{accuracy:.1%} of the held-out pairs have the larger reward on the chosen answer")
    minutes, seconds = divmod(round(results["seconds"]), 60)
    lines.append(f"{results['steps']} steps in {minutes}:{seconds:02d}, {results['rows_per_second']:.1f} rows/s")
    if "model_sha256" in results:
        lines.append(f"model: {folder / WHOLE_MODEL} (sha256 {results['model_sha256'][:16]}...)")
    else:
        lines.append(f"adapter: {folder} (sha256 {results['adapter_sha256'][:16]}...)")
    return lines
