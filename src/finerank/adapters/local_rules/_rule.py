"""What every local rule owes.

Within an optimizer step `gather` is called by each local linear of each micro-batch, also by several threads at the
same time, and only returns what it finds. What a micro-batch gave comes back whole: to `gradients`, with the error, on
its way back (where the rule asks for the error), else to `add`, in the order of the micro-batches. `update` comes once
at the end. Everything in between is kept as sums that are linear in the data, so that data-parallel ranks can average
them.

Shapes: B rows, T tokens, N = B * T, I in_features, O out_features, R rank, D hidden size.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from finerank.adapters.initial import Pass
from finerank.adapters.lora import LoRALinear

Signal = tuple[Tensor, ...]
"""What one linear gives of one micro-batch."""
Signals = Sequence[tuple[LoRALinear, Signal]]
"""What all local linears give of one micro-batch, in the order of the forward pass."""


class LocalRule:
    """A rule over the linears of the local layers."""

    needs_error: ClassVar[bool] = False
    """Whether `gradients` is asked, with the gradient of the hidden state above the local layers; else `add`."""
    learns_by_optimizer: ClassVar[bool] = False
    """Whether `lora_B` gets a gradient from the rule, and the run's optimizer applies it; else the rule applies it."""
    learns_from_sample: ClassVar[bool] = False
    """Whether a sample of the step's rows is backpropagated through local layers; both factors then get gradients."""
    only_into_residual: ClassVar[bool] = False
    """Whether only linears that write into the residual stream can learn (o_proj, down_proj)."""
    default_ratio: ClassVar[float] = 24.0
    """Learning rate of `lora_B` over that of `lora_A`."""
    default_lr_share: ClassVar[float] = 1.0
    """Learning rate of `lora_A` over the run's, where the optimizer applies it and none is given."""
    default_decay_style: ClassVar[str | None] = None
    """Shape of the learning rates (`--lr-decay-style`) where none is given; None: the run's."""
    decay_by_depth: ClassVar[float] = 0.0
    """The optimizer's learning rate d layers below the last local one is multiplied by `exp(-decay_by_depth * d)`."""
    default_rank: ClassVar[int | None] = None
    """Rank of the local adapters where none is given, as far as a linear has so many features; None: as the others."""
    start_std: ClassVar[float] = 0.0
    """Standard deviation of a fresh `lora_B`; rules without an error cannot leave zero."""

    def __init__(self, layers: Iterable[LoRALinear]):
        self.layers = list(layers)

    def start(self, passes: Iterator[Pass]) -> None:
        """Let fresh factors start from the run's first rows. `passes` has no end; each ends above the local layers."""

    def begin_step(self, step: int) -> None:
        """Forget what was added; `step` counts the finished optimizer steps. Gradients are gone already."""

    def gather(self, layer: LoRALinear, x_BTI: Tensor, u_BTR: Tensor) -> Signal:
        """Of one linear's input and `u = scale * A x`, with this step's factors, what the rule needs."""
        raise AssertionError("this rule gathers nothing")

    def add(self, signals: Signals) -> None:
        """What one micro-batch gave; called for one after the other."""
        raise AssertionError("this rule learns from the error")

    def gradients(self, error_BTD: Tensor, signals: Signals) -> list[Tensor]:
        """Of the `lora_B` of each signal's linear, in their order.

        Args:
            error_BTD: gradient of the step's loss with respect to the hidden state above the local layers.
            signals: of the same micro-batch.
        """
        raise AssertionError("this rule asks for no error")

    def update(self, *, lr_a: float, lr_b: float) -> None:
        """Apply what was added; gradients are the optimizer's to apply."""


class HebbianRule(LocalRule):
    """A rule of each factor's own input and output: `M += sign * lr * mean(delta(x, y, M))`."""

    sign: ClassVar[float]

    def begin_step(self, step: int) -> None:
        """Start new sums."""
        self.sums: dict[nn.Parameter, Tensor] = {}
        self.weights: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def add(self, signals: Signals) -> None:
        """Add each linear's weighted deltas of its A and B, and their weight (fp32)."""
        for layer, (delta_A, delta_B, weight) in signals:
            for factor, delta in ((layer.lora_A, delta_A), (layer.lora_B, delta_B)):
                self.sums[factor] = self.sums[factor].add_(delta) if factor in self.sums else delta
                self.weights[factor] = self.weights.get(factor, 0.0) + weight

    @torch.no_grad()
    def update(self, *, lr_a: float, lr_b: float) -> None:
        """Move each factor by the mean of its deltas."""
        rates = {layer.lora_B: lr_b for layer in self.layers} | {layer.lora_A: lr_a for layer in self.layers}
        for factor, total in self.sums.items():
            factor.add_(total, alpha=self.sign * rates[factor] / self.weights[factor].item())


def weighted_signal(delta_A: Tensor, delta_B: Tensor, *, weight: float) -> Signal:
    """What Hebbian rules gather: `add` takes the mean over what was gathered, weighted so."""
    return delta_A.mul_(weight), delta_B.mul_(weight), torch.tensor(weight, dtype=torch.float64)
