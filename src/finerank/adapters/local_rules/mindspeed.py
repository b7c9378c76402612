"""MindSpeed-LLM's local rule, as its `--lu-lora-final-layer-index` trains (v2.3.0 to master).

For a factor M [o, i] with input X and output Y, rows first averaged over the batch (bars), positions then summed:

    H = Ybar^T Xbar          D = H - diag(mean(Y^2)) M          each column of D scaled to length 1
    M <- M - lr * mean of D over the micro-batches

It looks like Oja's rule but is none: the bracket is subtracted, so M moves away from what its inputs have in common,
and every column moves by `lr` however small the signal. No error enters it; measured, it is worth no more than leaving
the layers frozen. It is here so that runs can be compared. `lora_A` sees `scale * A x` as its output.

Held against traces of the original program to 1e-6. Left out on purpose: its tensor-parallel sum, which adds up shards
of different rows, and rank-by-rank drift under data parallelism. Our masters are fp32; the original rounds to bf16,
where an update of 1.25e-6 is almost always lost.
"""

from torch import Tensor
from torch.nn import functional as F

from finerank.adapters.local_rules._rule import HebbianRule, Signal, weighted_signal
from finerank.adapters.lora import LoRALinear


class RULE(HebbianRule):
    """See the module's docstring."""

    sign = -1.0
    start_std = 1e-4

    def gather(self, layer: LoRALinear, x_BTI: Tensor, u_BTR: Tensor) -> Signal:
        """Both factors see their input and output; each micro-batch counts the same."""
        x, u, y = (t.to(layer.lora_A.dtype) for t in (x_BTI, u_BTR, F.linear(u_BTR, layer.lora_B.to(u_BTR.dtype))))
        delta_A, delta_B = mindspeed_delta(x, u, layer.lora_A), mindspeed_delta(u, y, layer.lora_B)
        return weighted_signal(delta_A, delta_B, weight=1.0)


def mindspeed_delta(x_BTI: Tensor, y_BTO: Tensor, m_OI: Tensor) -> Tensor:
    """The column-normalised bracket D [O, I], to be subtracted; computed in the precision of its arguments.

    Packed rows count as one row of the batch.
    """
    hebb_OI = y_BTO.mean(0).T @ x_BTI.mean(0)
    power_O = y_BTO.square().mean((0, 1))
    delta_OI = hebb_OI - power_O[:, None] * m_OI
    return delta_OI / delta_OI.norm(dim=0, keepdim=True).clamp_min(1e-12)
