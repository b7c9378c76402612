"""Going on with a run: which checkpoint, and whether it belongs to what is asked for now.

A checkpoint carries the origin of its run: the digests of data, base model and template, and the settings that decide
the result. A resumed run must have the same ones, or the result would be neither this nor that. `--resume-anyway` lets
those settings differ that leave the state meaningful, such as more epochs or another learning rate.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finerank.checkpoints import native
from finerank.errors import CheckpointError, ConfigError
from finerank.files import replace_folder, storage_errors
from finerank.train.run_folder import RESULTS
from finerank.train.state import TrainState

# what is read is compared by content, not by name
_READ = """
load model_config tokenizer_name_or_path revision trust_remote_code data_path valid_data_path data_cache workers
prompt_type hf_chat_template lora_load
"""
# where and how often something is written or said
_WRITTEN = """
output_dir log_interval report_to overwrite_output_dir final_adapter save_interval save_interval_minutes keep_last
keep_best resume resume_anyway grace_seconds async_save replay threads tune_runtime cache_boundary profile profile_steps
"""
NEUTRAL = frozenset((_READ + _WRITTEN).split())
"""Settings that do not decide the trained numbers, or whose effect is in a digest."""

_LENGTH_AND_RATE = """
num_epochs train_iters eval_interval eval_iters early_stopping_patience lr min_lr lr_decay_style lr_warmup_init
lr_warmup_iters lr_warmup_fraction lr_decay_iters lr_wsd_decay_iters lr_wsd_decay_style weight_decay adam_beta1
adam_beta2 adam_eps clip_grad lora_dropout on_nonfinite max_nonfinite deterministic
lu_lora_lr lu_lora_lr_decay_style lu_lora_lr_ratio lu_lora_sample lu_lora_freeze_after loraplus_lr_ratio
"""
# the same rows in another split: equal up to rounding
_SPLIT = "micro_batch_size micro_batch_tokens micro_batches_at_once pack variable_seq_lengths pad_to_multiple_of"
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
    parts = before if isinstance(before, dict) and set(before) == set(origin) else {}
    if not parts or not all(isinstance(part, dict) for part in parts.values()):
        raise CheckpointError(f"{checkpoint.folder} does not say what its run was made of; resume from another one.")
    for name, (old, new) in _differences(parts["environment"], origin["environment"]).items():
        say(f"warning: {name} was {old} and is {new}: the last bits of the result may differ from an unbroken run")
    differences = {
        **_differences(parts["digests"], origin["digests"]),
        **_differences(parts["settings"], origin["settings"]),
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


def check_place(checkpoint: native.Checkpoint, run: Path, *, num_steps: int, say: Callable[[str], None]) -> None:
    """Whether the run may go on from a checkpoint in this folder; tells of the later checkpoints that it will replace.

    Raises:
        ConfigError: the checkpoint is another run's, and the folder holds a run of its own.
        CheckpointError: the checkpoint lies behind the end of the run.
    """
    if checkpoint.step > num_steps:
        raise CheckpointError(
            f"{checkpoint.folder} was saved after {checkpoint.step} steps, and this run has only {num_steps}; raise "
            "--num-epochs or --train-iters, or resume from an earlier checkpoint."
        )
    present = native.checkpoints(run)
    if not _is_of(checkpoint, run) and (present or (run / RESULTS).exists()):
        raise ConfigError(
            f"{run} holds a run of its own, which {checkpoint.folder} is not part of; choose another --output-dir, or "
            "add --resume auto to go on with the run that is there."
        )
    if newer := [folder.name for step, folder in present if step > checkpoint.step]:
        say(f"removing {', '.join(newer)}: the run goes on from step {checkpoint.step} and writes them anew")


def take_over(checkpoint: native.Checkpoint, run: Path, state: TrainState, *, keep_best: bool, say: Callable) -> None:
    """Make the folder that of an unfinished run with all that `state` speaks of. Raises StorageError."""
    with storage_errors(run / RESULTS):
        (run / RESULTS).unlink(missing_ok=True)  # or a kill would leave old results beside new checkpoints
    if state.best_step is None or not keep_best:
        return
    target = native.folder_of(run, state.best_step)
    problem = native.damage(target)
    if problem is None:
        return
    if not _is_of(checkpoint, run):
        is_best = state.best_step == checkpoint.step
        source = checkpoint.folder if is_best else native.folder_of(checkpoint.folder.parent, state.best_step)
        problem = native.damage(source)
        if problem is None:
            with replace_folder(target) as aside:
                shutil.copytree(source, aside, dirs_exist_ok=True)
            return
    say(
        f"warning: the checkpoint with the best held-out loss so far (step {state.best_step}) cannot be kept: "
        f"{problem}; --final-adapter best needs a better one from here on"
    )


def _is_of(checkpoint: native.Checkpoint, run: Path) -> bool:
    return checkpoint.folder.resolve().parent == run.resolve()


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = sorted(set(before) | set(now))
    return {n: (before.get(n), now.get(n)) for n in names if before.get(n) != now.get(n)}


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:16]}...{text[-16:]}"
