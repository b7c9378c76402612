"""IPO: the preference over the reference should reach 1 / (2 beta), and not go on growing.

    loss = (h_w / |y_w| - h_l / |y_l| - 1 / (2 beta))^2          h = log pi(y) - log ref(y)

Log-ratios count per token, as the authors confirmed for their results (and as TRL and LLaMA-Factory do); the paper's
equation has sums.

Source: Azar et al., "A General Theoretical Paradigm to Understand Learning from Human Preferences", 2023, equation 17.
"""

from finerank.train.preference import PairLosses, Pairs
from finerank.train.settings import PreferenceSettings

NEEDS_REFERENCE = True
BETA = 0.1
USES = ()


def pair_losses(pairs: Pairs, settings: PreferenceSettings, beta: float) -> PairLosses:
    """Rewards are `beta` times the log-ratios per token."""
    chosen, rejected = pairs.ratios()
    chosen, rejected = chosen / pairs.num_chosen, rejected / pairs.num_rejected
    loss = (chosen - rejected - 1.0 / (2.0 * beta)).square()
    return PairLosses(loss=loss, chosen_reward=beta * chosen, rejected_reward=beta * rejected)
