"""Incremental PCA: the leading components of rows that come batch by batch, in the memory of the components.

    pca = InputComponents(32, seed=1, min_cosine=0.99)
    pca.add(x_NI); pca.components_CI; pca.variance_share_C

Each batch is put below the components so far (times their singular values) and a row that corrects for the moved mean;
the leading right singular vectors of all that are the new components.

Source: Ross et al., "Incremental Learning for Robust Visual Tracking", 2008; `peft.utils.incremental_pca`, which this
equals batch by batch. Shapes: N rows of a batch, I in_features, C components.
"""

import torch
from torch import Tensor

from finerank.adapters.initial._factors import seeded

_NUM_ITERATIONS = 4


class InputComponents:
    """The components of one layer's inputs."""

    def __init__(self, num_components: int, *, seed: int, min_cosine: float):
        """`min_cosine`: between a component before and after a batch, for it to have settled."""
        self.num_components, self.seed, self.min_cosine = num_components, seed, min_cosine
        self.components_CI: Tensor | None = None
        """Orthonormal rows, the leading one first, each with its largest entry positive."""
        self.variance_share_C = torch.empty(0)
        """Share of the inputs' whole variance that each component explains."""
        self._singular_C = torch.empty(0)
        self._settled_C = torch.zeros(num_components, dtype=torch.bool)
        self._waiting: list[Tensor] = []

    def has_settled(self, num: int) -> bool:
        """Whether the first `num` components moved little with the last batch."""
        return bool(self._settled_C[:num].all())

    def add(self, x_NI: Tensor) -> None:
        """Look at further rows; fewer than there are components wait for the next ones."""
        self._waiting.append(x_NI.float())
        if sum(len(x) for x in self._waiting) >= self.num_components:
            self._update(torch.cat(self._waiting))
            self._waiting = []

    def _update(self, x_NI: Tensor) -> None:
        N, total_I = len(x_NI), x_NI.sum(0, dtype=torch.float64)
        mean_I = total_I / N
        # sum of squared distances from the batch's mean, corrected for the rounding of the differences
        centred_NI = x_NI - mean_I
        squares_I = centred_NI.square().sum(0) - centred_NI.sum(0).square() / N
        before = self.components_CI
        if before is None:
            self._count, self._mean_I, self._squares_I = N, mean_I, squares_I
            rows = (x_NI - mean_I).float()
        else:
            count = self._count + N
            distance_I = self._mean_I - mean_I
            correction_I = (self._count / count * N) ** 0.5 * distance_I
            # fp64 from the correction on, as in PEFT, so that the random numbers of the fast SVD are the same
            rows = torch.cat([self._singular_C[:, None] * before, x_NI - x_NI.mean(0), correction_I[None]])
            self._squares_I = self._squares_I + squares_I + self._count * N / count * distance_I.square()
            self._mean_I = (self._mean_I * self._count + total_I) / count
            self._count = count
        singular, vectors = self._leading(rows)
        self.variance_share_C = singular.double().square() / self._squares_I.sum()
        self.components_CI, self._singular_C = vectors, singular
        if before is not None:
            self._settled_C = (torch.cosine_similarity(vectors, before) >= self.min_cosine).cpu()

    def _leading(self, rows_MI: Tensor) -> tuple[Tensor, Tensor]:
        columns = min(2 * self.num_components, *rows_MI.shape)
        with seeded(self.seed, rows_MI.device):
            _, s, v = torch.svd_lowrank(rows_MI, q=columns, niter=_NUM_ITERATIONS)
        vectors = v.T
        largest = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
        vectors = vectors * torch.where(largest < 0, -1.0, 1.0)
        return s[: self.num_components], vectors[: self.num_components].contiguous()
