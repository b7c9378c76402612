"""Going on with a run: which checkpoint, and whether it belongs to what is asked for now.

A checkpoint carries the origin of its run: the digests of data, base model and template, and the settings that decide
the result. A resumed run must have the same ones, or the result would be neither this nor that. `--resume-anyway` lets
those settings differ that leave the state meaningful, such as more epochs or another learning rate.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finerank.checkpoints import native
from finerank.errors import CheckpointError

# what is read is compared by content, not by name
_READ = """
load model_config tokenizer_name_or_path revision trust_remote_code data_path valid_data_path data_cache workers
prompt_type hf_chat_template lora_load
"""
# where and how often something is written or said
_WRITTEN = """
output_dir log_interval report_to overwrite_output_dir final_adapter save_interval save_interval_minutes keep_last
keep_best resume resume_anyway grace_seconds async_save replay threads tune_runtime
"""
NEUTRAL = frozenset((_READ + _WRITTEN).split())
"""Settings that do not decide the trained numbers, or whose effect is in a digest."""

_LENGTH_AND_RATE = """
num_epochs train_iters eval_interval eval_iters early_stopping_patience lr min_lr lr_decay_style lr_warmup_init
lr_warmup_iters lr_warmup_fraction lr_decay_iters lr_wsd_decay_iters lr_wsd_decay_style weight_decay adam_beta1
adam_beta2 adam_eps clip_grad lora_dropout on_nonfinite max_nonfinite deterministic
lu_lora_lr lu_lora_lr_ratio lu_lora_freeze_after loraplus_lr_ratio
"""
# the same rows in another split: equal up to rounding
_SPLIT = "micro_batch_size micro_batch_tokens pack variable_seq_lengths pad_to_multiple_of"
SAFE = frozenset([*_LENGTH_AND_RATE.split(), *_SPLIT.split(), "held-out data"])
"""What may differ under `--resume-anyway`."""


def origin_of(
    settings: Mapping[str, Any], *, digests: Mapping[str, str | None], environment: Mapping[str, str | int]
) -> dict[str, Any]:
    """What a run is made of, as JSON values.

    Args:
        settings: all settings by name.
        digests: content digests by what they are of ("data", "held-out data", "base model", "template").
        environment: what may change the last bits of the result: versions, device, number of threads.
    """
    deciding = {name: value for name, value in sorted(settings.items()) if name not in NEUTRAL}
    return {"settings": deciding, "digests": dict(sorted(digests.items())), "environment": dict(environment)}


def find_checkpoint(resume: str, run: Path, *, say: Callable[[str], None]) -> native.Checkpoint | None:
    """The checkpoint that `--resume` means; None for `auto` in a run that has none. Raises CheckpointError."""
    if resume != "auto":
        return native.read_checkpoint(Path(resume))
    folder = native.newest_whole(run, say=say)
    if folder is None:
        say(f"no whole checkpoint in {run}: starting from the first step")
        return None
    return native.read_checkpoint(folder)


def check_origin(
    checkpoint: native.Checkpoint, origin: Mapping[str, Any], *, anyway: bool, say: Callable[[str], None]
) -> None:
    """Raise CheckpointError with all differences between the checkpoint's run and this one, unless they are allowed."""
    before = checkpoint.state.get("origin")
    if not isinstance(before, dict) or set(before) != set(origin):
        raise CheckpointError(f"{checkpoint.folder} does not say what its run was made of; resume from another one.")
    for name, (old, new) in _differences(before["environment"], origin["environment"]).items():
        say(f"warning: {name} was {old} and is {new}: the last bits of the result may differ from an unbroken run")
    differences = {
        **_differences(before["digests"], origin["digests"]),
        **_differences(before["settings"], origin["settings"]),
    }
    refused = {n: pair for n, pair in differences.items() if not anyway or n not in SAFE}
    if not refused:
        for name, (old, new) in differences.items():
            say(f"resuming although {name} was {old!r} and is {new!r}")
        return
    listed = "; ".join(f"{name} was {_short(old)}, is {_short(new)}" for name, (old, new) in refused.items())
    if set(refused) <= SAFE:
        fix = "Add --resume-anyway to go on with the new ones, or put the old ones back."
    else:
        fix = "Put the old ones back, or start anew in another --output-dir."
    raise CheckpointError(f"{checkpoint.folder} belongs to a run with other settings: {listed}. {fix}")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = sorted(set(before) | set(now))
    return {n: (before.get(n), now.get(n)) for n in names if before.get(n) != now.get(n)}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:16]}...{text[-16:]}"
