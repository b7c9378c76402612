"""Random numbers of fresh factors: a function of the run's seed and of the layer's name, and of nothing else."""

import hashlib

import torch


def named_generator(seed: int, name: str) -> torch.Generator:
    """A generator that depends neither on the order of layers nor on which other layers have an adapter."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
