"""PiSSA: the adapter starts as the leading singular components of the weight, and trains those.

    W = U S V^T     A0 = sqrt(S_r / scale) V_r^T     B0 = U_r sqrt(S_r / scale)     change: scale * (B A - B0 A0)

`pissa` takes the full SVD, `pissa_niter_N` a randomised one with N subspace iterations (N = 16: seconds for a model of
7 billion weights, by the authors), drawn from the run's seed. Linears that share a lora_A are decomposed together.

Source: Meng, Wang and Zhang, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language
Models", 2024; `peft.tuners.lora.layer.LoraLayer.pissa_init`. Fast SVD: Halko, Martinsson and Tropp, 2009.
"""

import torch
from torch import Tensor

from finerank.adapters.adapter_set import AdapterSet
from finerank.adapters.initial import Options
from finerank.adapters.initial._factors import by_lora_A, seeded, set_start, stacked_weight

OVERSAMPLING = 8
"""Further columns of the fast SVD, dropped at the end; with none, as in PEFT, the last components are inexact."""


@torch.no_grad()
def start(adapters: AdapterSet, options: Options) -> None:
    """Set A0 and B0. Raises AdapterError for a rank above that of a weight."""
    for layers in by_lora_A(adapters):
        weight_OI = stacked_weight(layers)
        rank, scale = layers[0][1].rank, layers[0][1].scale
        u_OR, s_R, v_RI = _leading(weight_OI, rank, options)
        root_R = (s_R / scale).sqrt()
        set_start(layers, root_R[:, None] * v_RI, u_OR * root_R)


def _leading(weight_OI: Tensor, rank: int, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    if options.num_iterations is None:
        u, s, vh = torch.linalg.svd(weight_OI, full_matrices=False)
    else:
        columns = min(rank + OVERSAMPLING, *weight_OI.shape)
        with seeded(options.seed, weight_OI.device):
            u, s, v = torch.svd_lowrank(weight_OI, q=columns, niter=options.num_iterations)
        vh = v.T
    return u[:, :rank], s[:rank], vh[:rank]
