"""AdamW against the formula in float64, clipping, and its state by name."""

import pytest
import torch

from finerank.errors import CheckpointError
from finerank.train.optim import (
    build_optimizer,
    clip_gradients,
    load_optimizer_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from finerank.train.settings import OptimSettings


def parameters(seed: int = 0) -> list[tuple[str, torch.nn.Parameter]]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"b.lora_A": (4, 6), "a.lora_B": (5, 4), "a.magnitude": (5,)}
    return [(n, torch.nn.Parameter(torch.randn(s, generator=g))) for n, s in shapes.items()]


def take_steps(named, optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        g = torch.Generator().manual_seed(100 + step)
        for _, p in named:
            p.grad = torch.randn(p.shape, generator=g)
        set_learning_rate(optimizer, 0.01 / (step + 1))
        optimizer.step()


def test_equals_the_formula_in_float64_and_decays_matrices_only() -> None:
    s = OptimSettings(weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_eps=1e-6)
    named = parameters()
    want = {n: p.detach().double().clone() for n, p in named}
    m = {n: torch.zeros_like(p) for n, p in want.items()}
    v = {n: torch.zeros_like(p) for n, p in want.items()}
    take_steps(named, build_optimizer(named, s), 0, 5)
    for step in range(5):
        g = torch.Generator().manual_seed(100 + step)
        lr = 0.01 / (step + 1)
        for n, p in named:
            grad = torch.randn(p.shape, generator=g).double()
            m[n] = 0.8 * m[n] + 0.2 * grad
            v[n] = 0.95 * v[n] + 0.05 * grad**2
            decay = 0.1 if p.ndim == 2 else 0.0
            update = (m[n] / (1 - 0.8 ** (step + 1))) / ((v[n] / (1 - 0.95 ** (step + 1))).sqrt() + 1e-6)
            want[n] = want[n] * (1 - lr * decay) - lr * update
    for n, p in named:
        torch.testing.assert_close(p.detach().double(), want[n], rtol=1e-5, atol=1e-6)


def test_state_taken_out_and_put_back_goes_on_bit_equally() -> None:
    s = OptimSettings(weight_decay=0.1)
    unbroken = parameters()
    take_steps(unbroken, build_optimizer(unbroken, s), 0, 6)

    first = parameters()
    optimizer = build_optimizer(first, s)
    take_steps(first, optimizer, 0, 3)
    saved = {k: t.clone() for k, t in optimizer_tensors(optimizer, first).items()}
    second = [(n, torch.nn.Parameter(p.detach().clone())) for n, p in reversed(first)]
    resumed = build_optimizer(second, s)
    load_optimizer_tensors(resumed, second, saved)
    take_steps(second[::-1], resumed, 3, 6)
    for n, p in unbroken:
        assert torch.equal(p, dict(second)[n]), n


def test_state_of_another_model_is_refused() -> None:
    named = parameters()
    optimizer = build_optimizer(named, OptimSettings())
    with pytest.raises(CheckpointError, match=r"c\.lora_A"):
        load_optimizer_tensors(optimizer, named, {"c.lora_A/exp_avg": torch.zeros(1)})
    wrong = {f"b.lora_A/{k}": torch.zeros(2, 2) for k in ("exp_avg", "exp_avg_sq", "step")}
    with pytest.raises(CheckpointError, match="does not fit"):
        load_optimizer_tensors(optimizer, named, wrong)


def test_clipping_scales_all_gradients_and_returns_the_norm_before() -> None:
    values = [p for _, p in parameters()]
    for p in values:
        p.grad = torch.ones_like(p) * 3
    norm = (9.0 * sum(p.numel() for p in values)) ** 0.5
    assert clip_gradients(values, 0.0).item() == pytest.approx(norm)
    assert torch.equal(values[0].grad, torch.full_like(values[0], 3.0))
    assert clip_gradients(values, 1.0).item() == pytest.approx(norm)
    assert clip_gradients(values, 0.0).item() == pytest.approx(1.0, rel=1e-4)
