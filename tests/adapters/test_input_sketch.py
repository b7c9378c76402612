"""The leading components from one pass in little memory, against the eigenvectors of all inputs' products."""

import pytest
import torch

from finerank.adapters.local_rules._components import InputSketch

CPU = torch.device("cpu")


def inputs(num: int, *, decay: float, features: int = 96) -> torch.Tensor:
    """Rows whose variances fall off as `decay` to the power of the component."""
    generator = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(features, features, generator=generator)).Q
    return torch.randn(num, features, generator=generator) * decay ** torch.arange(features) @ turn


@pytest.mark.parametrize(("decay", "share"), [(0.5, 1 - 1e-6), (0.9, 0.98), (0.98, 0.85)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captures_what_the_best_subspace_does(decay: float, share: float, dtype: torch.dtype):
    x = inputs(1500, decay=decay).to(dtype)
    sketch = InputSketch(8, 96, device=CPU)
    for piece in x.split(700):
        sketch.add(piece)
    a = sketch.components()
    torch.testing.assert_close(a @ a.T, torch.eye(8), rtol=0, atol=1e-5)
    best = torch.linalg.svdvals(x.double())[:8].square().sum()
    assert (x.double() @ a.T.double()).square().sum() >= share * best
    assert sketch.num_tokens == 1500


def test_with_as_many_components_as_half_the_features_it_is_exact():
    x = inputs(500, decay=0.9, features=16)
    sketch = InputSketch(8, 16, device=CPU)
    sketch.add(x)
    leading = torch.linalg.eigh(x.double().T @ x.double()).eigenvectors.flip(1)[:, :8].T.float()
    torch.testing.assert_close((sketch.components() * leading).sum(1).abs(), torch.ones(8), rtol=0, atol=1e-4)


def test_equal_inputs_give_equal_bits_and_sums_of_parts_the_same_subspace():
    """As for ranks that each see some of the tokens and add up their products."""
    x = inputs(600, decay=0.7)
    one, again, left, right = (InputSketch(4, 96, device=CPU) for _ in range(4))
    for sketch, piece in ((one, x), (again, x), (left, x[:200]), (right, x[200:])):
        sketch.add(piece)
    assert torch.equal(one.components(), again.components())
    left._product_LI += right._product_LI
    torch.testing.assert_close(left.components(), one.components(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e12])
def test_few_or_tiny_inputs_give_orthonormal_rows(scale: float):
    sketch = InputSketch(8, 96, device=CPU)
    sketch.add(scale * inputs(3, decay=0.9))
    a = sketch.components()
    torch.testing.assert_close(a @ a.T, torch.eye(8), rtol=0, atol=1e-5)
