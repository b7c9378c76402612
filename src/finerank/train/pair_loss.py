"""What `--stage dpo` minimises: the mean over the pairs of a global batch of the loss that `--pref-loss` names.

    loss = PairLoss(settings)
    loss(model, batch)                     sum over the pairs of a micro-batch
    loss.measures()                        {"rewards/chosen": 0.12, ...}, means since `begin()`

A batch of pairs has two sequences for each row, the chosen one first, so both answers of a pair go through the model
together. Measures have TRL's names. They are summed exactly and rounded once, so that micro-batches may be measured in
any order, by several threads too.

Shapes: S sequences, P pairs.
"""

import math
from typing import Any

import torch
from torch import Tensor

from finerank.data.batch import Batch
from finerank.errors import ConfigError
from finerank.models.log_probs import sequence_log_probs
from finerank.train.held_out import MeasuredLoss
from finerank.train.preference import Pairs, load_loss
from finerank.train.settings import PreferenceSettings

MEASURES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
"""Rewards as the loss has them; accuracies: share of pairs whose chosen reward is the larger one; logps: summed over an
answer's tokens."""


class PairLoss(MeasuredLoss):
    """See the module's docstring."""

    def __init__(self, settings: PreferenceSettings):
        """Raises ConfigError for an unknown loss, or a setting that it does not use."""
        self.settings, self.module = settings, load_loss(settings.pref_loss)
        self.beta = self.module.BETA if settings.pref_beta is None else settings.pref_beta
        for name in ("dpo_label_smoothing", "simpo_gamma"):
            given = getattr(settings, name)
            if given != getattr(PreferenceSettings(), name) and name not in self.module.USES:
                raise ConfigError(
                    f"--{name.replace('_', '-')} has no effect with --pref-loss {settings.pref_loss}; leave it out."
                )
        self.begin()

    @property
    def needs_reference(self) -> bool:
        """Whether batches must carry the reference model's log-probabilities."""
        return self.module.NEEDS_REFERENCE

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        """Sum of the loss over the pairs of a micro-batch on the model's device; fp32 scalar."""
        pairs = pairs_of(model, batch)
        found = self.module.pair_losses(pairs, self.settings, self.beta)
        loss = found.loss
        if self.settings.pref_ftx:
            loss = loss - self.settings.pref_ftx * pairs.means()[0]
        chosen, rejected = found.chosen_reward.detach(), found.rejected_reward.detach()
        measured = (chosen, rejected, chosen - rejected, chosen > rejected, pairs.chosen, pairs.rejected)
        self._measured.append(torch.stack([m.detach().double().sum() for m in (*measured, torch.ones_like(loss))]))
        return loss.sum()

    def count(self, batch: Batch) -> int:
        """Pairs of a micro-batch."""
        return len(batch.rows)

    def begin(self) -> None:
        """Forget what was measured."""
        self._measured: list[Tensor] = []

    def measures(self) -> dict[str, float]:
        """Means over the pairs since `begin`."""
        found = torch.stack(self._measured).tolist() if self._measured else [[0.0] * (len(MEASURES) + 1)]
        *sums, num_pairs = (_exact_sum(values) for values in zip(*found, strict=True))
        return {name: total / max(num_pairs, 1.0) for name, total in zip(MEASURES, sums, strict=True)}


def _exact_sum(values: tuple[float, ...]) -> float:
    """In whatever order; infinite or NaN where a value is."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


def pairs_of(model: Any, batch: Batch) -> Pairs:
    """Log-probabilities of the answers of a batch of pairs, differentiable."""
    sums_S, counts_S = sequence_log_probs(model, **batch.inputs)
    if batch.parents is not None:  # shared prompts are segments, too, with nothing trained
        own_S = batch.is_sequence.to(sums_S.device)
        sums_S, counts_S = sums_S[own_S], counts_S[own_S]
    reference = batch.reference
    return Pairs(
        chosen=sums_S[0::2],
        rejected=sums_S[1::2],
        num_chosen=counts_S[0::2],
        num_rejected=counts_S[1::2],
        reference_chosen=None if reference is None else reference[:, 0],
        reference_rejected=None if reference is None else reference[:, 1],
    )
