"""Megatron's packing written the slow, obvious way, row by row from the formulas; the tests' oracle.

Row of query head j = g * q + t, channel c: (g * (q + 2) + t) * d + c; of key g: (g * (q + 2) + q) * d + c; of value g:
(g * (q + 2) + q + 1) * d + c.
"""

import torch
from torch import Tensor


def pack_qkv(q: Tensor, k: Tensor, v: Tensor, *, heads: int, groups: int, d: int) -> Tensor:
    per_group = heads // groups
    packed = torch.zeros((heads + 2 * groups) * d, *q.shape[1:], dtype=q.dtype)
    for g in range(groups):
        for c in range(d):
            for t in range(per_group):
                packed[(g * (per_group + 2) + t) * d + c] = q[(g * per_group + t) * d + c]
            packed[(g * (per_group + 2) + per_group) * d + c] = k[g * d + c]
            packed[(g * (per_group + 2) + per_group + 1) * d + c] = v[g * d + c]
    return packed


def fc1_of_rank(gate: Tensor, up: Tensor, *, tp: int, rank: int) -> Tensor:
    share = gate.shape[0] // tp
    rows = [gate[rank * share + i] for i in range(share)] + [up[rank * share + i] for i in range(share)]
    return torch.stack(rows)


def rows_of_rank(tensor: Tensor, *, tp: int, rank: int) -> Tensor:
    share = tensor.shape[0] // tp
    return tensor[rank * share : (rank + 1) * share]


def columns_of_rank(tensor: Tensor, *, tp: int, rank: int) -> Tensor:
    share = tensor.shape[1] // tp
    return tensor[:, rank * share : (rank + 1) * share]
