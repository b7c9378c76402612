"""The loss head against full logits, in fp64 and by families with capped or scaled logits."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from finerank.models import head as head_module
from finerank.models.forward import loss_sum, verified_head
from finerank.models.head import Head, cross_entropy_sum
from tiny import tiny_model


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(head_module, "LOGITS_PER_CHUNK", 40 * 7)
    monkeypatch.setattr(head_module, "MIN_CHUNK", 1)


def case(dtype=torch.float64, bias=True, num=23):
    torch.manual_seed(0)
    module = nn.Linear(12, 40, bias=bias, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(num, 12, dtype=dtype).mul_(4).requires_grad_()
    return module, hidden, torch.randint(0, 40, (num,))


def full(head, hidden, targets):
    return F.cross_entropy(head.logits(hidden), targets, reduction="sum")


HEADS = [{}, {"softcap": 3.0}, {"scale": 0.25}, {"scale": 0.5, "softcap": 2.0}]


@pytest.mark.parametrize("extra", HEADS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_full_logits_with_gradient(extra, bias):
    module, hidden, targets = case(bias=bias)
    head = Head(module, **extra)
    want = full(head, hidden, targets)
    got = cross_entropy_sum(head, hidden, targets)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(3 * got, hidden)[0], torch.autograd.grad(3 * want, hidden)[0], rtol=1e-11, atol=1e-13
    )


@pytest.mark.parametrize("extra", HEADS, ids=str)
def test_gradient_equals_numeric(extra):
    module, hidden, targets = case(num=6)
    assert torch.autograd.gradcheck(lambda h: cross_entropy_sum(Head(module, **extra), h, targets), hidden)


def test_a_head_that_learns_gets_its_gradient():
    module, hidden, targets = case()
    module.requires_grad_(True)
    head = Head(module, softcap=3.0)
    got = torch.autograd.grad(cross_entropy_sum(head, hidden, targets), (hidden, module.weight, module.bias))
    want = torch.autograd.grad(full(head, hidden, targets), (hidden, module.weight, module.bias))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-13)


def test_a_hopeless_target_has_a_finite_exact_loss():
    """Its probability underflows, the loss must not."""
    module, _, _ = case(torch.float32, bias=False)
    hidden = 300 * module.weight[:1].clone()
    targets = module(hidden).argmin(dim=1)
    logits = module(hidden).double()
    want = (logits.logsumexp(1) - logits.gather(1, targets[:, None])[:, 0]).sum()
    assert want > 100
    torch.testing.assert_close(cross_entropy_sum(Head(module), hidden, targets).double(), want, rtol=1e-6, atol=0)


def test_no_trained_position_is_zero():
    module, hidden, targets = case(torch.float32)
    loss = cross_entropy_sum(Head(module), hidden[:0], targets[:0])
    assert loss.item() == 0 and loss.dtype == torch.float32
    loss.backward()


def test_bf16_is_within_its_rounding():
    """Logits are rounded to 8 bits, as the model itself rounds them: 0.4% of the loss at most, 1% of the gradient."""
    module, hidden, targets = case(torch.float32)
    exact = full(Head(module), hidden, targets)
    exact_grad = torch.autograd.grad(exact, hidden)[0]
    low = nn.Linear(12, 40, dtype=torch.bfloat16).requires_grad_(False)
    low.load_state_dict(module.state_dict())
    h = hidden.detach().bfloat16().requires_grad_()
    loss = cross_entropy_sum(Head(low), h, targets)
    assert loss.dtype == torch.float32
    assert abs(loss.item() / exact.item() - 1) < 0.004
    grad = torch.autograd.grad(loss, h)[0].float()
    assert (grad - exact_grad).norm() / exact_grad.norm() < 0.01


def test_logits_are_never_held_whole(monkeypatch):
    """The largest tensor made has a chunk's size, whatever the number of positions."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.size = max(self.size, out.numel())
            return out

    module, hidden, targets = case(torch.float32, num=500)
    with Largest() as seen:
        cross_entropy_sum(Head(module), hidden, targets).backward()
    assert seen.size == max(7 * 40, hidden.numel())


def softcapped(**overrides):
    return tiny_model("gemma3", final_logit_softcapping=5.0, **overrides)


def granite():
    from transformers import AutoModelForCausalLM, GraniteConfig

    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, logits_scaling=7.0, initializer_range=0.3,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def cohere():
    from transformers import AutoModelForCausalLM, CohereConfig

    torch.manual_seed(0)
    config = CohereConfig(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, logit_scale=0.3, initializer_range=0.3,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("make", [softcapped, granite, cohere])
def test_capped_and_scaled_heads_are_taken_over(make):
    model = make().requires_grad_(False)
    assert verified_head(model) is not None
    ids = torch.arange(3, 27).view(2, 12)
    targets = (ids * 5 + 1) % 384
    positions = torch.arange(12).expand(2, 12)
    want = F.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss_sum(model, ids, targets, positions), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [1, 2])
def test_an_unknown_head_is_called_as_the_model_does(rows, caplog):
    model = tiny_model()
    plain_forward = type(model).forward

    class Odd(type(model)):
        def forward(self, *args, **kwargs):
            out = plain_forward(self, *args, **kwargs)
            out.logits = out.logits - out.logits.square() * 0.01
            return out

    model.__class__ = Odd
    caplog.set_level("INFO")
    assert verified_head(model) is None
    assert "own head" in caplog.text
    ids = torch.arange(3, 27).view(2, 12)[:rows]
    targets = (ids * 5 + 1) % 384
    targets[:, :4] = -100
    positions = torch.arange(12).expand(rows, 12)
    want = F.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(loss_sum(model, ids, targets, positions), want, rtol=1e-6, atol=0)
