"""The hinge on DPO's margin: no more gradient once a pair is preferred by enough.

    loss = max(0, 1 - beta h)          h as in `sigmoid`

Source: Liu et al., "Statistical Rejection Sampling Improves Preference Optimization" (RSO), 2023; the loss of SLiC
(Zhao et al., 2023) with the reference model's log-ratios.
"""

from finerank.train.preference import PairLosses, Pairs
from finerank.train.settings import PreferenceSettings

NEEDS_REFERENCE = True
BETA = 0.1
USES = ()


def pair_losses(pairs: Pairs, settings: PreferenceSettings, beta: float) -> PairLosses:
    """Rewards are `beta` times the log-ratios."""
    chosen, rejected = pairs.ratios()
    loss = (1.0 - beta * (chosen - rejected)).relu()
    return PairLosses(loss=loss, chosen_reward=beta * chosen, rejected_reward=beta * rejected)
