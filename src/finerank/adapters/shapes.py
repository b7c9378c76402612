"""Rank and scale of each layer, as an adapter's config gives them.

shape_of({"r": 16, "lora_alpha": 32, "rank_pattern": {"down_proj": 8}}, "model.layers.0.mlp.down_proj")
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finerank.errors import AdapterError


@dataclass(frozen=True)
class Shape:
    """Rank and scale of one layer's adapter."""

    rank: int
    scale: float


def shape_of(config: Mapping[str, Any], name: str) -> Shape:
    """Rank and scale that a config gives to a layer. Raises AdapterError when it gives no usable ones."""
    rank = by_pattern(config.get("rank_pattern"), name, config.get("r"))
    alpha = by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha"))
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise AdapterError(f"The adapter's config gives {name} the rank {rank!r}; it must be a whole number above 0.")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise AdapterError(f"The adapter's config gives {name} the lora_alpha {alpha!r}; it must be a finite number.")
    return Shape(rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value of the first pattern that matches a module's name or its last parts, as PEFT's `get_pattern_key`."""
    for pattern, value in (patterns or {}).items():
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", name)
        except re.error as error:
            raise AdapterError(f"The adapter's pattern {pattern!r} is no regular expression: {error}.") from error
        if matches:
            return value
    return default
