"""Values and pairs of settings that no run can have are refused by name."""

from typing import Any

import pytest

from finerank.errors import ConfigError
from finerank.train.settings import TrainSettings, check_train_settings


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lr": -1.0}, "--lr must be at least 0"),
        ({"lr": float("nan")}, "--lr must"),
        ({"train_iters": 0}, "--train-iters must be at least 1"),
        ({"num_epochs": 0.0}, "--num-epochs must be above 0"),
        ({"num_epochs": 1.0, "train_iters": 5}, "--num-epochs and --train-iters exclude"),
        ({"lr_warmup_iters": 1, "lr_warmup_fraction": 0.1}, "--lr-warmup-iters and --lr-warmup-fraction"),
        ({"lr_warmup_fraction": 1.5}, "share from 0 to 1"),
        ({"adam_beta2": 1.0}, "--adam-beta2 must be at least 0 and below 1"),
        ({"adam_eps": 0.0}, "--adam-eps"),
        ({"min_lr": 1.0}, "--min-lr 1.0 is above --lr"),
        ({"keep_last": 0}, "--keep-last must be at least 1"),
        ({"resume": "auto", "overwrite_output_dir": True}, "--resume and --overwrite-output-dir"),
        ({"resume_anyway": True}, "add --resume auto"),
        ({"final_adapter": "best", "keep_best": False}, "--final-adapter best and --no-keep-best"),
        ({"report_to": ["tensorbord"]}, "Did you mean 'tensorboard'"),
        ({"early_stopping_patience": 0}, "--early-stopping-patience"),
    ],
)
def test_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_train_settings(TrainSettings(**values))


def test_the_defaults_are_allowed() -> None:
    check_train_settings(TrainSettings())
