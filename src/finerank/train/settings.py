"""Settings of the optimizer, the schedule and the run; defaults only here."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from finerank import registry
from finerank.adapters.settings import LR_DECAY_STYLES, AdapterSettings
from finerank.config import setting
from finerank.errors import ConfigError, unknown_name

TRACKERS = ("tensorboard", "wandb")
"""What `--report-to` may name."""


@dataclass(kw_only=True)
class OptimSettings:
    """AdamW and its learning-rate schedule."""

    lr: float = setting(2e-4, help="peak learning rate", flags=("--learning-rate",))
    min_lr: float = setting(0.0, help="learning rate at the end of the decay")
    lr_decay_style: str = setting(
        "cosine",
        choices=LR_DECAY_STYLES,
        help="shape after the warm-up",
        flags=("--lr-scheduler-type",),
    )
    lr_warmup_init: float = setting(0.0, help="learning rate at the first step of the warm-up")
    lr_warmup_iters: int = setting(0, help="warm-up in steps", flags=("--warmup-steps",))
    lr_warmup_fraction: float | None = setting(None, help="warm-up as a share of all steps", flags=("--warmup-ratio",))
    lr_decay_iters: int | None = setting(None, help="steps until min-lr; default: all steps")
    lr_wsd_decay_iters: int | None = setting(None, help="WSD: steps of the final decay; default: a tenth of all steps")
    lr_wsd_decay_style: str = setting(
        "exponential", choices=("exponential", "linear", "cosine", "minus_sqrt"), help="WSD: shape of the final decay"
    )
    weight_decay: float = setting(0.0, help="decoupled weight decay on what is trained, matrices only")
    adam_beta1: float = setting(0.9, help="AdamW beta1")
    adam_beta2: float = setting(0.999, help="AdamW beta2")
    adam_eps: float = setting(1e-8, help="AdamW epsilon")
    clip_grad: float = setting(1.0, help="largest gradient norm; 0 turns clipping off", flags=("--max-grad-norm",))


@dataclass(kw_only=True)
class RunSettings:
    """How long to train, when to evaluate and save, where to write."""

    output_dir: str = setting("runs/latest", help="run folder", flags=("--save",))
    method: str = setting(
        "lora",
        choices=("lora", "full"),
        help="what is trained: lora, an adapter on the frozen base; full, all of the base's weights",
        flags=("--finetuning-type",),
    )
    num_epochs: float | None = setting(
        None, help="passes over the data; default 1 unless --train-iters is given", flags=("--num-train-epochs",)
    )
    train_iters: int | None = setting(None, help="optimizer steps", flags=("--max-steps",))
    seed: int = setting(1234, help="seed of everything random")
    deterministic: bool = setting(True, help="GPU: only kernels that give the same bits each time")
    eval_interval: int | None = setting(
        None, help="steps between evaluations; default: start, end and ten times between"
    )
    eval_iters: int | None = setting(None, help="most held-out batches per evaluation; default: all")
    early_stopping_patience: int | None = setting(None, help="stop after so many evaluations without a better loss")
    log_interval: int = setting(1, help="steps between progress lines")
    report_to: list[str] = setting([], help="tensorboard, wandb")
    final_adapter: str = setting(
        "last",
        choices=("last", "best"),
        help="which weights become the run's adapter (or model): of the last step or of best loss",
    )
    profile: bool = setting(False, help="write where the time and memory of the first steps went")
    profile_steps: int = setting(3, help="with --profile: steps to look at, after one of warm-up")
    fused: bool = setting(
        True, help="norms and gated MLPs as single steps that keep less memory; same forward, bit for bit"
    )
    threads: int | None = setting(None, help="CPU threads; default: all that this process may use")
    tune_runtime: bool = setting(
        True, help="start the program anew, once, with allocator and large-page settings that make steps faster"
    )
    overwrite_output_dir: bool = setting(False, help="replace a finished run in --output-dir")


@dataclass(kw_only=True)
class CheckpointSettings:
    """When a run's state is saved, how much of it is kept, and how it is taken up again."""

    save_interval: int | None = setting(None, help="steps between checkpoints; default: by minutes, best and last")
    save_interval_minutes: float = setting(10.0, help="minutes between checkpoints; 0 turns this off")
    keep_last: int = setting(2, help="newest checkpoints to keep")
    keep_best: bool = setting(True, help="keep the checkpoint with the lowest held-out loss")
    resume: str | None = setting(
        None,
        help="auto (newest whole checkpoint of --output-dir) or a checkpoint folder",
        flags=("--resume-from-checkpoint",),
    )
    resume_anyway: bool = setting(False, help="resume although safe settings differ, e.g. more epochs")
    grace_seconds: float = setting(30.0, help="time to save after SIGTERM or Ctrl-C")
    async_save: bool = setting(False, help="write checkpoints in the background")
    on_nonfinite: str = setting(
        "stop", choices=("stop", "skip"), help="what to do with a NaN or infinite loss or gradient"
    )
    max_nonfinite: int = setting(3, help="with --on-nonfinite skip: stop after so many skipped steps in a row")


@dataclass(kw_only=True)
class PreferenceSettings:
    """`--stage dpo`: which loss over pairs of answers, and its constants."""

    pref_loss: str = setting(
        "sigmoid",
        help="dpo: loss over pairs: sigmoid (DPO), hinge, ipo, simpo or orpo",
        flags=("--dpo-loss-type", "--loss-type"),
    )
    pref_beta: float | None = setting(
        None,
        help="dpo: how strongly the loss holds to the reference (ORPO: weight of the odds); default 0.1, simpo 2",
        flags=("--dpo-beta", "--beta"),
    )
    dpo_label_smoothing: float = setting(
        0.0, help="dpo: share of pairs thought to be labelled wrongly", flags=("--label-smoothing",)
    )
    simpo_gamma: float = setting(0.5, help="dpo: SimPO's target margin")
    pref_ftx: float = setting(
        0.0, help="dpo: weight of a supervised loss on the chosen answer (nats per token)", flags=("--rpo-alpha",)
    )


@dataclass(kw_only=True)
class TrainSettings(OptimSettings, RunSettings, CheckpointSettings, PreferenceSettings):
    """All that the training loop needs to know."""


def check_train_settings(s: TrainSettings) -> None:
    """Raise ConfigError for values that no run can have, and for settings that exclude each other."""
    at_least = {
        "lr": 0,
        "min_lr": 0,
        "lr_warmup_init": 0,
        "lr_warmup_iters": 0,
        "lr_decay_iters": 1,
        "lr_wsd_decay_iters": 1,
        "weight_decay": 0,
        "clip_grad": 0,
        "train_iters": 1,
        "seed": 0,
        "eval_interval": 1,
        "eval_iters": 1,
        "early_stopping_patience": 1,
        "log_interval": 1,
        "save_interval": 1,
        "save_interval_minutes": 0,
        "keep_last": 1,
        "grace_seconds": 0,
        "max_nonfinite": 0,
        "profile_steps": 1,
    }
    for name, least in at_least.items():
        value = getattr(s, name)
        if value is not None and not least <= value < math.inf:
            raise ConfigError(f"{_flag(name)} must be at least {least}, not {value}.")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(s, name) < 1:
            raise ConfigError(f"{_flag(name)} must be at least 0 and below 1, not {getattr(s, name)}.")
    if s.lr_warmup_fraction is not None and not 0 <= s.lr_warmup_fraction <= 1:
        raise ConfigError(f"--lr-warmup-fraction is a share from 0 to 1, not {s.lr_warmup_fraction}.")
    if not s.adam_eps > 0:
        raise ConfigError(f"--adam-eps must be above 0, not {s.adam_eps}.")
    if s.num_epochs is not None and not 0 < s.num_epochs < math.inf:
        raise ConfigError(f"--num-epochs must be above 0, not {s.num_epochs}.")
    if s.min_lr > s.lr:
        raise ConfigError(f"--min-lr {s.min_lr} is above --lr {s.lr}; lower it.")
    excluding = [
        (s.num_epochs is not None and s.train_iters is not None, "--num-epochs", "--train-iters"),
        (bool(s.lr_warmup_iters) and s.lr_warmup_fraction is not None, "--lr-warmup-iters", "--lr-warmup-fraction"),
        (s.resume is not None and s.overwrite_output_dir, "--resume", "--overwrite-output-dir"),
        (s.final_adapter == "best" and not s.keep_best, "--final-adapter best", "--no-keep-best"),
    ]
    for both, one, other in excluding:
        if both:
            raise ConfigError(f"{one} and {other} exclude each other; give one of them.")
    if s.resume_anyway and s.resume is None:
        raise ConfigError("--resume-anyway has no effect without --resume; add --resume auto.")
    for name in s.report_to:
        if name not in TRACKERS:
            raise ConfigError(unknown_name("tracker of --report-to", name, TRACKERS))


def check_preference_settings(s: PreferenceSettings, *, stage: str) -> None:
    """Raise ConfigError for values that no loss can have, and for settings without effect."""
    if stage != "dpo":
        for f in dataclasses.fields(PreferenceSettings):
            if getattr(s, f.name) != f.default:
                raise ConfigError(
                    f"{_flag(f.name)} has no effect with --stage {stage}; add --stage dpo or leave it out."
                )
        return
    if s.pref_loss not in (known := registry.names("finerank.train.preference")):
        raise ConfigError(unknown_name("loss of --pref-loss", s.pref_loss, known))
    if s.pref_beta is not None and not 0 < s.pref_beta < math.inf:
        raise ConfigError(f"--pref-beta must be above 0, not {s.pref_beta}.")
    if not 0 <= s.dpo_label_smoothing < 0.5:
        raise ConfigError(f"--dpo-label-smoothing is a share from 0 to below 0.5, not {s.dpo_label_smoothing}.")
    for name in ("simpo_gamma", "pref_ftx"):
        if not 0 <= getattr(s, name) < math.inf:
            raise ConfigError(f"{_flag(name)} must be at least 0, not {getattr(s, name)}.")


def check_method(s: Any) -> None:
    """Raise ConfigError for settings of adapters and of quantised bases, which `--method full` has not."""
    if s.method != "full":
        return
    if s.load_4bit or s.load_8bit:
        raise ConfigError(
            "--method full trains every weight, and quantised ones cannot be: leave out "
            f"{'--load-4bit' if s.load_4bit else '--load-8bit'}, or --method full."
        )
    if s.lora_load is not None:
        raise ConfigError(
            "--method full starts from a model, not from an adapter: merge it first (finerank merge), and give the "
            "merged folder with --load."
        )
    for f in dataclasses.fields(AdapterSettings):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        if getattr(s, f.name) != default:
            raise ConfigError(f"{_flag(f.name)} has no effect with --method full, which has no adapter; leave it out.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
