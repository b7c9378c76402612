"""Choose the next token: temperature, then the `top_k` likeliest, then the nucleus of `top_p`; or the likeliest one.

The same distribution as transformers' TemperatureLogitsWarper, TopKLogitsWarper and TopPLogitsWarper in this order, but
the vocabulary is not sorted when `top_k` has already cut it to a few. Each prompt draws from a random generator of its
own, so an answer does not depend on which prompts were answered beside it.
"""

from collections.abc import Sequence

import torch

from finerank.generate.settings import SamplingSettings

# Shapes: B rows of a batch, V vocabulary, K candidates


class Sampler:
    """Chooses one token for each prompt, step by step."""

    def __init__(self, settings: SamplingSettings, seeds: Sequence[int]) -> None:
        """`seeds` holds one seed for each prompt."""
        self._settings = settings
        self._greedy = settings.greedy or settings.temperature == 0
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def choose(self, logits_BV: torch.Tensor, prompts: Sequence[int]) -> list[int]:
        """One token id a row, with one random draw each unless greedy.

        Args:
            logits_BV: logits of the last position, any float dtype.
            prompts: which prompt (index into `seeds`) each row belongs to.
        """
        if self._greedy:
            return logits_BV.float().argmax(dim=-1).tolist()
        ids_BK, probabilities_BK = candidates(logits_BV, self._settings)
        cumulative_BK = probabilities_BK.double().cumsum(dim=-1).cpu()
        chosen = []
        for row, prompt in enumerate(prompts):
            point = torch.rand(1, generator=self._generators[prompt], dtype=torch.float64) * cumulative_BK[row, -1]
            place = int(torch.searchsorted(cumulative_BK[row], point, right=True))  # right: never a probability of 0
            chosen.append(int(ids_BK[row, min(place, ids_BK.shape[1] - 1)]))
        return chosen


def candidates(logits_BV: torch.Tensor, settings: SamplingSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, K] that may be chosen, likeliest first, and their probabilities [B, K] in fp32, 0 outside the nucleus."""
    scores_BV = logits_BV.float() / settings.temperature
    vocabulary = scores_BV.shape[-1]
    scores_BK, ids_BK = scores_BV.topk(min(settings.top_k or vocabulary, vocabulary), dim=-1)
    probabilities_BK = scores_BK.softmax(dim=-1)
    if settings.top_p < 1:
        before_BK = probabilities_BK.cumsum(dim=-1) - probabilities_BK  # what the likelier ones have together
        outside_BK = before_BK >= settings.top_p
        outside_BK[:, 0] = False
        probabilities_BK = probabilities_BK.masked_fill(outside_BK, 0)
        probabilities_BK = probabilities_BK / probabilities_BK.sum(dim=-1, keepdim=True)
    return ids_BK, probabilities_BK
