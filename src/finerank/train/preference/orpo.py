"""ORPO: supervised tuning on the chosen answer, plus a preference for its odds; no reference model.

    loss = -log p_w - beta log sigmoid(log odds(y_w) - log odds(y_l))
    log p = log pi(y) / |y|          odds(y) = p / (1 - p)

`beta` is the paper's lambda. Both terms are per pair, as in the paper; TRL takes the first one over the batch's tokens,
those of the prompt included.

Source: Hong et al., "ORPO: Monolithic Preference Optimization without Reference Model", 2024, equations 3 to 7.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from finerank.train.preference import PairLosses, Pairs
from finerank.train.settings import PreferenceSettings

NEEDS_REFERENCE = False
BETA = 0.1
USES = ()


def pair_losses(pairs: Pairs, settings: PreferenceSettings, beta: float) -> PairLosses:
    """Rewards are `beta` times the log-probabilities per token."""
    chosen, rejected = pairs.means()
    log_odds_ratio = (chosen - log_one_minus_exp(chosen)) - (rejected - log_one_minus_exp(rejected))
    loss = -chosen - beta * F.logsigmoid(log_odds_ratio)
    return PairLosses(loss=loss, chosen_reward=beta * chosen, rejected_reward=beta * rejected)


def log_one_minus_exp(x: Tensor) -> Tensor:
    """`log(1 - exp(x))` for x < 0, exact near 0 and far from it (Maechler, 2012). An answer that is certain counts as
    all but certain: its odds would be infinite."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -math.log(2.0)
    # where() sends gradients into both branches: each gets a value that is harmless there
    small = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    large = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, small, large)
