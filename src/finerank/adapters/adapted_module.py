"""What finerank puts on a module other than a low-rank change of a linear: the common side of it.

    SavedModule      a full trained copy                        adapters/saved_modules.py
    LoRAEmbedding    a low-rank change of an embedding          adapters/embedding.py
    TrainedRows      some rows of an embedding or of a head     adapters/new_tokens.py
    LoRAExperts      low-rank changes of fused experts          adapters/experts.py

Each takes the place of the module in the model, keeps it as `base_layer`, and knows its tensors' names in PEFT's file.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class AdaptedModule(nn.Module, ABC):
    """A frozen module with something trained on it. While `is_active` is False it is the base module."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.is_active = True

    def __getattr__(self, name: str) -> Any:
        """What model code looks up on the module that stood here, e.g. `embedding_dim`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)

    @abstractmethod
    def trained(self) -> dict[str, nn.Parameter]:
        """Trained parameters by their names in the adapter file, after the module's own name."""

    def file_tensors(self) -> dict[str, Tensor]:
        """Tensors of the adapter file by the same names."""
        return {name: parameter.detach() for name, parameter in self.trained().items()}

    @torch.no_grad()
    def load_(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the values of a file's tensors, by the names of `trained`."""
        for name, parameter in self.trained().items():
            if name in tensors:
                parameter.copy_(tensors[name])

    @abstractmethod
    def merge_(self) -> None:
        """Put what was trained into the base's weights: fp32 arithmetic, one rounding."""
