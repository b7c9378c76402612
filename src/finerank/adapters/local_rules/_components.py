"""The leading components of what a linear reads, in one pass over the data and in little memory.

    sketch = InputSketch(num_components=64, in_features=1536, device=x.device)
    sketch.add(x_NI)                                # as often as there is data
    sketch.components()                             # [64, I], orthonormal rows, the leading one first

The products of all inputs, `C = sum x x^T` [I, I], would be 9 MB for each `down_proj` of a model of 135 M parameters
and 0.8 GB for one of 8 B. Kept instead is `W C` for a random orthonormal W of twice as many rows as components
(Nystroem's method): as large as two factors of an adapter. It is a sum over tokens, so that data-parallel ranks can add
theirs up. W depends on the shape alone, so equal inputs give equal components on every device, up to rounding.

Source: Tropp, Yurtsever, Udell and Cevher, "Fixed-Rank Approximation of a Positive-Semidefinite Matrix from Streaming
Data", 2017, algorithm 3. Shapes: N tokens, I in_features, L rows of W, R components.
"""

import torch
from torch import Tensor

_OVERSAMPLING = 2
_ROUNDING = 1e-5
"""Of the largest eigenvalue: what lies below it is the rounding of fp32 sums."""
_TOKENS_AT_ONCE = 512
"""Rows turned into fp32 at a time."""


class InputSketch:
    """`W C` of one linear's inputs."""

    def __init__(self, num_components: int, in_features: int, *, device: torch.device):
        """`num_components`: at most `in_features`."""
        self.num_components, self.num_tokens = num_components, 0
        generator = torch.Generator().manual_seed(in_features)
        rows = min(_OVERSAMPLING * num_components, in_features)
        random_IL = torch.randn(in_features, rows, generator=generator)
        self._w_LI = torch.linalg.qr(random_IL).Q.T.contiguous().to(device)
        self._product_LI = torch.zeros_like(self._w_LI)

    def add(self, x_NI: Tensor) -> None:
        """Look at further inputs."""
        self.num_tokens += len(x_NI)
        for piece in x_NI.detach().split(_TOKENS_AT_ONCE):
            x = piece.float()
            self._product_LI.addmm_((x @ self._w_LI.T).T, x)

    def components(self) -> Tensor:
        """The leading eigenvectors of C as rows, fp32 [R, I]; the largest entry of each is positive.

        Inputs that span fewer dimensions than there are components give arbitrary further rows, orthonormal too.
        """
        w_LI, product_LI = self._w_LI.cpu().double(), self._product_LI.cpu().double()
        core_LL = product_LI @ w_LI.T
        values_L, vectors_LL = torch.linalg.eigh((core_LL + core_LL.T) / 2)
        kept_L = values_L > _ROUNDING * values_L[-1].clamp_min(0)
        half_LI = (vectors_LL[:, kept_L] / values_L[kept_L].sqrt()).T @ product_LI
        leading = torch.linalg.svd(half_LI, full_matrices=False).Vh[: self.num_components]
        # what is left of W's rows beside them, where they are too few
        components_RI = torch.linalg.qr(torch.cat([leading, w_LI]).T).Q.T[: self.num_components]
        largest = components_RI.gather(1, components_RI.abs().argmax(1, keepdim=True))
        return (components_RI * largest.sign()).float().to(self._w_LI.device)
