"""Fused chains against the modules they stand for, numeric derivatives, and what autograd keeps."""

from functools import partial

import pytest
import torch
from tests.tiny import FAMILIES, tiny_model
from torch import nn
from torch.nn import functional as F
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from finerank.adapters.inject import inject_adapters
from finerank.adapters.settings import AdapterSettings
from finerank.models.attention import use_packed_attention
from finerank.models.forward import loss_sum
from finerank.models.fused.fuse import fuse, unfuse
from finerank.models.fused.gated_mlp import ACTIVATIONS, SILU, gated_product
from finerank.models.fused.recompute import recipe_of
from finerank.models.fused.rms_norm import AFTER_ROUNDING, BEFORE_ROUNDING, ONE_PLUS, STYLES, rms_norm

NORMS = {AFTER_ROUNDING: LlamaRMSNorm, BEFORE_ROUNDING: Olmo2RMSNorm, ONE_PLUS: Gemma3RMSNorm}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("style", STYLES, ids=lambda s: NORMS[s].__name__)
def test_norm_gradient_equals_the_numeric_one(style):
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64)
    torch.autograd.gradcheck(partial(rms_norm, weight=weight, eps=1e-5, style=style), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("style", STYLES, ids=lambda s: NORMS[s].__name__)
def test_norm_equals_the_module(style, dtype):
    module = NORMS[style](48).to(dtype).requires_grad_(False)
    module.weight.copy_(torch.randn(48))
    x = torch.randn(2, 7, 48).to(dtype).requires_grad_()
    same = x.detach().clone().requires_grad_()
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    expected, got = module(x), rms_norm(same, module.weight, eps, style)
    assert torch.equal(got, expected)
    dy = torch.randn(2, 7, 48).to(dtype)
    expected.backward(dy)
    got.backward(dy)
    tolerance = {torch.bfloat16: 1e-2, torch.float32: 1e-6}[dtype]
    torch.testing.assert_close(same.grad, x.grad, rtol=tolerance, atol=tolerance)
    recipe = recipe_of(got)
    assert torch.equal(recipe.make(*recipe.kept), got.flatten(0, 1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_product_gradient_equals_the_numeric_one(activation):
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(lambda g, u: gated_product(g, u, activation), (gate, up))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gated_product_equals_separate_operations(dtype):
    gate, up, dy = (torch.randn(2, 7, 33).to(dtype) for _ in range(3))
    a, b = ([t.clone().requires_grad_() for t in (gate, up)] for _ in range(2))
    expected, got = F.silu(a[0]) * a[1], gated_product(*b, SILU)
    assert torch.equal(got, expected)
    expected.backward(dy)
    got.backward(dy)
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(a, b, strict=True))
    recipe = recipe_of(got)
    assert torch.equal(recipe.make(*recipe.kept), got.flatten(0, 1))


def test_a_changed_tensor_has_no_recipe():
    y = rms_norm(torch.randn(2, 8), torch.ones(8), 1e-6, AFTER_ROUNDING)
    assert recipe_of(y) is not None
    assert recipe_of(y * 1) is None
    y.mul_(2)
    assert recipe_of(y) is None


def gradients(model: nn.Module, adapters, *, packed: bool) -> tuple[float, list[torch.Tensor]]:
    ids = torch.arange(40)[None] * 5 % 97
    positions = torch.cat([torch.arange(15), torch.arange(25)])[None]
    borders = {"cu_seqlens": torch.tensor([0, 15, 40], dtype=torch.int32)} if packed else {}
    loss = loss_sum(model, ids, ids.roll(-1), positions if packed else torch.arange(40)[None], **borders)
    loss.backward()
    grads = [p.grad.clone() for p in adapters.parameters()]
    for p in adapters.parameters():
        p.grad = None
    return loss.item(), grads


def adapted(family: str, dtype: torch.dtype):
    model = tiny_model(family).to(dtype).requires_grad_(False)
    use_packed_attention(model)
    adapters = inject_adapters(model, AdapterSettings(lora_r=4), seed=1)
    for name, parameter in adapters.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return model.train(), adapters


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_model_gives_the_same_loss_and_gradients(family):
    model, adapters = adapted(family, torch.float32)
    loss, grads = gradients(model, adapters, packed=True)
    fused = fuse(model)
    layers = model.config.get_text_config().num_hidden_layers
    assert fused.norms >= 2 * layers + 1
    assert fused.mlps == (0 if "moe" in family or family == "mixtral" else layers)
    fused_loss, fused_grads = gradients(model, adapters, packed=True)
    assert fused_loss == loss
    for got, expected in zip(fused_grads, grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max() + 1))
    unfuse(model)
    again, _ = gradients(model, adapters, packed=True)
    assert again == loss
    assert not any("forward" in vars(m) for m in model.modules())


def test_bf16_forward_is_bit_equal():
    model, adapters = adapted("llama", torch.bfloat16)
    loss, grads = gradients(model, adapters, packed=True)
    fuse(model)
    fused_loss, fused_grads = gradients(model, adapters, packed=True)
    assert fused_loss == loss
    for got, expected in zip(fused_grads, grads, strict=True):
        assert (got - expected).norm() <= 0.02 * expected.norm()


def kept_bytes(model: nn.Module, adapters) -> int:
    """What autograd keeps of one forward pass, tensors that share memory counted once."""
    storages: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gradients(model, adapters, packed=True)
    return sum(storages.values())


def test_a_fused_model_keeps_less():
    model, adapters = adapted("llama", torch.bfloat16)
    before = kept_bytes(model, adapters)
    fuse(model)
    assert kept_bytes(model, adapters) < 0.75 * before


def test_other_norms_and_mlps_are_left_alone():
    class ScaledRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states):
            return super().forward(hidden_states) * 1.5

    class OtherMLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)
            self.act_fn = nn.SiLU()

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))

    model = nn.Sequential(ScaledRMSNorm(8), OtherMLP())
    assert fuse(model) == (0, 0)
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_trained_norm_weight_gets_its_gradient():
    norm = LlamaRMSNorm(8).requires_grad_(False)
    assert fuse(norm).norms == 1
    norm.weight.requires_grad_()
    norm(torch.randn(2, 8)).sum().backward()
    assert norm.weight.grad.abs().sum() > 0
