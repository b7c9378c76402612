"""Which rows a stage of training takes: sft instructions, pt plain text, dpo pairs of answers."""

from finerank.data.settings import DataSettings
from finerank.errors import ConfigError, DataError

_NAMES = {
    "instruction": "instructions with one answer each",
    "pairwise": "pairs of a chosen and a rejected answer",
    "text": "plain text",
}
_KINDS = {"sft": ("instruction", "text"), "pt": ("text",), "dpo": ("pairwise",)}
_STAGES = {"instruction": "sft", "pairwise": "dpo", "text": "pt"}


def check_kind(path: str, kind: str, stage: str) -> None:
    """Raise DataError when a stage does not train on rows of this kind ("instruction", "pairwise" or "text")."""
    if kind not in _KINDS[stage]:
        raise DataError(
            f"{path} holds {_NAMES[kind]}, and --stage {stage} trains on {_NAMES[_KINDS[stage][0]]}; "
            f"give --stage {_STAGES[kind]}, or other rows."
        )


def check_stage(settings: DataSettings) -> None:
    """Raise ConfigError for settings of rows that have no effect in the stage."""
    without_effect = {
        "pt": {"--mask-history": settings.mask_history, "--train-on-prompt": settings.train_on_prompt},
        "dpo": {"--mask-history": settings.mask_history, "--train-on-prompt": settings.train_on_prompt},
    }
    for flag, given in without_effect.get(settings.stage, {}).items():
        if given:
            what = "all of a text is trained" if settings.stage == "pt" else "only the two answers are compared"
            raise ConfigError(f"{flag} has no effect with --stage {settings.stage}: {what}; leave it out.")
