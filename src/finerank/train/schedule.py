"""The learning rate as a pure function of the step, so a resumed run needs no scheduler state.

    rates = Schedule.of(settings, num_steps=1000)
    rates(0), rates(10), rates(999)

The formulas are Megatron-LM's (core_v0.12.1, `megatron/core/optimizer_param_scheduler.py`): linear warm-up from
`lr_warmup_init` to `lr`, then `min_lr + c (lr - min_lr)` with

    linear               c = 1 - x                         x = (step - warmup) / (decay - warmup)
    cosine               c = (1 + cos(pi x)) / 2
    WSD                  c = 1 until the last `lr_wsd_decay_iters` steps, then exponential, linear, cosine or minus_sqrt
    constant             lr
    inverse-square-root  max(min_lr, lr sqrt(warmup / step))

and `min_lr` past `lr_decay_iters`. `step` counts finished steps, as there: the first step of a warm-up runs at
`lr_warmup_init`.
"""

import math
from dataclasses import dataclass, replace

from finerank.errors import ConfigError
from finerank.train.given import LocalUpdate
from finerank.train.settings import OptimSettings


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate by step; all lengths in optimizer steps."""

    settings: OptimSettings
    warmup: float
    decay: int
    wsd_decay: int

    @classmethod
    def of(cls, settings: OptimSettings, *, num_steps: int) -> "Schedule":
        """The schedule of a run of `num_steps`. Raises ConfigError when its parts do not fit into each other."""
        decay = settings.lr_decay_iters or num_steps
        warmup: float = settings.lr_warmup_iters
        if settings.lr_warmup_fraction is not None:
            warmup = settings.lr_warmup_fraction * decay
        if settings.lr_decay_style not in ("constant", "inverse-square-root") and warmup >= decay > 1:
            raise ConfigError(
                f"The warm-up of {warmup:g} steps leaves nothing of the {decay} steps of the schedule; "
                "lower --lr-warmup-iters or --lr-warmup-fraction."
            )
        wsd_decay = settings.lr_wsd_decay_iters or max(1, decay // 10)
        if settings.lr_decay_style == "WSD" and wsd_decay > decay - warmup:
            raise ConfigError(
                f"--lr-wsd-decay-iters {wsd_decay} does not fit into {decay} steps with {warmup:g} of warm-up; "
                "lower it."
            )
        return cls(settings=settings, warmup=warmup, decay=decay, wsd_decay=wsd_decay)

    def __call__(self, step: int) -> float:
        """Learning rate of the step after `step` finished ones."""
        s = self.settings
        if self.warmup > 0 and step <= self.warmup:
            return s.lr_warmup_init + (s.lr - s.lr_warmup_init) * step / self.warmup
        if s.lr_decay_style == "constant":
            return s.lr
        if step > self.decay:
            return s.min_lr
        if s.lr_decay_style == "inverse-square-root":
            return max(s.min_lr, s.lr * math.sqrt(max(self.warmup, 1) / max(step, 1)))
        return s.min_lr + self._coefficient(step) * (s.lr - s.min_lr)

    def _coefficient(self, step: int) -> float:
        x = (step - self.warmup) / max(self.decay - self.warmup, 1)
        match self.settings.lr_decay_style:
            case "linear":
                return 1.0 - x
            case "cosine":
                return 0.5 * (1.0 + math.cos(math.pi * x))
        start = self.decay - self.wsd_decay
        if step <= start:
            return 1.0
        x = (step - start) / self.wsd_decay
        match self.settings.lr_wsd_decay_style:
            case "linear":
                return 1.0 - x
            case "cosine":
                return 0.5 * (1.0 + math.cos(math.pi * x))
            case "minus_sqrt":
                return 1.0 - math.sqrt(x)
        return 2.0 * 0.5**x - 1.0


def local_schedule(settings: OptimSettings, local: LocalUpdate | None, *, num_steps: int) -> Schedule:
    """The schedule of what learns locally: the run's, or one of another shape that ends when local learning does."""
    run = Schedule.of(settings, num_steps=num_steps)
    if local is None or local.lr_decay_style is None:
        return run
    end = run.decay if local.freeze_after is None else min(run.decay, local.freeze_after)
    end = max(end, math.floor(run.warmup) + 1)  # all of local learning may be warm-up
    own = replace(settings, lr_decay_style=local.lr_decay_style)
    wsd_decay = min(settings.lr_wsd_decay_iters or max(1, end // 10), math.ceil(end - run.warmup))
    return Schedule(settings=own, warmup=run.warmup, decay=end, wsd_decay=wsd_decay)
