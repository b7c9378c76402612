"""Oja's rule, `M += lr * (mean(y x^T) - diag(mean(y^2)) M)`, with `y = M x`, means over all tokens of the step.

Source: Oja, "Simplified neuron model as a principal component analyzer", 1982, one independent unit for each row.
A row converges to the leading component of its inputs. No error enters it: a baseline for the study of rules.
"""

from torch import Tensor
from torch.nn import functional as F

from finerank.adapters.local_rules._rule import HebbianRule, Signal, weighted_signal
from finerank.adapters.lora import LoRALinear


class RULE(HebbianRule):
    """See the module's docstring."""

    sign = 1.0
    start_std = 1e-4

    def gather(self, layer: LoRALinear, x_BTI: Tensor, u_BTR: Tensor) -> Signal:
        """Both factors see their input and output; each token counts the same."""
        x, u, y = (t.to(layer.lora_A.dtype) for t in (x_BTI, u_BTR, F.linear(u_BTR, layer.lora_B.to(u_BTR.dtype))))
        delta_A, delta_B = oja_delta(x, u / layer.scale, layer.lora_A), oja_delta(u, y, layer.lora_B)
        return weighted_signal(delta_A, delta_B, weight=float(x_BTI.shape[:-1].numel()))


def oja_delta(x_BTI: Tensor, y_BTO: Tensor, m_OI: Tensor) -> Tensor:
    """The bracket [O, I], to be added."""
    x_NI, y_NO = x_BTI.flatten(0, -2), y_BTO.flatten(0, -2)
    return y_NO.T @ x_NI / x_NI.shape[0] - y_NO.square().mean(0)[:, None] * m_OI
