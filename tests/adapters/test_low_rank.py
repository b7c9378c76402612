"""The adapted linear against numeric derivatives in fp64 and against the formula written with autograd."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from finerank.adapters.low_rank import Member, adapted_linear


def linear(outputs: int, *, bias: bool = True, inputs: int = 6) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64).requires_grad_(False)


def factor(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def calls():
    """Members, factors: one linear; three with own A; three that share one; mixed ranks."""
    yield "one", [Member(linear(5), 2.0, 0)], [factor(3, 6)], [factor(5, 3)]
    three = [linear(5), linear(4, bias=False), linear(4)]
    own = [Member(base, 0.5 + i, i) for i, base in enumerate(three)]
    yield "own", own, [factor(3, 6), factor(2, 6), factor(4, 6)], [factor(5, 3), factor(4, 2), factor(4, 4)]
    yield "shared", [Member(base, 0.7, 0) for base in three], [factor(3, 6)], [factor(5, 3), factor(4, 3), factor(4, 3)]


@pytest.mark.parametrize("call", calls(), ids=lambda c: c[0])
@pytest.mark.parametrize("input_grad", [True, False])
def test_gradients_equal_numeric_ones(call, input_grad):
    _, members, lora_A, lora_B = call
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=input_grad)

    def function(x, *factors):
        return adapted_linear(x, members, factors[: len(lora_A)], factors[len(lora_A) :])

    assert torch.autograd.gradcheck(function, (x, *lora_A, *lora_B))


@pytest.mark.parametrize("call", calls(), ids=lambda c: c[0])
def test_gradients_with_dropout_equal_numeric_ones(call):
    _, members, lora_A, lora_B = call

    def function(x, *factors):
        torch.manual_seed(3)  # the same mask at every evaluation
        return adapted_linear(x, members, factors[: len(lora_A)], factors[len(lora_A) :], dropout=0.4)

    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, *lora_A, *lora_B))


def test_output_is_the_formula():
    base, a, b = linear(5), factor(3, 6), factor(5, 3)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    (y,) = adapted_linear(x, [Member(base, 1.5, 0)], [a], [b])
    torch.testing.assert_close(y, base(x) + 1.5 * x @ a.T @ b.T, rtol=1e-14, atol=1e-14)


def test_unused_outputs_give_no_gradient():
    members = [Member(linear(5), 1.0, 0), Member(linear(4), 1.0, 1)]
    lora_A, lora_B = [factor(3, 6), factor(3, 6)], [factor(5, 3), factor(4, 3)]
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    _, second = adapted_linear(x, members, lora_A, lora_B)
    dx, da0, da1, db0, db1 = torch.autograd.grad(second.sum(), (x, *lora_A, *lora_B), allow_unused=True)
    assert db0 is None and not da0.any()
    assert dx.any() and da1.any() and db1.any()


def test_conv1d_is_a_linear_with_a_transposed_weight():
    base = Conv1D(5, 6).double().requires_grad_(False)
    nn.init.normal_(base.weight)
    a, b = factor(3, 6), factor(5, 3)
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)

    def function(x, a, b):
        return adapted_linear(x, [Member(base, 2.0, 0)], [a], [b])

    torch.testing.assert_close(function(x, a, b)[0], base(x) + 2.0 * x @ a.T @ b.T, rtol=1e-14, atol=1e-14)
    assert torch.autograd.gradcheck(function, (x, a, b))


def test_a_quantised_base_is_asked_for_its_weight():
    class Quantised(nn.Module):
        bias = None

        def __init__(self):
            super().__init__()
            self.codes, self.num_asked = torch.arange(-15, 15).view(5, 6), 0

        def dequantized_weight(self):
            self.num_asked += 1
            return self.codes.double() * 0.1

    base, a, b = Quantised(), factor(3, 6), factor(5, 3)
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    (y,) = adapted_linear(x, [Member(base, 1.0, 0)], [a], [b])
    y.sum().backward()
    assert base.num_asked == 2  # made again for backward instead of kept
    torch.testing.assert_close(x.grad, torch.ones(7, 5).double() @ (base.dequantized_weight() + b @ a).detach())


def test_keeps_only_the_input_and_the_small_products():
    members = [Member(linear(50, inputs=40).float(), 1.0, i) for i in range(3)]
    lora_A = [torch.randn(2, 40, requires_grad=True) for _ in range(3)]
    lora_B = [torch.randn(50, 2, requires_grad=True) for _ in range(3)]
    kept = []
    x = torch.randn(100, 40, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adapted_linear(x, members, lora_A, lora_B)
    activations = {t.untyped_storage().data_ptr(): t.numel() for t in kept if t.shape[0] == 100}
    assert sorted(activations.values()) == [100 * 6, 100 * 40]  # h and the input itself


def test_dropout_keeps_the_expected_output():
    base, a, b = linear(5), factor(3, 6), factor(5, 3)
    x = torch.randn(1, 6, dtype=torch.float64).expand(40000, 6).contiguous()
    (y,) = adapted_linear(x, [Member(base, 1.0, 0)], [a], [b], dropout=0.3)
    delta = (x[:1] @ a.T @ b.T).squeeze()
    torch.testing.assert_close((y - base(x)).mean(0), delta, rtol=0.05, atol=0.05)
    assert (y - base(x)).std(0).min() > 0.1


def test_bf16_over_fp32_factors_stays_near_the_exact_result():
    torch.manual_seed(1)
    base = nn.Linear(256, 192, dtype=torch.bfloat16).requires_grad_(False)
    a = torch.randn(16, 256).mul_(0.06).requires_grad_()
    b = torch.randn(192, 16).mul_(0.06).requires_grad_()
    x = torch.randn(64, 256).bfloat16().requires_grad_()
    (y,) = adapted_linear(x, [Member(base, 2.0, 0)], [a], [b])
    dy = torch.randn(64, 192).bfloat16()
    got = torch.autograd.grad(y, (x, a, b), dy)
    assert [g.dtype for g in got] == [torch.bfloat16, torch.float32, torch.float32]
    x64, a64, b64 = (t.detach().double().requires_grad_() for t in (x, a, b))
    y64 = F.linear(x64, base.weight.double(), base.bias.double()) + 2.0 * x64 @ a64.T @ b64.T
    want = torch.autograd.grad(y64, (x64, a64, b64), dy.double())
    for g, w in zip((y, *got), (y64, *want), strict=True):
        error = (g.double() - w).norm() / w.norm()
        assert error < 0.006, error  # bf16 keeps 8 bits: 0.4% at each rounding
