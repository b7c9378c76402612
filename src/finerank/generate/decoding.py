"""Prompts side by side through a causal language model, one token a step, with a key-value cache.

Shorter prompts are padded on the left, so that all rows end at the same place; positions are counted from each prompt's
first real token and padding is masked out. Rows that are done leave the batch and the cache.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from finerank.errors import ModelError
from finerank.generate.sampling import Sampler

# Shapes: B rows still going, T tokens so far, V vocabulary


class Decoding:
    """The state of one batch of prompts on its way to answers."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], sampler: Sampler) -> None:
        """`prompts` holds the token ids of each prompt, at least one each."""
        self.rows = list(range(len(prompts)))
        """Prompts still going; `step` gives one token for each of them, in this order."""
        self._model = model
        self._sampler = sampler
        self._cache: Any = None
        self._options: dict[str, Any] = {}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            self._options["logits_to_keep"] = 1  # a long prompt's logits over the vocabulary would fill the memory
        longest = max(len(prompt) for prompt in prompts)
        padding = [longest - len(prompt) for prompt in prompts]
        device = model.device
        self._input_BT = torch.tensor([[0] * n + list(p) for n, p in zip(padding, prompts, strict=True)], device=device)
        self._mask_BT: torch.Tensor | None = None  # where nothing is padded, attention is faster without a mask
        self._position_BT = torch.arange(longest, device=device).repeat(len(prompts), 1)
        if any(padding):
            start_B1 = torch.tensor(padding, device=device)[:, None]
            self._mask_BT = (self._position_BT >= start_B1).long()
            self._position_BT = (self._position_BT - start_B1).clamp(min=0)

    @torch.no_grad()
    def step(self) -> list[int]:
        """The next token of each of `rows`. Raises ModelError for a model without a key-value cache."""
        output = self._model(
            input_ids=self._input_BT,
            attention_mask=self._mask_BT,
            position_ids=self._position_BT,
            past_key_values=self._cache,
            use_cache=True,
            **self._options,
        )
        self._cache = getattr(output, "past_key_values", None)
        if self._cache is None:
            raise ModelError(f"{type(self._model).__name__} gives no key-value cache, so it cannot generate text here.")
        tokens = self._sampler.choose(output.logits[:, -1], self.rows)
        self._input_BT = torch.tensor(tokens, device=self._input_BT.device)[:, None]
        self._position_BT = self._position_BT[:, -1:] + 1
        if self._mask_BT is not None:
            self._mask_BT = torch.cat([self._mask_BT, self._mask_BT.new_ones(len(tokens), 1)], dim=1)
        return tokens

    @torch.no_grad()
    def finish(self, done: set[int]) -> None:
        """Take prompts out of the batch."""
        kept = [place for place, row in enumerate(self.rows) if row not in done]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[place] for place in kept]
        if not kept:
            return
        indices = torch.tensor(kept, device=self._input_BT.device)
        self._cache.reorder_cache(indices)  # made for beams, but any choice of rows will do
        self._input_BT = self._input_BT[indices]
        self._position_BT = self._position_BT[indices]
        if self._mask_BT is not None:
            self._mask_BT = self._mask_BT[indices]
