"""The sampler's distribution is that of transformers' warpers, and it draws from it."""

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from finerank.generate.sampling import Sampler, candidates
from finerank.generate.settings import SamplingSettings


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.3, 0.01])
@pytest.mark.parametrize("top_k", [0, 1, 50, 10_000])
@pytest.mark.parametrize("temperature", [0.2, 0.7, 1.0, 3.0])
def test_probabilities_equal_transformers(temperature, top_k, top_p):
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(1)) * 3
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    expected = warpers(torch.zeros(5, 1, dtype=torch.long), logits).softmax(dim=-1)
    ids, probabilities = candidates(logits, SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p))
    ours = torch.zeros(5, 300).scatter(1, ids, probabilities)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -9.0]])
    settings = SamplingSettings(temperature=1.0, top_k=4, top_p=1.0)
    sampler = Sampler(settings, [0])
    draws = torch.tensor([sampler.choose(logits, [0])[0] for _ in range(4000)])
    shares = torch.bincount(draws, minlength=5) / 4000
    expected = torch.cat([logits[0, :4].softmax(0), torch.zeros(1)])
    assert (shares - expected).abs().max() < 0.03  # five standard deviations are 0.04 for the largest share
    assert shares[4] == 0


@pytest.mark.parametrize("settings", [SamplingSettings(greedy=True), SamplingSettings(temperature=0.0)])
def test_greedy_takes_the_first_of_the_likeliest(settings):
    logits = torch.tensor([[0.0, 5.0, 5.0], [9.0, 5.0, 5.0]], dtype=torch.bfloat16)
    assert Sampler(settings, [1, 2]).choose(logits, [0, 1]) == [1, 0]
