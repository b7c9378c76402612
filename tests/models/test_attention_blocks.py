"""Block attention against the formula: values, gradients, memory."""

from itertools import pairwise

import pytest
import torch

from finerank.models import block_attention as blocks
from finerank.models.attention import causal_mask, explicit_attention
from finerank.models.block_attention import block_attention
from finerank.models.spans import Span, make_spans, packed_mask, spans_of

BORDERS = [0, 3, 4, 21, 29]  # lengths 3, 1, 17, 8
SPANS = make_spans(BORDERS)
TREE = make_spans([0, 6, 16, 19, 20, 37, 45, 50], [-1, 0, -1, 1, 0, 2, 1])  # prompts of 6, 6 + 10 and 3 tokens


@pytest.fixture(autouse=True, params=[4, 8, 128], ids=str)
def small_blocks(request, monkeypatch):
    """Blocks of a few queries, so that sequences have several."""
    monkeypatch.setattr(blocks, "QUERIES_PER_BLOCK", request.param)


def inputs(dtype=torch.float64, heads=4, key_heads=2, size=5, borders=BORDERS):
    torch.manual_seed(0)
    shapes = [(heads, borders[-1], size)] + 2 * [(key_heads, borders[-1], size)]
    return [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def by_formula(q, k, v, borders, scaling, window=None):
    out = []
    for a, b in pairwise(borders):
        mask = causal_mask(b - a, window, q.device)
        repeats = q.shape[0] // k.shape[0]
        kk, vv = (x[:, a:b].repeat_interleave(repeats, 0) for x in (k, v))
        scores = (q[:, a:b] @ kk.transpose(1, 2) * scaling).masked_fill(~mask, float("-inf"))
        out.append(torch.softmax(scores, -1) @ vv)
    return torch.cat(out, dim=1).transpose(0, 1)


@pytest.mark.parametrize("window", [None, 1, 2, 5, 7])
@pytest.mark.parametrize("heads, key_heads", [(4, 2), (3, 3), (4, 1)])
def test_equals_the_formula_with_gradients(window, heads, key_heads):
    qkv = inputs(heads=heads, key_heads=key_heads)
    got = block_attention(*qkv, SPANS, scaling=0.3, window=window)
    want = by_formula(*qkv, BORDERS, 0.3, window)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    weight = torch.randn_like(want)
    for g, w in zip(torch.autograd.grad(got, qkv, weight), torch.autograd.grad(want, qkv, weight), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-12)


def test_gradients_equal_numeric_ones():
    borders = [0, 2, 8]
    qkv = inputs(size=3, borders=borders)
    assert torch.autograd.gradcheck(
        lambda q, k, v: block_attention(q, k, v, make_spans(borders), scaling=0.5, window=4), qkv
    )


def test_takes_the_strided_tensors_that_models_give():
    qkv = inputs()
    strided = [x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in qkv]
    got, want = (block_attention(*x, SPANS, scaling=0.3) for x in (strided, qkv))
    assert got.is_contiguous()
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    for g, w in zip(torch.autograd.grad(got.sum(), strided), torch.autograd.grad(want.sum(), qkv), strict=True):
        assert g.stride() == strided[0].stride() or g.shape[0] == 2
        torch.testing.assert_close(g, w)


def test_bf16_is_within_its_rounding():
    """Scores, probabilities and results are rounded to 8 bits each: 1% of the output, 2% of the gradients."""
    exact = inputs(size=64)
    low = [x.detach().bfloat16().requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in low]
    want = by_formula(*exact, BORDERS, 0.125)
    got = block_attention(*low, SPANS, scaling=0.125)
    weight = torch.randn_like(want).bfloat16()
    pairs = [(got, want)]
    pairs += zip(torch.autograd.grad(got, low, weight), torch.autograd.grad(want, exact, weight.double()), strict=True)
    errors = [((g.double() - w).norm() / w.norm()).item() for g, w in pairs]
    assert errors[0] < 0.01 and max(errors) < 0.02, errors


def test_explicit_attention_agrees():
    q, k, v = (x[:, 4:21].float() for x in inputs())
    want = explicit_attention(q[None], k[None], v[None], causal_mask(17, 6, q.device), scaling=0.3)
    got = block_attention(q, k, v, make_spans([0, 17]), scaling=0.3, window=6)
    torch.testing.assert_close(got.transpose(0, 1), want[0], rtol=1e-5, atol=1e-6)


def test_memory_kept_grows_with_tokens_not_with_their_square():
    def kept(length):
        total = 0

        def count(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            block_attention(*inputs(torch.float32, borders=[0, length]), make_spans([0, length]), scaling=0.3)
        return total / length

    assert kept(2048) == kept(1024) == kept(8)


def by_formula_of_a_tree(q, k, v, spans: list[Span], scaling, window=None):
    """Each segment attends to a key sequence that is put together for it."""
    out = []
    for span in spans:
        keys, values = (torch.cat([x[:, part] for part in (*span.before, span.own)], 1) for x in (k, v))
        n = keys.shape[1]
        whole = q.new_zeros(q.shape[0], n, q.shape[2])
        whole[:, span.num_before :] = q[:, span.own]
        out.append(by_formula(whole, keys, values, [0, n], scaling, window)[span.num_before :])
    return torch.cat(out)


@pytest.mark.parametrize("window", [None, 1, 5, 9])
def test_segments_that_continue_others_equal_the_formula_with_gradients(window):
    qkv = inputs(borders=[0, 50])
    got = block_attention(*qkv, TREE, scaling=0.3, window=window)
    want = by_formula_of_a_tree(*qkv, TREE, 0.3, window)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    weight = torch.randn_like(want)
    for g, w in zip(torch.autograd.grad(got, qkv, weight), torch.autograd.grad(want, qkv, weight), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-12)


def test_spans_travel_as_a_mask():
    mask = packed_mask(torch.tensor([0, 6, 16, 19]), torch.tensor([-1, 0, 1]))
    assert mask.dtype == torch.int32 and mask.dim() == 4
    assert spans_of(mask) == [Span(0, 6), Span(6, 16, (slice(0, 6),)), Span(16, 19, (slice(0, 6), slice(6, 16)))]
    assert spans_of(packed_mask(torch.tensor([0, 3, 5]))) == [Span(0, 3), Span(3, 5)]
    assert [span.length for span in TREE] == [6, 16, 3, 17, 23, 11, 21]
