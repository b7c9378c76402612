"""Causal attention of packed sequences by plain batched matrix products, block by block of queries; for CPUs.

torch's CPU flash kernel is slow in its backward pass: forward and backward together it took 2.1 to 3.2 times as long as
this one in bf16, and 1.2 to 1.6 times in fp32 (sequences of 128 to 2,048 tokens, 9 query and 3 key-value heads of 64,
on two Zen 4 cores; measured with probabilities kept). Here

- a block of queries meets only the keys that it may see, so little is computed to be masked;
- query heads that share a key-value head are one matrix, and keys are repeated for no head;
- no probabilities are kept for backward, each block's are computed again: in a whole step that took no time that could
  be measured, and the memory of a token does not depend on the length of its sequence.

In bf16 the scores are rounded to bf16 before the softmax, as transformers' `eager` attention does.

Shapes: T tokens of all segments, L tokens that a segment sees (its ancestors' and its own), H query heads, G key-value
heads, K head size, n queries and u keys of a block, M = H / G * n.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finerank.models.spans import Span

QUERIES_PER_BLOCK = 128


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, spans: Sequence[Span], *, scaling: float, window: int | None = None
) -> Tensor:
    """Causal attention inside each sequence.

    Args:
        query: [H, T, K].
        key, value: [G, T, K].
        spans: the segments, which cover all T tokens.
        scaling: factor on the scores.
        window: tokens that a token sees, itself included; None for all.

    Returns:
        [T, H, K], contiguous.
    """
    return _BlockAttention.apply(query * scaling, key, value, tuple(spans), window)


@dataclass(frozen=True)
class _Block:
    """Queries `start:end` of the batch, the first of them at position `at`, and the keys that at least one of them
    sees, by their positions."""

    start: int
    end: int
    at: int
    first: int

    @property
    def queries(self) -> slice:
        return slice(self.start, self.end)

    @property
    def keys(self) -> slice:
        return slice(self.first, self.at + self.end - self.start)


def _blocks(span: Span, window: int | None) -> Iterator[_Block]:
    for start in range(span.start, span.end, QUERIES_PER_BLOCK):
        at = span.num_before + start - span.start
        first = 0 if window is None else max(0, at - window + 1)
        end = min(start + QUERIES_PER_BLOCK, span.end)
        yield _Block(start, end, at, first)


class _BlockAttention(torch.autograd.Function):
    """Queries come scaled: then neither scores nor key gradients need it."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, spans: tuple[Span, ...], window: int | None
    ) -> Tensor:
        mask = _Mask(query, window)
        out_THK = query.new_empty(query.shape[1], query.shape[0], value.shape[-1])
        out_GHTK = _by_key_head(out_THK.transpose(0, 1), key.shape[0])
        query_GHTK = _by_key_head(query, key.shape[0])
        for span in spans:
            key_GLK, value_GLK = span.seen(key, 1), span.seen(value, 1)
            for block in _blocks(span, window):
                q_GMK = query_GHTK[:, :, block.queries].flatten(1, 2)
                p_GMu = _probabilities(q_GMK, key_GLK, block, mask)
                out_GHTK[:, :, block.queries] = torch.bmm(p_GMu, value_GLK[:, block.keys]).view_as(
                    out_GHTK[:, :, block.queries]
                )
        ctx.save_for_backward(query, key, value)
        ctx.spans, ctx.window = spans, window
        return out_THK

    @staticmethod
    def backward(ctx: Any, dout_THK: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        query, key, value = ctx.saved_tensors
        mask = _Mask(query, ctx.window)
        query_GHTK = _by_key_head(query, key.shape[0])
        dout_GHTK = _by_key_head(dout_THK.transpose(0, 1), key.shape[0])
        dquery, dkey, dvalue = (_empty_token_major(x) for x in (query, key, value))
        dquery_GHTK = _by_key_head(dquery, key.shape[0])
        for span in ctx.spans:
            key_GLK, value_GLK = span.seen(key, 1), span.seen(value, 1)
            gradients = _Gradient(dkey, span), _Gradient(dvalue, span)
            for block in _blocks(span, ctx.window):
                q_GMK = query_GHTK[:, :, block.queries].flatten(1, 2)
                dout_GMK = dout_GHTK[:, :, block.queries].flatten(1, 2)
                p_GMu = _probabilities(q_GMK, key_GLK, block, mask)
                dp_GMu = torch.bmm(dout_GMK, value_GLK[:, block.keys].transpose(1, 2))
                ds_GMu = torch._softmax_backward_data(dp_GMu, p_GMu, -1, p_GMu.dtype)
                dquery_GHTK[:, :, block.queries] = torch.bmm(ds_GMu, key_GLK[:, block.keys]).view_as(
                    dquery_GHTK[:, :, block.queries]
                )
                for gradient, left_GMu, right_GMK in zip(gradients, (ds_GMu, p_GMu), (q_GMK, dout_GMK), strict=True):
                    gradient.add_(torch.bmm(left_GMu.transpose(1, 2), right_GMK), block)
        return dquery, dkey, dvalue, None, None


class _Gradient:
    """Where the gradients of the keys (or values) that a segment sees are summed, block by block.

    A segment's own places get their first value from itself, for segments come before those that continue them.
    """

    def __init__(self, all_GTK: Tensor, span: Span):
        self._before = [all_GTK[:, part] for part in span.before]
        self._own, self._num_written = all_GTK[:, span.own], 0

    def add_(self, product_GuK: Tensor, block: _Block) -> None:
        """Add the gradients of `block.keys`."""
        first, at = block.keys.start, 0
        for part in self._before:
            low, at = max(at, first) - at, at + part.shape[1]
            if low < part.shape[1]:
                begin = at - part.shape[1] + low - first
                part[:, low:] += product_GuK[:, begin : begin + part.shape[1] - low]
        old, stop = max(first, at) - at, block.keys.stop - at
        new = max(old, self._num_written)
        product_GuK = product_GuK[:, old + at - first :]
        self._own[:, old:new] += product_GuK[:, : new - old]
        self._own[:, new:stop] = product_GuK[:, new - old :]
        self._num_written = stop


def _by_key_head(x_HTK: Tensor, num_key_heads: int) -> Tensor:
    """[H, T, K] -> [G, H / G, T, K]"""
    return x_HTK.unflatten(0, (num_key_heads, -1))


def _empty_token_major(x_HTK: Tensor) -> Tensor:
    """Like `x`, with the tokens outermost in memory, as the projections before it will want their gradient."""
    return x_HTK.new_empty(x_HTK.shape[1], x_HTK.shape[0], x_HTK.shape[2]).transpose(0, 1)


def _probabilities(q_GMK: Tensor, key_GLK: Tensor, block: _Block, mask: "_Mask") -> Tensor:
    scores_GMu = torch.bmm(q_GMK, key_GLK[:, block.keys].transpose(1, 2))
    mask.add_(scores_GMu, block)
    return torch.softmax(scores_GMu, dim=-1)


class _Mask:
    """Adds -inf where a query of a block must not see a key."""

    def __init__(self, like: Tensor, window: int | None):
        n = QUERIES_PER_BLOCK
        self.window = window
        self.future_nn = torch.full((n, n), float("-inf"), dtype=like.dtype, device=like.device).triu_(1)

    def add_(self, scores_GMu: Tensor, block: _Block) -> None:
        n = block.end - block.start
        scores = scores_GMu.unflatten(1, (-1, n))
        scores[..., block.at - block.first :].add_(self.future_nn[:n, :n])
        if self.window is not None and block.keys.stop - block.first > self.window:
            positions = torch.arange(block.first, block.keys.stop)
            distance = positions[block.at - block.first :, None] - positions
            scores.masked_fill_((distance >= self.window).to(scores.device), float("-inf"))
