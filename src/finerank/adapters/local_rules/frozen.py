"""The control of every comparison: the lower layers are frozen, without adapters, and nothing flows into them."""

from torch import Tensor

from finerank.adapters.local_rules._rule import LocalRule, Signal
from finerank.adapters.lora import LoRALinear


class RULE(LocalRule):
    """No linear is local, so there is nothing to gather."""

    def begin_step(self, step: int) -> None:
        """Nothing was gathered."""

    def gather(self, layer: LoRALinear, x_BTI: Tensor, u_BTR: Tensor) -> Signal:
        """Not reached: no linear is local."""
        raise AssertionError("a frozen layer has an adapter")

    def update(self, *, lr_a: float, lr_b: float) -> None:
        """Nothing learns."""
