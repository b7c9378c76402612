"""LoRA: a low-rank change on a frozen linear, `y = W x + b + scale * B A x`, with `scale = alpha / r`.

    layer = LoRALinear(base, lora_A, lora_B, scale=alpha / r)
    layer(x); layer.delta_weight(); layer.merge_()

rsLoRA is the same with `scale = alpha / sqrt(r)`. The factors are fp32 parameters, whatever the base's precision.
Linears that read the same input are joined by `SharedInput`, which computes them all when the first one is called.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, section 4; rsLoRA: Kalajdzievski,
"A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023.

Shapes: I in_features, O out_features, R rank.
"""

import threading
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from finerank.adapters.dora import direction_norm
from finerank.adapters.low_rank import Member, adapted_linear, weight_OI
from finerank.errors import AdapterError


class Local(Protocol):
    """Runs a layer that learns without backpropagation; see `adapters.lu_lora`."""

    def output(self, layer: "LoRALinear", x: Tensor) -> Tensor: ...


class LoRALinear(nn.Module):
    """A frozen linear with an adapter on it; takes the linear's place in the model.

    Args:
        base_layer: `nn.Linear`, transformers' `Conv1D`, or a quantised linear with `dequantized_weight()`.
        lora_A: [R, I]; may be one parameter shared by several layers.
        lora_B: [O, R].
        scale: factor of `B A`.
        dropout: probability on the adapter's input, in training mode only.
    """

    def __init__(
        self, base_layer: nn.Module, lora_A: nn.Parameter, lora_B: nn.Parameter, *, scale: float, dropout: float = 0.0
    ):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A, self.lora_B = lora_A, lora_B
        self.scale, self.dropout = scale, dropout
        self.is_active = True
        self.shared_input: SharedInput | None = None
        self.local: Local | None = None
        self.lora_magnitude_vector: nn.Parameter | None = None
        """DoRA's magnitudes [O]; None for LoRA."""
        self.start_A: nn.Parameter | None = None
        self.start_B: nn.Parameter | None = None
        """Frozen factors that the adapter started from, where only the difference from them counts; see `factors`."""

    @property
    def weight(self) -> Tensor:
        """The base's weight; model code looks at its dtype and device."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        """I"""
        return self.lora_A.shape[1]

    @property
    def out_features(self) -> int:
        """O"""
        return self.lora_B.shape[0]

    @property
    def rank(self) -> int:
        """R"""
        return self.lora_A.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [R, I] and B [O, R] whose product is the adapter's change; with a start A0, B0, of twice the rank.

        `B A - B0 A0 = (B - B0) A + B0 (A - A0)`: written so, nothing large cancels, in no precision.
        """
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        a_RI = torch.cat([self.lora_A, self.lora_A - self.start_A])
        return a_RI, torch.cat([self.lora_B - self.start_B, self.start_B], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]"""
        if not self.is_active:
            return self.base_layer(x)
        return self.adapted(x) if self.local is None else self.local.output(self, x)

    def adapted(self, x: Tensor) -> Tensor:
        """The output with the adapter, backpropagated where gradients are on. [..., I] -> [..., O]"""
        if self.shared_input is not None:
            return self.shared_input.output(self, x)
        y = apply_lora([self], x)[0]
        return y if self.lora_magnitude_vector is None else self._with_magnitude(y)

    def _with_magnitude(self, y: Tensor) -> Tensor:
        """DoRA: `m / ||V|| * V x + b` from `V x + b`."""
        assert self.lora_magnitude_vector is not None
        rescale_O = (self.lora_magnitude_vector / direction_norm(self)).to(y.dtype)
        return y * rescale_O if self.bias is None else (y - self.bias) * rescale_O + self.bias

    def delta_weight(self) -> Tensor:
        """What the adapter adds to the base's weight, fp32 [O, I]: `scale * B A`, or all that DoRA changes."""
        a_RI, b_OR = (factor.detach().float() for factor in self.factors())
        change_OI = (b_OR @ a_RI).mul_(self.scale)
        if self.lora_magnitude_vector is None:
            return change_OI
        weight = weight_OI(self.base_layer).float()
        rescale_O = self.lora_magnitude_vector.detach().float() / direction_norm(self)
        return change_OI.add_(weight).mul_(rescale_O[:, None]).sub_(weight)

    @torch.no_grad()
    def merge_(self) -> None:
        """Add the change to the base's weight: fp32 arithmetic, one rounding. The adapter has no effect afterwards.

        Raises AdapterError for a quantised base, whose grid the sum does not lie on.
        """
        if hasattr(self.base_layer, "dequantized_weight"):
            raise AdapterError("An adapter cannot be merged into a quantised base; load the base unquantised to merge.")
        weight = weight_OI(self.base_layer)
        weight.copy_(weight.float().add_(self.delta_weight()))
        self.is_active = False

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"


def apply_lora(layers: Sequence[LoRALinear], x: Tensor) -> tuple[Tensor, ...]:
    """The outputs of layers that read the same input."""
    positions: dict[int, int] = {}
    distinct: list[Tensor] = []
    lora_B, members = [], []
    for layer in layers:
        a_RI, b_OR = layer.factors()
        position = positions.setdefault(id(layer.lora_A), len(distinct))
        if position == len(distinct):
            distinct.append(a_RI)
        lora_B.append(b_OR)
        members.append(Member(layer.base_layer, layer.scale, position))
    dropout = layers[0].dropout if layers[0].training else 0.0
    return adapted_linear(x, members, distinct, lora_B, dropout)


class SharedInput:
    """Layers that a model calls one after the other with the same input: the first call computes all of them.

    Whether the input is the same is checked at each call (the same tensor object, unchanged since), so a model that
    does otherwise gets right results: the group then falls apart into single layers. Threads that compute micro-batches
    side by side have outputs of their own here.
    """

    def __init__(self, layers: Sequence[LoRALinear]):
        self.layers = tuple(layers)
        self._ready: dict[int, tuple[Tensor, int, dict[int, Tensor]]] = {}  # by thread; input, its version, outputs
        for layer in layers:
            layer.shared_input = self

    def output(self, layer: LoRALinear, x: Tensor) -> Tensor:
        """The output of one of the layers for `x`."""
        if layer is self.layers[0]:
            outputs = apply_lora(self.layers, x)
            rest = {id(other): y for other, y in zip(self.layers[1:], outputs[1:], strict=True)}
            self._ready[threading.get_ident()] = (x, x._version, rest)
            return outputs[0]
        ready = self._ready.get(threading.get_ident())
        if ready is None or ready[0] is not x or ready[1] != x._version or id(layer) not in ready[2]:
            self.dissolve()
            return layer(x)
        y = ready[2].pop(id(layer))
        if not ready[2]:
            del self._ready[threading.get_ident()]  # let go of the input
        return y

    def dissolve(self) -> None:
        """Make the layers compute alone from now on."""
        self._ready.clear()
        for layer in self.layers:
            layer.shared_input = None
