"""Tensors that are cheaper to compute again than to keep until backward.

    y = with_recipe(y, Recipe((x, rstd), lambda x, rstd: ...))
    recipe = recipe_of(y)            # where an operation would save y: save recipe.kept; recipe.make(*kept) is y again

A normalised hidden state and the product in a gated MLP are inputs of adapted linears, whose backward pass needs them
for `dA`. What they are made from is kept anyway, for their own backward pass. So they carry a recipe, and
`adapters.low_rank` keeps that instead of the tensor: for a Llama-shaped layer this halves what is kept.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Recipe(NamedTuple):
    """How to get a tensor again, bit for bit."""

    kept: tuple[Tensor, ...]
    """Detached tensors that are alive until backward anyway."""
    make: Callable[..., Tensor]
    """Called with what was kept; returns [rows, features]."""


_ATTRIBUTE = "_finerank_recipe"


def with_recipe(y: Tensor, recipe: Recipe) -> Tensor:
    """The same tensor, which now says how to get it again. It belongs to the object: an operation's result has none."""
    setattr(y, _ATTRIBUTE, (y._version, recipe))
    return y


def recipe_of(y: Tensor) -> Recipe | None:
    """A tensor's recipe; None where it has none, or was changed in place since."""
    version, recipe = getattr(y, _ATTRIBUTE, (None, None))
    return recipe if version == y._version else None
