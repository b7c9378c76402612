"""Which layers get an adapter, how it starts, and that it learns."""

import pytest
import torch

from finerank.adapters.inject import inject_adapters
from finerank.adapters.lora import LoRALinear, apply_lora
from finerank.adapters.settings import AdapterSettings
from finerank.errors import AdapterError, ConfigError
from tiny import tiny_model

IDS = torch.arange(3, 27).view(2, 12)


def inject(model, seed=1, **settings):
    values = {"lora_r": 4, "lora_alpha": 8, **settings}
    return inject_adapters(model, AdapterSettings(**values), seed=seed)


def grown(model, **settings):
    """Adapters that change something."""
    adapters = inject(model, **settings)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in adapters.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=g))
    return adapters


def last_parts(adapters):
    return sorted({name.rpartition(".")[2] for name in adapters.layers})


ALL = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.mark.parametrize(
    "targets, expected",
    [
        (["all-linear"], ALL),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        (["linear_qkv"], ["k_proj", "q_proj", "v_proj"]),
        (["linear_proj", "linear_fc2"], ["down_proj", "o_proj"]),
        (["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"], ALL),
        (["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"], ALL),
        (["lm_head"], ["lm_head"]),
    ],
)
def test_targets(targets, expected):
    adapters = inject(tiny_model(), lora_target_modules=targets)
    assert last_parts(adapters) == expected
    assert len(adapters.layers) == len(expected) * (1 if targets == ["lm_head"] else 2)


def test_full_names_and_patterns_pick_single_layers():
    adapters = inject(tiny_model(), lora_target_modules=["layers.1.self_attn.q_proj", r".*\.0\.mlp\.(up|down)_proj"])
    assert sorted(adapters.layers) == [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]


def test_megatron_names_share_one_a():
    adapters = inject(tiny_model(), lora_target_modules=["linear_qkv", "linear_fc1"])
    layer = adapters.layers
    for first, *others in (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    ):
        for other in others:
            assert layer[f"model.layers.0.{other}"].lora_A is layer[f"model.layers.0.{first}"].lora_A
    assert layer["model.layers.1.mlp.up_proj"].lora_A is not layer["model.layers.0.mlp.up_proj"].lora_A
    assert len(adapters.parameters()) == 2 * (2 + 5)  # two layers: an A for each group, a B for each linear


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"lora_target_modules": ["qproj"]}, ["qproj", "'q_proj'", "down_proj"]),
        ({"lora_target_modules": ["linear_qkvx"]}, ["linear_qkvx", "q_proj"]),
        ({"lora_target_modules": []}, ["empty", "q_proj"]),
        ({"lora_target_modules": ["(q_proj"]}, ["regular expression"]),
        ({"lora_target_modules": ["q_proj", "linear_qkv"]}, ["twice"]),
        ({"lora_r": 0}, ["--lora-r", "0"]),
        ({"lora_alpha": 0.0}, ["--lora-alpha", "nothing"]),
        ({"lora_dropout": 1.0}, ["--lora-dropout"]),
        ({"lora_rank_pattern": {"down_proj": 0}}, ["down_proj", "0"]),
        ({"lora_rank_pattern": {"downproj": 8}}, ["--lora-rank-pattern", "downproj", "down_proj"]),
        ({"lora_alpha_pattern": {"[": 8.0}}, ["--lora-alpha-pattern", "regular expression"]),
        ({"lora_target_modules": ["linear_qkv"], "lora_rank_pattern": {"k_proj": 8}}, ["share", "rank 8"]),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises((AdapterError, ConfigError)) as caught:
        inject(tiny_model(), **settings)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_a_second_adapter_is_refused():
    model = tiny_model()
    inject(model)
    with pytest.raises(AdapterError, match="already has an adapter"):
        inject(model)


@pytest.mark.parametrize("targets", [["all-linear"], ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]])
def test_a_fresh_adapter_changes_nothing(targets):
    model = tiny_model()
    before = model(IDS).logits
    inject(model, lora_target_modules=targets)
    torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("targets", [["all-linear"], ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]])
def test_every_factor_moves_when_trained(targets):
    model = tiny_model()
    adapters = inject(model, lora_target_modules=targets)
    start = {name: p.detach().clone() for name, p in adapters.named_parameters()}
    base = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
    optimizer = torch.optim.SGD(adapters.parameters(), lr=1.0)
    for _ in range(2):  # B moves first, then A, whose gradient is B's
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(p, start[name]) for name, p in adapters.named_parameters())
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if "lora_" not in name)


def test_start_depends_on_seed_and_name_only():
    some = inject(tiny_model(), lora_target_modules=["v_proj"])
    state = torch.random.get_rng_state()
    every = inject(tiny_model())
    assert torch.equal(state, torch.random.get_rng_state())
    for name, layer in some.layers.items():
        assert torch.equal(layer.lora_A, every.layers[name].lora_A)
    other = inject(tiny_model(), seed=2)
    assert not any(torch.equal(other.layers[n].lora_A, every.layers[n].lora_A) for n in every.layers)
    a = every.layers["model.layers.0.mlp.down_proj"].lora_A
    assert a.abs().max() <= 1 / 8 and a.abs().max() > 0.9 / 8  # 64 inputs


def test_rank_alpha_patterns_and_rslora():
    adapters = inject(
        tiny_model(),
        lora_rank_pattern={"linear_fc2": 9, r"0\.self_attn\.q_proj": 2},
        lora_alpha_pattern={"o_proj": 3.0},
        use_rslora=True,
    )
    layers = adapters.layers
    assert layers["model.layers.1.mlp.down_proj"].rank == 9
    assert layers["model.layers.1.mlp.down_proj"].scale == pytest.approx(8 / 3)
    assert (layers["model.layers.0.self_attn.q_proj"].rank, layers["model.layers.1.self_attn.q_proj"].rank) == (2, 4)
    assert layers["model.layers.0.self_attn.o_proj"].scale == pytest.approx(3 / 2)
    assert adapters.config["rank_pattern"] == {"down_proj": 9, r"0\.self_attn\.q_proj": 2}


def test_joined_layers_equal_single_ones():
    model = tiny_model("qwen2")
    adapters = grown(model)
    ids = IDS.clone()
    joined = [t.detach() for t in torch.autograd.grad(model(ids, labels=ids).loss, adapters.parameters())]
    assert any(layer.shared_input for layer in adapters.layers.values())
    for layer in adapters.layers.values():
        if layer.shared_input:
            layer.shared_input.dissolve()
    single = torch.autograd.grad(model(ids, labels=ids).loss, adapters.parameters())
    for a, b in zip(joined, single, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item())


def test_joined_layers_fall_apart_when_inputs_differ():
    adapters = grown(tiny_model())
    q, k, v = (adapters.layers[f"model.layers.0.self_attn.{n}_proj"] for n in "qkv")
    x, other = torch.randn(3, 32), torch.randn(3, 32)
    q(x)
    torch.testing.assert_close(k(other), apply_lora([k], other)[0])
    assert v.shared_input is None
    torch.testing.assert_close(v(x), apply_lora([v], x)[0])


def test_joined_layers_see_that_the_input_was_changed():
    adapters = grown(tiny_model())
    q, k = (adapters.layers[f"model.layers.0.self_attn.{n}_proj"] for n in "qk")
    with torch.no_grad():
        x = torch.randn(3, 32)
        q(x)
        x.add_(1.0)
        torch.testing.assert_close(k(x), apply_lora([k], x)[0])


def test_dropout_acts_in_training_only():
    model = tiny_model()
    grown(model, lora_dropout=0.5)
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    model.train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits)


def test_disabled_is_the_base_model():
    model = tiny_model()
    base = model(IDS).logits
    adapters = grown(model)
    tuned = model(IDS).logits
    with adapters.disabled():
        assert torch.equal(model(IDS).logits, base)
    assert torch.equal(model(IDS).logits, tuned) and not torch.allclose(tuned, base)


@pytest.mark.parametrize("targets", [["all-linear"], ["linear_qkv", "linear_fc1"], ["lm_head"]])
def test_merged_weights_equal_forward(targets):
    model = tiny_model()
    adapters = grown(model, lora_target_modules=targets)
    tuned = model(IDS).logits
    adapters.merge_()
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    torch.testing.assert_close(model(IDS).logits, tuned, rtol=1e-4, atol=1e-4)


def test_merge_rounds_once():
    model = tiny_model().bfloat16()
    adapters = grown(model)
    layer = adapters.layers["model.layers.0.mlp.up_proj"]
    exact = layer.weight.double() + layer.scale * layer.lora_B.double() @ layer.lora_A.double()
    layer.merge_()
    # half a unit in the last of bf16's 8 bits: a second rounding would go beyond it somewhere
    assert ((layer.weight - exact).abs() <= exact.abs() * 2**-8 * 1.001).all()


def test_deep_copies_are_independent():
    import copy

    model = tiny_model()
    grown(model)
    twin = copy.deepcopy(model)
    want = model(IDS).logits
    for layer in twin.modules():
        if isinstance(layer, LoRALinear):
            layer.lora_B.data.zero_()
    assert torch.equal(model(IDS).logits, want)
    assert not torch.allclose(twin(IDS).logits, want)


def test_adapters_keep_gradient_checkpointing_exact():
    model = tiny_model()
    adapters = grown(model)
    want = torch.autograd.grad(model(IDS, labels=IDS).loss, adapters.parameters())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    got = torch.autograd.grad(model(IDS, labels=IDS).loss, adapters.parameters())
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-7)


def test_fused_experts_are_said_to_be_left_out(caplog):
    inject(tiny_model("mixtral"))
    assert "fused experts" in caplog.text
    caplog.clear()
    inject(tiny_model())
    assert "fused experts" not in caplog.text
