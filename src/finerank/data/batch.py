"""`Batch`: what one micro-batch of a training step holds, packed or padded.

Shapes: B sequences side by side, T tokens, S packed sequences.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from finerank.data.types import IGNORE_INDEX


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch. Packed: B = 1 and `cu_seqlens` marks where sequences begin. Padded: `cu_seqlens` is None.

    `target_ids` is already shifted inside each sequence: `target_ids[b, t]` is the token to predict from position t, or
    -100. So no label ever crosses the border between two packed sequences.
    """

    input_ids: torch.Tensor
    """int64 [B, T]"""
    target_ids: torch.Tensor
    """int64 [B, T], -100 where nothing is trained"""
    position_ids: torch.Tensor
    """int64 [B, T], restarting at 0 in each packed sequence"""
    cu_seqlens: torch.Tensor | None = None
    """int32 [S + 1] with 0 first and T last, for packed batches"""
    parents: torch.Tensor | None = None
    """int32 [S], for packed batches with shared prompts: the earlier segment that each one continues, or -1. Then a
    sequence is a segment that none continues, with all that lies before it; see `data.shared_prompts`."""
    attention_mask: torch.Tensor | None = None
    """int64 [B, T], 1 for real tokens, for padded batches"""
    rows: tuple[int, ...] = field(default=())
    """indices of the dataset's samples inside, in order, for messages and replays"""
    reference: torch.Tensor | None = None
    """fp32 [rows, 2], for pairs: log-probabilities of chosen and rejected under the reference model. A pair is two
    sequences, the chosen one first."""
    is_sample: bool = False
    """whether these rows are backpropagated through local layers too; see `sample_share` of `BatchPlan`"""

    @property
    def inputs(self) -> dict[str, Any]:
        """What `models.forward.loss_sum` and `models.log_probs.sequence_log_probs` take, by name."""
        names = ("input_ids", "target_ids", "position_ids", "cu_seqlens", "attention_mask", "parents")
        return {name: getattr(self, name) for name in names}

    @property
    def num_trained_tokens(self) -> int:
        """How many positions the loss counts."""
        return int((self.target_ids != IGNORE_INDEX).sum())

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequences: padding not counted, a shared prompt counted for each sequence that has it."""
        if self.attention_mask is not None:
            return int(self.attention_mask.sum())
        if self.parents is None or self.cu_seqlens is None:
            return self.input_ids.numel()
        last_S = self.position_ids[0].cpu()[self.cu_seqlens[1:].cpu().long() - 1]
        return int((last_S[self.is_sequence] + 1).sum())

    @property
    def is_sequence(self) -> torch.Tensor:
        """bool [S], on the CPU: whether a packed segment is the end of a sequence, and not a prompt of several."""
        assert self.cu_seqlens is not None
        ends = torch.ones(len(self.cu_seqlens) - 1, dtype=torch.bool)
        if self.parents is not None:
            parents = self.parents.cpu()
            ends[parents[parents >= 0].long()] = False
        return ends

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        moved = {
            name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in vars(self).items()
        }
        return Batch(**moved)  # type: ignore[arg-type]
