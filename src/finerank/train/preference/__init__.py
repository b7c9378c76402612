"""Losses over pairs of answers, one file each; `--pref-loss` names the file.

    loss = load_loss("sigmoid")
    loss.pair_losses(pairs, settings)          -> PairLosses, one number for each pair

A module has `NEEDS_REFERENCE` (whether it compares with the model before training), `BETA` (the default of
`--pref-beta`), `USES` (which settings besides beta decide its value) and `pair_losses`.

Shapes: P pairs.
"""

from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from finerank import registry


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Log-probabilities of answers, fp32 [P], summed over their tokens, and how many tokens they have."""

    chosen: Tensor
    rejected: Tensor
    num_chosen: Tensor
    num_rejected: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None
    """The same under the reference model; for losses that need it."""

    def ratios(self) -> tuple[Tensor, Tensor]:
        """`log pi(y) - log pi_ref(y)` of chosen and rejected, [P] each."""
        assert self.reference_chosen is not None and self.reference_rejected is not None
        return self.chosen - self.reference_chosen, self.rejected - self.reference_rejected

    def means(self) -> tuple[Tensor, Tensor]:
        """Log-probability per token of chosen and rejected, [P] each."""
        return self.chosen / self.num_chosen, self.rejected / self.num_rejected


@dataclass(frozen=True, kw_only=True)
class PairLosses:
    """What a loss says of each pair, fp32 [P]."""

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor
    """Rewards are what the loss compares, in its own unit; the chosen one should be larger."""


def load_loss(name: str) -> ModuleType:
    """The loss of that name. Raises ConfigError with the nearest names."""
    return registry.load(__name__, name, "loss of --pref-loss")
