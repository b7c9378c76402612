"""The local layers during a run: what they compute, what their rule is shown, and where the graph begins.

    local.begin_step(step)
    local.begin_micro_batch(0); ...forward and backward...; local.begin_micro_batch(1); ...
    optimizer.step(); local.apply_local_update(lr_factor=1.0)

`forward` only gathers what the rule needs; it never learns. Under a rule that asks for the error, the hidden state that
leaves layer K is where the graph begins: its gradient is the error, and what the rule makes of it is the gradient of
each `lora_B`. Under a rule that learns from a sample, the graph of a sampled micro-batch goes through the local layers
as through all others. Evaluation gathers nothing. Micro-batches may be computed side by side, each by a thread of its
own: what they give is added in their order.
"""

import itertools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finerank.adapters.local_rules._rule import LocalRule, Signal, Signals
from finerank.adapters.lora import LoRALinear
from finerank.adapters.low_rank import weight_OI
from finerank.errors import AdapterError


class _Gathering(threading.local):
    """What a thread has gathered of the micro-batch that it has in work."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.signals: list[tuple[LoRALinear, Signal]] = []
        self.is_sampled = False


class LocalLearning:
    """The local layers of one model during a run."""

    def __init__(
        self,
        rule: LocalRule,
        parameters: set[nn.Parameter],
        *,
        lr_a: float,
        lr_b: float,
        freeze_after: int | None,
        lr_decay_style: str | None = None,
        layers: Sequence[nn.Module] = (),
    ):
        """
        Args:
            rule: over the local linears.
            parameters: factors of all local layers.
            lr_a: peak learning rate of `lora_A`, for rules that apply it themselves.
            lr_b: the same of `lora_B`, in the last local layer.
            freeze_after: optimizer steps after which nothing local learns any more; None for never.
            lr_decay_style: shape of both rates, down to the step after which nothing learns; None: the run's.
            layers: decoder layers 0 to K.
        """
        self.lr_decay_style = lr_decay_style
        self.rule, self.parameters, self.freeze_after = rule, parameters, freeze_after
        self.lr_a, self.lr_b, self.layers = lr_a, lr_b, list(layers)
        self.is_learning, self._saw_training = False, False
        self._gathering, self._adding = _Gathering(), threading.Lock()

    @property
    def is_fixed(self) -> bool:
        """Whether layers 0 to K compute the same from this step to the end of the run."""
        return not (self.is_learning and self.rule.layers)

    def begin_step(self, step: int, *, sampled: Sequence[bool] = (), num_rows: Sequence[int] = ()) -> None:
        """Forget what an interrupted step gathered.

        Args:
            step: optimizer steps finished so far.
            sampled: which of the step's micro-batches are of the sample.
            num_rows: how many rows each has.
        """
        self.is_learning = self.freeze_after is None or step < self.freeze_after
        self._saw_training, self._gathering = False, _Gathering()
        self._waiting: dict[int, Signals] = {}
        self._num_added = 0
        self._sampled = sampled if self.is_learning and self.rule.learns_from_sample else ()
        in_sample = sum(num for num, is_sampled in zip(num_rows, sampled, strict=True) if is_sampled)
        self._sample_weight = sum(num_rows) / max(in_sample, 1)
        for parameter in self.parameters:
            parameter.grad = None
        self.rule.begin_step(step)

    def begin_micro_batch(self, number: int) -> None:
        """This thread's next forward pass is of the step's micro-batch of that number, from 0; else its turn counts."""
        now = self._gathering
        now.number, now.signals, now.is_sampled = number, [], number < len(self._sampled) and self._sampled[number]

    def apply_local_update(self, *, lr_factor: float) -> None:
        """Learn from what the step's micro-batches gathered.

        Args:
            lr_factor: the local schedule's share of the peak learning rate.

        Raises:
            AdapterError: the local layers were never run with gradients on, as under recomputation of all layers.
        """
        if self.is_learning and self.rule.layers:
            if not self._saw_training:
                raise AdapterError(
                    "LU-LoRA: no local layer saw a training pass in this step, as when all layers are recomputed; turn "
                    "recomputation off, or leave --lu-lora-final-layer-index away."
                )
            for _, signals in sorted(self._waiting.items()):  # behind one that gave nothing
                self.rule.add(signals)
            self.rule.update(lr_a=self.lr_a * lr_factor, lr_b=self.lr_b * lr_factor)

    def output(self, layer: LoRALinear, x: Tensor) -> Tensor:
        """A local linear's output; in training it is also shown to the rule. Dropout is not applied."""
        if self.rule.learns_from_sample:
            with torch.set_grad_enabled(self._gathering.is_sampled and torch.is_grad_enabled()):
                return layer.adapted(x)
        is_taught = self.is_learning and layer.training and torch.is_grad_enabled()
        with torch.no_grad():
            u = F.linear(x, (layer.lora_A * layer.scale).to(x.dtype))
            if is_taught:
                self._saw_training = True
                self._gathering.signals.append((layer, self.rule.gather(layer, x, u)))
            y = F.linear(x, weight_OI(layer.base_layer), layer.bias)
            y.flatten(0, -2).addmm_(u.flatten(0, -2), layer.lora_B.to(x.dtype).T)
            return y

    def at_boundary(self, module: nn.Module, _inputs: Any, output: Any) -> Any:
        """Forward hook of layer K: here the graph begins, where the rule needs the error; a sample's goes on."""
        if not (module.training and torch.is_grad_enabled()):
            return None
        now = self._gathering
        hidden: Tensor = output if isinstance(output, Tensor) else output[0]
        if now.is_sampled:
            now.is_sampled, self._saw_training = False, True
            weight = self._sample_weight
            hidden.register_hook(lambda error: error * weight)
            return None
        number, signals, now.number, now.signals = now.number, now.signals, None, []
        if not signals:
            return None
        if not self.rule.needs_error:
            self._add_in_order(number, signals)
            return None
        hidden = _Boundary.apply(hidden, self.rule, signals, *(layer.lora_B for layer, _ in signals))
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    def _add_in_order(self, number: int | None, signals: Signals) -> None:
        """Hand signals to the rule when those of all micro-batches before have been."""
        with self._adding:
            if number is None:
                self.rule.add(signals)
                return
            self._waiting[number] = signals
            while self._num_added in self._waiting:
                self.rule.add(self._waiting.pop(self._num_added))
                self._num_added += 1


class _Boundary(torch.autograd.Function):
    """Hands a hidden state on, and gives each `lora_B` what the rule makes of the error that comes back.

    So these gradients are found, kept apart and added as all others are, whoever runs the backward pass and when.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rule: LocalRule, signals: Signals, *lora_B: Tensor) -> Tensor:  # type: ignore[override]
        ctx.rule, ctx.layers = rule, [(layer, len(signal)) for layer, signal in signals]
        ctx.save_for_backward(*(tensor for _, signal in signals for tensor in signal))
        return hidden.detach()

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        tensors = iter(ctx.saved_tensors)
        signals = [(layer, tuple(itertools.islice(tensors, size))) for layer, size in ctx.layers]
        return None, None, None, *ctx.rule.gradients(error, signals)
