"""The proof of a merge or export: what happened to the weights, how far the answers are, and the verdict."""

from pathlib import Path
from typing import Any

from finerank.checkpoints.lora import Adapter
from finerank.checkpoints.merge import MergedWeights
from finerank.checkpoints.weights import BaseModel
from finerank.errors import ConfigError


def merge_report(
    base: BaseModel, adapter: Adapter, merged: BaseModel, folder: Path, *, proof: str, max_kl: float
) -> dict[str, Any]:
    """The report of a merge that was just written to `folder`.

    Args:
        merged: the model whose weights were all read while it was written.
        proof: `weights`, `full`, or `auto` for full where the model fits in memory.
        max_kl: bound on the mean KL, in nats.

    Raises:
        ConfigError: `full` was asked for and the model does not fit.
    """
    from finerank.checkpoints.proof import compare, fits_in_memory

    assert isinstance(merged.weights, MergedWeights)
    fits = proof != "weights" and fits_in_memory(base)
    if proof == "full" and not fits:
        raise ConfigError("--proof full: the model does not fit in memory in fp32; use --proof weights.")
    return {
        "weights": merged.weights.report.totals(),
        "tensors": merged.weights.report.rows(),
        "answers": compare(base, adapter, folder) if fits else None,
        "answers_skipped": None if fits else "--proof weights" if proof == "weights" else "the model does not fit",
        "bound": {"max_mean_kl": max_kl},
    }


def verdict(report: dict[str, Any]) -> str | None:
    """What does not hold up, in words; None when all is well."""
    if not report["weights"]["num_weights_changed"]:
        return "the adapter changed nothing: it is untrained, or its change is below what the base's dtype can hold"
    answers, bound = report["answers"], report["bound"]["max_mean_kl"]
    if answers is not None and not answers["mean_kl"] <= bound:
        return f"the mean KL {answers['mean_kl']:.3g} is over --max-kl {bound:g}"
    return None


def describe(report: dict[str, Any]) -> str:
    """A few lines for the terminal."""
    w, answers = report["weights"], report["answers"]
    lines = [
        f"{w['share_of_weights_changed']:.2%} of {w['num_weights_with_adapter']:,} adapted weights changed; rounding "
        f"error at most {w['max_rounding_error']:.3g}, mean {w['mean_rounding_error']:.3g}, "
        f"{w['rounding_error_relative_to_update']:.2%} of the update"
    ]
    if answers is None:
        lines.append(f"answers not compared: {report['answers_skipped']}")
    else:
        lines.append(
            f"base with adapter against merged on {answers['num_prompts']} prompts: mean KL {answers['mean_kl']:.3g}, "
            f"max logit difference {answers['max_logit_difference']:.3g}, greedy agreement "
            f"{answers['greedy_agreement']:.1%}"
        )
    return "\n".join(lines)
