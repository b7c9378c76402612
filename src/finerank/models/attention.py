"""Attention over packed sequences, registered through transformers' attention interface.

    use_packed_attention(model)
    model.base_model(input_ids=ids, position_ids=positions, attention_mask=spans.packed_mask(cu_seqlens))

The borders of the packed sequences travel where an attention mask does: transformers hands a 4-dimensional mask through
to every layer unchanged, so `packed_mask` is int32 [1, 1, 1 or 2, S + 1] and no mask of T x T is ever built. With any
other mask (padding, a key-value cache) the layers compute as under `sdpa`, so the same model still generates.

Sliding windows, soft-capped scores and attention sinks are computed too; what is not (chunked attention) is refused.

Shapes: T tokens of all sequences, t of one sequence, S sequences, H query heads, G key-value heads, K head size.
"""

import functools
import inspect
import itertools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from finerank.errors import ModelError
from finerank.models.block_attention import block_attention
from finerank.models.spans import Span, packed_mask, spans_of

logger = logging.getLogger(__name__)

NAME = "finerank"


def use_packed_attention(model: PreTrainedModel) -> None:
    """Make `model` attend inside packed sequences only, where a mask is a `packed_mask`.

    Raises:
        ModelError: the architecture does not take an attention function, or mixes neighbouring sequences all the same.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME or not _keeps_apart(model):
        model.set_attn_implementation(before)
        if bad := _first_nonfinite(model):
            raise ModelError(f"The base weights are not finite ({bad} holds NaN or infinity); get the model again.")
        if not _has_finite_outputs(model):
            precision = str(model.dtype).removeprefix("torch.")
            advice = "get the model again" if model.dtype == torch.float32 else "try --dtype fp32"
            raise ModelError(
                f"The base's outputs are not finite in {precision}, though its weights are: some of them are far too "
                f"large; {advice}."
            )
        raise ModelError(f"{type(model).__name__} cannot keep packed sequences apart; use --no-pack.")


def _first_nonfinite(model: PreTrainedModel) -> str | None:
    """Name of the first weight that holds NaN or infinity."""
    floating = ((name, p) for name, p in model.named_parameters() if p.is_floating_point())
    return next((name for name, p in floating if not torch.isfinite(p).all()), None)


@torch.no_grad()
def _has_finite_outputs(model: PreTrainedModel) -> bool:
    """Whether the model gives finite hidden states for a few tokens, as it computes them by itself."""
    ids = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    return bool(torch.isfinite(model.base_model(input_ids=ids, use_cache=False).last_hidden_state).all())


def can_share_prompts(model: PreTrainedModel) -> bool:
    """Whether a segment that continues another gives what the whole sequence gives; see `models.spans`.

    `model` is one after `use_packed_attention`.
    """
    shared, first, second = [3, 5, 8, 13, 21], [7, 14, 21, 28], [9, 18, 27]
    return _same_packed(
        model,
        packed_mask(torch.tensor([0, 5, 9, 12]), torch.tensor([-1, 0, 0])),
        right=[shared, [*shared, *first], [*shared, *second]],
        wrong=[shared, first, second],
    )


def _keeps_apart(model: PreTrainedModel) -> bool:
    """Two short sequences give the same hidden states packed as alone."""
    first, second = [7, 14, 21, 28, 35], [42, 49, 56, 63, 70, 77]
    mask = packed_mask(torch.tensor([0, 5, 11]))
    return _same_packed(model, mask, right=[first, second], wrong=[first, [*first, *second]])


@torch.no_grad()
def _same_packed(model: PreTrainedModel, mask: Tensor, *, right: list[list[int]], wrong: list[list[int]]) -> bool:
    """Whether each segment of a pack has the hidden states of the end of its sequence in `right`, and not in `wrong`.

    What is right cannot be told from rounding alone, which in bf16 and 30 layers makes some percent; so the distance to
    what would be wrong is the measure.
    """
    decoder, vocab_size = model.base_model, model.config.get_text_config().vocab_size
    spans = spans_of(mask)

    def hidden(ids: list[int], **inputs: Any) -> Tensor:
        input_ids = torch.tensor([[i % vocab_size for i in ids]], device=model.device)
        return decoder(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state[0].float()

    alone = functools.cache(lambda ids: hidden(list(ids)))  # some sequences stand on both sides

    def ends(sequences: list[list[int]]) -> Tensor:
        pairs = zip(sequences, spans, strict=True)
        return torch.cat([alone(tuple(own))[span.start - span.end :] for own, span in pairs])

    ids = [i for own, span in zip(right, spans, strict=True) for i in own[span.num_before :]]
    positions = [i for span in spans for i in range(span.num_before, span.length)]
    try:
        packed = hidden(ids, position_ids=torch.tensor([positions], device=model.device), attention_mask=mask)
    except (TypeError, RuntimeError, ValueError, AttributeError) as error:
        logger.debug("packed attention failed", exc_info=error)
        return False
    expected = ends(right)
    return bool((packed - expected).norm() <= 0.25 * (ends(wrong) - expected).norm())


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function.

    Args:
        module: the attention layer.
        query: [B, H, T, K], rotated.
        key, value: [B, G, T, K].
        attention_mask: `packed_mask`, or what `sdpa` gets.
        scaling: factor on the scores; default 1 / sqrt(K).
        dropout: on the attention probabilities.
        sliding_window: tokens that a token sees, itself included; None for all.
        softcap: Gemma 2's cap on the scores.
        s_aux: [H], gpt-oss's attention sinks: a further logit of each softmax that carries no value.

    Returns:
        [B, T, H, K] and no weights.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is None or attention_mask.dtype != torch.int32:
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        out = explicit_attention(
            query, key, value, attention_mask, scaling=scaling, dropout=dropout, softcap=softcap, sinks=s_aux
        )
        return out.transpose(1, 2).contiguous(), None
    spans = spans_of(attention_mask)
    window = _window(module, sliding_window, longest=max(span.length for span in spans))
    if dropout or softcap is not None or s_aux is not None:
        extras = {"dropout": dropout, "softcap": softcap, "sinks": s_aux}
        return _explicit_by_span(query, key, value, spans, window, scaling=scaling, **extras), None
    if query.device.type == "cpu":
        out = block_attention(query[0], key[0], value[0], spans, scaling=scaling, window=window)
        return out.unsqueeze(0), None
    if _has_varlen_kernel(query):
        return _varlen_attention(query, key, value, spans, window, scaling=scaling), None
    return _sdpa_by_span(query, key, value, spans, window, scaling=scaling), None


def _explicit_by_span(
    query: Tensor, key: Tensor, value: Tensor, spans: Sequence[Span], window: int | None, **options: Any
) -> Tensor:
    """[1, T, H, K] by `explicit_attention`."""
    outputs = []
    for span in spans:
        q, k, v = query[:, :, span.own], span.seen(key, 2), span.seen(value, 2)
        outputs.append(explicit_attention(q, k, v, _span_mask(span, window, query.device), **options))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _sdpa_by_span(
    query: Tensor, key: Tensor, value: Tensor, spans: Sequence[Span], window: int | None, *, scaling: float
) -> Tensor:
    """[1, T, H, K] by torch's attention on each segment, for devices without a kernel for packed ones."""
    outputs = []
    for span in spans:
        q, k, v = query[:, :, span.own], span.seen(key, 2), span.seen(value, 2)
        mask = None if window is None and not span.before else _span_mask(span, window, query.device)
        is_grouped = q.shape[1] != k.shape[1]
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=is_grouped
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _span_mask(span: Span, window: int | None, device: torch.device) -> Tensor:
    return causal_mask(span.length, window, device)[span.num_before :]


def _has_varlen_kernel(query: Tensor) -> bool:
    """torch's kernel for packed sequences takes half precision and heads up to 256, on CUDA from Ampere on."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= 256
        and torch.version.hip is None
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and {"scale", "window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()
    )


def _varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, spans: Sequence[Span], window: int | None, *, scaling: float
) -> Tensor:
    """[1, T, H, K] by torch's CUDA kernel for packed sequences, which takes the last query to see the last key."""
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if any(span.before for span in spans):
        key, value = (torch.cat([span.seen(x, 0) for span in spans]) for x in (key, value))
    num_queries, num_keys = [span.end - span.start for span in spans], [span.length for span in spans]
    out = varlen_attn(
        query,
        key,
        value,
        _borders(num_queries, query.device),
        _borders(num_keys, query.device),
        max(num_queries),
        max(num_keys),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out.unsqueeze(0)


def _borders(lengths: Sequence[int], device: torch.device) -> Tensor:
    borders = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return borders.pin_memory().to(device, non_blocking=True)


def _window(module: nn.Module, sliding_window: int | None, longest: int) -> int | None:
    """The sliding window of a layer; None when every sequence fits into it."""
    config = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    kind = kinds[module.layer_idx] if kinds and hasattr(module, "layer_idx") else None  # type: ignore[index]
    if kind == "sliding_attention" and sliding_window is None:  # a few layers keep it to themselves
        sliding_window = getattr(config, "sliding_window", None)
    chunk = getattr(config, "attention_chunk_size", None)
    if kind == "chunked_attention" and (chunk is None or longest > chunk):
        raise ModelError(
            f"Packed sequences longer than {chunk} tokens are not supported with chunked attention; use --no-pack."
        )
    return sliding_window if sliding_window is not None and longest > sliding_window else None


def causal_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """bool [t, t], true where a query (row) sees a key (column): itself and up to `window - 1` before it."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril_()
    return mask if window is None else mask.triu_(1 - window)


def explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention written out, with every extra: [B, H, t, K] queries over [B, G, u, K] keys -> [B, H, t, K].

    Args:
        query, key, value: see above; B sequences side by side.
        mask: bool (true: seen) or added to the scores, broadcast to [B, H, t, u]; None: causal.
        scaling: factor on the scores.
        dropout: on the probabilities.
        softcap: `softcap * tanh(scores / softcap)`.
        sinks: [H], one more logit of each row that carries no value.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = (query @ key.transpose(-1, -2)).float() * scaling
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device)
        mask = mask.tril_(scores.shape[-1] - scores.shape[-2])
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask.float()
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        probs = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]
    else:
        probs = torch.softmax(scores, dim=-1)
    probs = F.dropout(probs.to(value.dtype), dropout)
    return probs @ value
