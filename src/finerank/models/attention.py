"""Attention over packed sequences, registered through transformers' attention interface.

    use_packed_attention(model)
    model.base_model(input_ids=ids, position_ids=positions, attention_mask=packed_mask(cu_seqlens))

The borders of the packed sequences travel where an attention mask does: transformers hands a 4-dimensional mask through
to every layer unchanged, so `packed_mask` is int32 [1, 1, 1, S + 1] and no mask of T x T is ever built. With any other
mask (padding, a key-value cache) the layers compute as under `sdpa`, so the same model still generates.

Sliding windows, soft-capped scores and attention sinks are computed too; what is not (chunked attention) is refused.

Shapes: T tokens of all sequences, t of one sequence, S sequences, H query heads, G key-value heads, K head size.
"""

import inspect
import itertools
import logging
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

logger = logging.getLogger(__name__)

NAME = "finerank"


def packed_mask(cu_seqlens: Tensor) -> Tensor:
    """The borders of packed sequences in the place of an attention mask; on the CPU, where they are read.

    Args:
        cu_seqlens: int32 [S + 1], 0 first and T last.
    """
    return cu_seqlens.to("cpu", torch.int32).view(1, 1, 1, -1)


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
        raise ModelError(f"{type(model).__name__} cannot keep packed sequences apart; use --no-pack.")


def _first_nonfinite(model: PreTrainedModel) -> str | None:
    """Name of the first weight that holds NaN or infinity."""
    floating = ((name, p) for name, p in model.named_parameters() if p.is_floating_point())
    return next((name for name, p in floating if not torch.isfinite(p).all()), None)


@torch.no_grad()
def _keeps_apart(model: PreTrainedModel) -> bool:
    """Two short sequences give the same hidden states packed as alone."""
    decoder, device = model.base_model, model.device
    vocab_size = model.config.get_text_config().vocab_size
    ids = (torch.arange(1, 12, device=device) * 7 % vocab_size)[None]
    parts = (slice(0, 5), slice(5, 11))
    positions = torch.cat([torch.arange(5), torch.arange(6)]).to(device)[None]
    try:
        packed = decoder(
            input_ids=ids,
            position_ids=positions,
            attention_mask=packed_mask(torch.tensor([0, 5, 11])),
            use_cache=False,
        ).last_hidden_state
    except (TypeError, RuntimeError, ValueError, AttributeError) as error:
        logger.debug("packed attention failed", exc_info=error)
        return False
    alone = torch.cat([decoder(input_ids=ids[:, p], use_cache=False).last_hidden_state for p in parts], dim=1)
    # far below what attention to a neighbour would change, far above rounding
    return bool((packed - alone).abs().max() <= 0.05 * alone.abs().max())


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
    borders = attention_mask.flatten().tolist()
    window = _window(module, sliding_window, longest=max(b - a for a, b in itertools.pairwise(borders)))
    if dropout or softcap is not None or s_aux is not None:
        extras = {"dropout": dropout, "softcap": softcap, "sinks": s_aux}
        return _explicit_by_sequence(query, key, value, borders, window, scaling=scaling, **extras), None
    if query.device.type == "cpu":
        out = block_attention(query[0], key[0], value[0], borders, scaling=scaling, window=window)
        return out.unsqueeze(0), None
    if _has_varlen_kernel(query):
        return _varlen_attention(query, key, value, borders, window, scaling=scaling), None
    return _sdpa_by_sequence(query, key, value, borders, window, scaling=scaling), None


def _explicit_by_sequence(
    query: Tensor, key: Tensor, value: Tensor, borders: list[int], window: int | None, **options: Any
) -> Tensor:
    """[1, T, H, K] by `explicit_attention`."""
    outputs = []
    for start, end in itertools.pairwise(borders):
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        outputs.append(explicit_attention(q, k, v, causal_mask(end - start, window, query.device), **options))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def _sdpa_by_sequence(
    query: Tensor, key: Tensor, value: Tensor, borders: list[int], window: int | None, *, scaling: float
) -> Tensor:
    """[1, T, H, K] by torch's attention on each sequence, for devices without a kernel for packed ones."""
    outputs = []
    for start, end in itertools.pairwise(borders):
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        mask = None if window is None else causal_mask(end - start, window, query.device)
        is_grouped = q.shape[1] != k.shape[1]
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=is_grouped
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


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
    query: Tensor, key: Tensor, value: Tensor, borders: list[int], window: int | None, *, scaling: float
) -> Tensor:
    """[1, T, H, K] by torch's CUDA kernel for packed sequences."""
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    longest = max(b - a for a, b in itertools.pairwise(borders))
    cu_seqlens = torch.tensor(borders, dtype=torch.int32).pin_memory().to(query.device, non_blocking=True)
    window_size = (-1 if window is None else window - 1, 0)
    out = varlen_attn(
        query,
        key,
        value,
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        scale=scaling,
        window_size=window_size,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out.unsqueeze(0)


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
