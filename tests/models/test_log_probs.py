"""Log-probabilities of tokens and answers against torch's log_softmax over all logits, values and gradients."""

import pytest
import torch
from torch import nn

from finerank.data.loader import packed_batch, padded_batch
from finerank.models import head as head_module
from finerank.models.attention import use_packed_attention
from finerank.models.head import Head
from finerank.models.log_probs import sequence_log_probs, token_log_probs
from finerank.train.pair_loss import pairs_of
from pair_rows import pair_rows
from tiny import tiny_model


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(head_module, "LOGITS_PER_CHUNK", 40 * 7)
    monkeypatch.setattr(head_module, "MIN_CHUNK", 1)


def case(num=23, bias=True):
    torch.manual_seed(0)
    module = nn.Linear(12, 40, bias=bias, dtype=torch.float64).requires_grad_(False)
    hidden = torch.randn(num, 12, dtype=torch.float64).mul_(4).requires_grad_()
    return module, hidden, torch.randint(0, 40, (num,))


def reference(head, hidden, targets):
    return torch.log_softmax(head.logits(hidden), dim=1)[torch.arange(len(targets)), targets]


HEADS = [{}, {"softcap": 3.0}, {"scale": 0.25}, {"scale": 0.5, "softcap": 2.0}]


@pytest.mark.parametrize("extra", HEADS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("learns", [True, False])
def test_values_and_gradients_equal_log_softmax(extra, bias, learns):
    module, hidden, targets = case(bias=bias)
    module.requires_grad_(learns)
    head = Head(module, **extra)
    got, want = token_log_probs(head, hidden, targets), reference(head, hidden, targets)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    weights = torch.linspace(-2, 3, len(targets), dtype=torch.float64)  # each position its own, as losses have them
    inputs = [hidden, *(p for p in module.parameters() if learns)]
    ours, theirs = (torch.autograd.grad((weights * value).square().sum(), inputs) for value in (got, want))
    for g, w in zip(ours, theirs, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("extra", HEADS, ids=str)
def test_gradient_equals_numeric(extra):
    module, hidden, targets = case(num=6)
    assert torch.autograd.gradcheck(lambda h: token_log_probs(Head(module, **extra), h, targets), hidden)


@pytest.mark.parametrize("learns", [True, False])
def test_no_position_is_no_number(learns):
    module, hidden, targets = case()
    module.requires_grad_(learns)
    assert token_log_probs(Head(module), hidden[:0], targets[:0]).shape == (0,)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("layout", ["packed", "shared", "padded"])
def test_answers_of_a_model_equal_its_logits(family, layout):
    """Sums over each answer and their gradients, in fp64, against one forward pass for each sequence."""
    model, data = tiny_model(family).double(), pair_rows(4)
    rows = [2, 0, 3]
    if layout == "padded":
        batch = padded_batch(data, rows, length=32, pad_token_id=0)
    else:
        use_packed_attention(model)
        batch = packed_batch(data, rows, share=layout == "shared")
        assert (batch.parents is not None) == (layout == "shared")
    pairs = pairs_of(model, batch)
    got = torch.stack([pairs.chosen, pairs.rejected], dim=1)
    plain = tiny_model(family).double()
    want, counts = [], []
    for row in rows:
        for ids, labels in data.sequences(row):
            logits = plain(input_ids=torch.from_numpy(ids)[None].long()).logits[0, :-1]
            targets = torch.from_numpy(labels)[1:].long()
            trained = targets != -100
            want.append(torch.log_softmax(logits, 1)[trained, targets[trained]].sum())
            counts.append(int(trained.sum()))
    torch.testing.assert_close(got.flatten(), torch.stack(want).to(got.dtype), rtol=1e-6, atol=1e-6)
    assert torch.stack([pairs.num_chosen, pairs.num_rejected], dim=1).flatten().tolist() == counts
    weights = torch.tensor([1.0, -0.5, 2.0, 0.25, -1.0, 3.0], dtype=torch.float64)
    name = "model.layers.0.self_attn.q_proj.weight"
    (ours,) = torch.autograd.grad((got.flatten() * weights).sum(), model.get_parameter(name))
    (theirs,) = torch.autograd.grad((torch.stack(want) * weights).sum(), plain.get_parameter(name))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)  # rotary angles are fp32


def test_counts_of_a_batch_without_trained_tokens_are_zero():
    model = use_packed_attention(tiny_model("llama")) or tiny_model("llama")
    ids = torch.arange(3, 11)[None]
    sums, counts = sequence_log_probs(model, ids, torch.full_like(ids, -100), torch.arange(8)[None])
    assert sums.tolist() == [0.0] and counts.tolist() == [0]
