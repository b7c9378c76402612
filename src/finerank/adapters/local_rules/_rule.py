"""What every local rule owes.

Within an optimizer step `gather` is called by each local linear of each micro-batch, `receive` once for each
micro-batch on its way back (where the rule asks for the error), and `update` once at the end. Everything in between is
kept as sums that are linear in the data, so that data-parallel ranks can average them.

Shapes: B rows, T tokens, N = B * T, I in_features, O out_features, R rank, D hidden size.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from finerank.adapters.initial import Pass
from finerank.adapters.lora import LoRALinear


class LocalRule(ABC):
    """A rule over the linears of the local layers."""

    needs_error: ClassVar[bool] = False
    """Whether `receive` wants the gradient of the hidden state above the local layers."""
    learns_by_optimizer: ClassVar[bool] = False
    """Whether `lora_B` gets a gradient from the rule, and the run's optimizer applies it; else the rule applies it."""
    only_into_residual: ClassVar[bool] = False
    """Whether only linears that write into the residual stream can learn (o_proj, down_proj)."""
    default_ratio: ClassVar[float] = 24.0
    """Learning rate of `lora_B` over that of `lora_A`."""
    decay_by_depth: ClassVar[float] = 0.0
    """The optimizer's learning rate d layers below the last local one is multiplied by `exp(-decay_by_depth * d)`."""
    default_rank: ClassVar[int | None] = None
    """Rank of the local adapters where none is given, as far as a linear has so many features; None: as the others."""
    start_std: ClassVar[float] = 0.0
    """Standard deviation of a fresh `lora_B`; rules without an error cannot leave zero."""

    def __init__(self, layers: Iterable[LoRALinear]):
        self.layers = list(layers)

    def start(self, passes: Iterator[Pass]) -> None:  # noqa: B027 (optional)
        """Let fresh factors start from the run's first rows. `passes` has no end; each ends above the local layers."""

    @abstractmethod
    def begin_step(self, step: int) -> None:
        """Forget what was gathered; `step` counts the finished optimizer steps."""

    @abstractmethod
    def gather(self, layer: LoRALinear, x_BTI: Tensor, u_BTR: Tensor) -> None:
        """One linear's input and `u = scale * A x`, with this step's factors."""

    def take_signals(self) -> dict[LoRALinear, Tensor]:
        """What `receive` will need of the micro-batch that was just gathered; the rule lets go of it."""
        return {}

    def receive(self, error_BTD: Tensor, signals: Mapping[LoRALinear, Tensor]) -> None:  # noqa: B027 (optional)
        """Gradient of the step's loss with respect to the hidden state above the local layers."""

    @abstractmethod
    def update(self, *, lr_a: float, lr_b: float) -> None:
        """Apply what was gathered."""


class HebbianRule(LocalRule):
    """A rule of each factor's own input and output: `M += sign * lr * mean(delta(x, y, M))`."""

    sign: ClassVar[float]

    def begin_step(self, step: int) -> None:
        """Start new sums."""
        self.sums: dict[nn.Parameter, Tensor] = {}
        self.weights: dict[nn.Parameter, float] = {}

    def add(self, factor: nn.Parameter, x: Tensor, y: Tensor, *, delta: Callable[..., Tensor], weight: float) -> None:
        """Add one weighted delta to a factor's sum (fp32)."""
        change = delta(x.to(factor.dtype), y.to(factor.dtype), factor.detach())
        if factor in self.sums:
            self.sums[factor].add_(change, alpha=weight)
            self.weights[factor] += weight
        else:
            self.sums[factor], self.weights[factor] = change.mul_(weight), weight

    @torch.no_grad()
    def update(self, *, lr_a: float, lr_b: float) -> None:
        """Move each factor by the mean of its deltas."""
        rates = {layer.lora_B: lr_b for layer in self.layers} | {layer.lora_A: lr_a for layer in self.layers}
        for factor, total in self.sums.items():
            factor.add_(total, alpha=self.sign * rates[factor] / self.weights[factor])
