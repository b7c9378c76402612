"""The schedule against a transcription of Megatron's step-by-step formulas."""

import math
from types import SimpleNamespace

import pytest

from finerank.errors import ConfigError
from finerank.train.schedule import Schedule, local_schedule
from finerank.train.settings import OptimSettings


def megatron(s: OptimSettings, step: int, warmup: float, decay: int, wsd: int) -> float:
    """`OptimizerParamScheduler.get_lr`, written as there."""
    if warmup > 0 and step <= warmup:
        return s.lr_warmup_init + (s.lr - s.lr_warmup_init) * float(step) / float(warmup)
    if s.lr_decay_style == "constant":
        return s.lr
    if step > decay:
        return s.min_lr
    if s.lr_decay_style == "inverse-square-root":
        return max(s.min_lr, s.lr * max(warmup, 1) ** 0.5 / max(step, 1) ** 0.5)
    ratio = float(step - warmup) / float(decay - warmup)
    coeff = None
    if s.lr_decay_style == "linear":
        coeff = 1.0 - ratio
    elif s.lr_decay_style == "cosine":
        coeff = 0.5 * (math.cos(math.pi * ratio) + 1.0)
    elif s.lr_decay_style == "WSD":
        start = decay - wsd
        if step <= start:
            coeff = 1.0
        else:
            r = float(step - start) / float(wsd)
            coeff = {
                "linear": 1.0 - r,
                "cosine": 0.5 * (math.cos(math.pi * r) + 1.0),
                "exponential": (2.0 * math.pow(0.5, r)) - 1.0,
                "minus_sqrt": 1.0 - math.sqrt(r),
            }[s.lr_wsd_decay_style]
    return s.min_lr + coeff * (s.lr - s.min_lr)


STYLES = ["cosine", "linear", "constant", "inverse-square-root", "WSD"]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("wsd_style", ["exponential", "linear", "cosine", "minus_sqrt"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_equals_megatron_at_every_step(style: str, wsd_style: str, warmup: int) -> None:
    s = OptimSettings(
        lr=3e-4,
        min_lr=1e-5,
        lr_decay_style=style,
        lr_warmup_iters=warmup,
        lr_warmup_init=1e-6,
        lr_decay_iters=50,
        lr_wsd_decay_iters=12,
        lr_wsd_decay_style=wsd_style,
    )
    rates = Schedule.of(s, num_steps=60)
    for step in range(65):
        assert rates(step) == pytest.approx(megatron(s, step, warmup, 50, 12), rel=1e-12, abs=0), step


def test_warmup_fraction_is_a_share_of_the_decay() -> None:
    rates = Schedule.of(OptimSettings(lr=1.0, lr_warmup_fraction=0.1), num_steps=100)
    assert rates(0) == 0.0 and rates(5) == 0.5 and rates(10) == 1.0


@pytest.mark.parametrize(
    "settings",
    [OptimSettings(lr_warmup_iters=10), OptimSettings(lr_decay_style="WSD", lr_wsd_decay_iters=11)],
)
def test_parts_that_do_not_fit_are_refused(settings: OptimSettings) -> None:
    with pytest.raises(ConfigError, match="lower"):
        Schedule.of(settings, num_steps=10)


def local(style: str | None, freeze_after: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(parameters=(), lr_decay_style=style, freeze_after=freeze_after)


def test_what_learns_locally_has_its_own_shape_and_the_runs_warmup():
    s = OptimSettings(lr=3e-4, lr_decay_style="constant", lr_warmup_fraction=0.1)
    cosine = Schedule.of(OptimSettings(lr=3e-4, lr_decay_style="cosine", lr_warmup_fraction=0.1), num_steps=60)
    rates = local_schedule(s, local("cosine"), num_steps=60)
    assert [rates(i) for i in range(61)] == [cosine(i) for i in range(61)]
    for other in (local(None), None):
        assert [local_schedule(s, other, num_steps=60)(i) for i in range(60)] == [
            Schedule.of(s, num_steps=60)(i) for i in range(60)
        ]


@pytest.mark.parametrize("style", STYLES)
def test_local_rates_end_when_local_learning_does(style: str):
    s = OptimSettings(lr=3e-4, min_lr=1e-5, lr_decay_style="constant", lr_warmup_iters=6)
    ends = OptimSettings(lr=3e-4, min_lr=1e-5, lr_decay_style=style, lr_warmup_iters=6, lr_decay_iters=30)
    wanted, rates = Schedule.of(ends, num_steps=60), local_schedule(s, local(style, 30), num_steps=60)
    assert [rates(i) for i in range(30)] == [wanted(i) for i in range(30)]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("freeze_after", [0, 3, 6])
def test_local_learning_may_end_within_the_warmup(style: str, freeze_after: int):
    s = OptimSettings(lr=3e-4, lr_warmup_iters=6)
    rates, run = local_schedule(s, local(style, freeze_after), num_steps=60), Schedule.of(s, num_steps=60)
    assert [rates(i) for i in range(freeze_after)] == [run(i) for i in range(freeze_after)]
