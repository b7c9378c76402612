"""SimPO: log-probabilities per token take the place of the reference model; the margin should exceed gamma.

    loss = -log sigmoid(beta (log pi(y_w) / |y_w| - log pi(y_l) / |y_l|) - gamma)

`gamma` is `--simpo-gamma`. The paper's best values of beta are 2 to 10, far above DPO's: hence another default.

Source: Meng et al., "SimPO: Simple Preference Optimization with a Reference-Free Reward", 2024, equation 6.
"""

from torch.nn import functional as F

from finerank.train.preference import PairLosses, Pairs
from finerank.train.settings import PreferenceSettings

NEEDS_REFERENCE = False
BETA = 2.0
USES = ("simpo_gamma", "dpo_label_smoothing")


def pair_losses(pairs: Pairs, settings: PreferenceSettings, beta: float) -> PairLosses:
    """Rewards are `beta` times the log-probabilities per token."""
    chosen, rejected = pairs.means()
    margin = beta * (chosen - rejected) - settings.simpo_gamma
    eps = settings.dpo_label_smoothing
    loss = -(1.0 - eps) * F.logsigmoid(margin) - eps * F.logsigmoid(-margin)
    return PairLosses(loss=loss, chosen_reward=beta * chosen, rejected_reward=beta * rejected)
