"""Where the sequences of a packed batch lie, and which tokens each one sees.

    mask = packed_mask(cu_seqlens, parents)          travels where an attention mask does
    for span in spans_of(mask): ...

A batch is cut into segments. A segment without a parent is a sequence of its own. One with a parent goes on where the
parent ends: its tokens see all of the parent, of the parent's parent, and so on, as if these came before it. So a
prompt with which several sequences begin is there once; see `data.shared_prompts`.

Shapes: T tokens of all segments, S segments.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """A segment: tokens `start:end` of the batch, and the tokens of its ancestors, the first of them first."""

    start: int
    end: int
    before: tuple[slice, ...] = ()

    @property
    def num_before(self) -> int:
        """Tokens of the ancestors: the position of the segment's first token."""
        return sum(part.stop - part.start for part in self.before)

    @property
    def length(self) -> int:
        """Tokens that the segment's last token sees."""
        return self.num_before + self.end - self.start

    @property
    def own(self) -> slice:
        """The segment's tokens."""
        return slice(self.start, self.end)

    def seen(self, x: Tensor, dim: int) -> Tensor:
        """What the segment sees of `x`, which has T along `dim`: ancestors and own tokens in their order."""
        parts = [x.narrow(dim, part.start, part.stop - part.start) for part in (*self.before, self.own)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def packed_mask(cu_seqlens: Tensor, parents: Tensor | None = None) -> Tensor:
    """The borders of packed segments in the place of an attention mask; on the CPU, where they are read.

    Args:
        cu_seqlens: int32 [S + 1], 0 first and T last.
        parents: int32 [S], the segment that each one continues, an earlier one, or -1; None: none does.

    Returns:
        int32 [1, 1, 1, S + 1], or [1, 1, 2, S + 1] with the parents in the second row.
    """
    borders = cu_seqlens.to("cpu", torch.int32)
    if parents is None:
        return borders.view(1, 1, 1, -1)
    row = torch.nn.functional.pad(parents.to("cpu", torch.int32), (0, 1), value=-1)
    return torch.stack([borders, row])[None, None]


def spans_of(mask: Tensor) -> list[Span]:
    """The segments that a `packed_mask` tells of."""
    borders, *rest = mask[0, 0].tolist()
    return make_spans(borders, rest[0] if rest else None)


def make_spans(borders: Sequence[int], parents: Sequence[int] | None = None) -> list[Span]:
    """The same from the borders and the parents themselves."""
    spans: list[Span] = []
    for i, (start, end) in enumerate(itertools.pairwise(borders)):
        parent = -1 if parents is None else parents[i]
        assert parent < i
        before = (*spans[parent].before, spans[parent].own) if parent >= 0 else ()
        spans.append(Span(start, end, before))
    return spans
