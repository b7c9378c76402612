"""DPO: the policy should prefer the chosen answer by more than the reference does.

    h = (log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l))
    loss = -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)

`eps` is `--dpo-label-smoothing`, the share of pairs thought to be labelled the wrong way round.

Sources: Rafailov et al., "Direct Preference Optimization", 2023, equation 7; Mitchell, "A note on DPO with noisy
preferences & relationship to IPO", 2023, for eps (conservative DPO).
"""

from torch.nn import functional as F

from finerank.train.preference import PairLosses, Pairs
from finerank.train.settings import PreferenceSettings

NEEDS_REFERENCE = True
BETA = 0.1
USES = ("dpo_label_smoothing",)


def pair_losses(pairs: Pairs, settings: PreferenceSettings, beta: float) -> PairLosses:
    """Rewards are `beta` times the log-ratios, as in the paper's section 5."""
    chosen, rejected = pairs.ratios()
    margin = beta * (chosen - rejected)
    eps = settings.dpo_label_smoothing
    loss = -(1.0 - eps) * F.logsigmoid(margin) - eps * F.logsigmoid(-margin)
    return PairLosses(loss=loss, chosen_reward=beta * chosen, rejected_reward=beta * rejected)
