"""How adapters start: each start against PEFT's on the same weights, and what all of them owe."""

import math

import pytest
import torch
from test_inject import IDS

from finerank import registry
from finerank.adapters.files import load_adapter, save_adapter
from finerank.adapters.initial import PACKAGE, Pass, check_initial, shape_adapters, start_adapters
from finerank.adapters.inject import inject_adapters
from finerank.adapters.settings import AdapterSettings
from finerank.errors import AdapterError, ConfigError
from tiny import tiny_model

peft = pytest.importorskip("peft")

STARTS = ["default", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora", "eva"]
WITH_START = ["pissa", "pissa_niter_4", "olora"]
GROUPED = {"lora_target_modules": ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]}


def largest(a, b):
    return (a - b).abs().max().item()


def batches(model, n=6, width=20):
    """Batches of random tokens; the first quarter of each row is a prompt."""
    g = torch.Generator().manual_seed(3)
    made = []
    for _ in range(n):
        ids = torch.randint(3, 380, (8, width), generator=g)
        made.append({"input_ids": ids, "labels": torch.cat([torch.full((8, 5), -100), ids[:, 5:]], dim=1)})
    return made


def endless(model, made):
    while True:
        for batch in made:
            ids = batch["input_ids"]
            yield Pass(trained_BT=batch["labels"] != -100, run=lambda ids=ids: model(input_ids=ids))


def started(name, model=None, seed=42, **settings):
    model = tiny_model() if model is None else model
    settings = AdapterSettings(**{"lora_r": 4, "lora_alpha": 8, "init_lora_weights": name, **settings})
    check_initial(settings)
    adapters = inject_adapters(model.requires_grad_(False), settings, seed=seed)
    start_adapters(adapters, settings, seed=seed, passes=lambda: endless(model, batches(model)))
    return adapters


def peft_model(name, model=None, **config):
    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **config}
    init = True if name == "default" else name
    return peft.get_peft_model(model or tiny_model(), peft.LoraConfig(init_lora_weights=init, **values))


def train(model, parameters, steps=3, lr=0.01):
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def factors_of(wrapped):
    return {n.replace(".default", ""): p for n, p in wrapped.named_parameters() if "lora_" in n}


def test_the_known_starts_are_there():
    assert registry.names(PACKAGE) == ["default", "eva", "gaussian", "olora", "orthogonal", "pissa"]


@pytest.mark.parametrize("grouped", [{}, GROUPED], ids=["separate", "grouped"])
@pytest.mark.parametrize("name", STARTS)
def test_starts_without_a_change_repeatably_and_learns(name, grouped):
    before = tiny_model()(IDS).logits
    adapters = started(name, **grouped)
    assert largest(adapters.model(IDS).logits, before) < (2e-5 if name == "orthogonal" else 1e-9)
    again = started(name, **grouped)
    for (n, p), (m, q) in zip(adapters.named_parameters(), again.named_parameters(), strict=True):
        assert n == m and torch.equal(p, q)
    if name not in ("default", "pissa", "olora"):  # these two depend on the weights alone
        other = started(name, seed=7, **grouped)
        assert not all(
            torch.equal(p, q) if p.shape == q.shape else False
            for p, q in zip(adapters.parameters(), other.parameters(), strict=False)
        )
    old = [p.detach().clone() for p in adapters.parameters()]
    train(adapters.model, adapters.parameters())
    assert all(not torch.equal(p, q) for p, q in zip(adapters.parameters(), old, strict=True))
    base = tiny_model()
    for n, p in base.named_parameters():
        owner, _, leaf = n.rpartition(".")
        where = n if owner not in adapters.layers else f"{owner}.base_layer.{leaf}"
        assert torch.equal(p, adapters.model.get_parameter(where)), n


@pytest.mark.parametrize("extra", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_weight_starts_train_as_in_peft(tmp_path, name, extra):
    """Logits, gradients, three steps of AdamW, and the adapter that PEFT converts for the original base."""
    patterns = {"down_proj": 2}
    ours = started(name, **extra, lora_rank_pattern=patterns, lora_alpha_pattern={"up_proj": 4.0})
    theirs = peft_model(name, **extra, rank_pattern=patterns, alpha_pattern={"up_proj": 4})
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "initial")
    theirs.peft_config["default"].init_lora_weights = name
    named = factors_of(theirs)
    assert largest(ours.model(IDS).logits, theirs(IDS).logits) < 2e-5
    for parameter_name, p in ours.named_parameters():
        if "start_" not in parameter_name:
            reference = named[parameter_name if "magnitude" not in parameter_name else f"{parameter_name}.weight"]
            assert largest(p, reference) < 1e-5 * max(1.0, reference.abs().max().item()), parameter_name
    for model in (ours.model, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for parameter_name, p in ours.named_parameters():
        if "start_" not in parameter_name:
            reference = named[parameter_name if "magnitude" not in parameter_name else f"{parameter_name}.weight"]
            assert largest(p.grad, reference.grad) < 1e-4 * reference.grad.abs().max().item() + 1e-8, parameter_name
    train(ours.model, ours.parameters())
    train(theirs, [p for p in theirs.parameters() if p.requires_grad])
    assert largest(ours.model(IDS).logits, theirs(IDS).logits) < 5e-3
    assert largest(ours.model(IDS).logits, tiny_model()(IDS).logits) > 0.1


@pytest.mark.parametrize("extra", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
@pytest.mark.parametrize("name", WITH_START)
def test_saved_start_is_a_plain_adapter_of_the_original_base(tmp_path, name, extra):
    settings = {} if "use_rslora" in extra else {"lora_rank_pattern": {"down_proj": 2}}
    ours = started(name, **extra, **settings)
    train(ours.model, ours.parameters())
    expected = ours.model(IDS).logits
    save_adapter(ours, tmp_path, base_model_name="tiny")
    wrapped = peft.PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert wrapped.peft_config["default"].init_lora_weights is True
    assert wrapped.peft_config["default"].r == 8
    assert largest(wrapped(IDS).logits, expected) < 2e-5
    again = tiny_model()
    load_adapter(again, tmp_path)
    assert largest(again(IDS).logits, expected) < 2e-5
    merged = ours.model
    ours.merge_()
    assert largest(merged(IDS).logits, expected) < 2e-5


def test_conversion_equals_pefts(tmp_path):
    """The product of the saved factors is that of PEFT's `path_initial_model_for_weight_conversion`."""
    ours, theirs = started("pissa"), peft_model("pissa")
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "initial")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    g = torch.Generator().manual_seed(2)
    named = factors_of(theirs)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if "start_" not in name:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
                named[name].copy_(p)
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    save_adapter(ours, tmp_path / "ours", base_model_name="tiny")
    one, other = load_adapter(tiny_model(), tmp_path / "ours"), load_adapter(tiny_model(), tmp_path / "theirs")
    assert one.config["r"] == other.config["r"] == 8 and one.config["lora_alpha"] == other.config["lora_alpha"] == 16
    for name, layer in one.layers.items():
        assert largest(layer.delta_weight(), other.layers[name].delta_weight()) < 1e-5, name


def test_saved_start_survives_half_precision():
    """`(B - B0) A + B0 (A - A0)` keeps a small change where `B A - B0 A0` cancels."""
    ours = started("pissa", tiny_model(hidden_size=64))
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(1e-4 * torch.randn(p.shape, generator=g))
    layer = ours.layers["model.layers.0.mlp.up_proj"]
    exact = layer.delta_weight().double()
    a, b = (f.detach().bfloat16().double() for f in layer.factors())
    plain_a = torch.cat([layer.lora_A, layer.start_A]).detach().bfloat16().double()
    plain_b = torch.cat([layer.lora_B, -layer.start_B], dim=1).detach().bfloat16().double()
    error, plain_error = (layer.scale * b @ a - exact).norm(), (layer.scale * plain_b @ plain_a - exact).norm()
    assert error < 0.01 * exact.norm() and plain_error > 0.5 * exact.norm()


def test_fast_svd_finds_the_leading_components():
    weight = tiny_model().model.layers[0].mlp.up_proj.weight.double()
    best = torch.linalg.svdvals(weight)[4:].norm()
    for name in ("pissa", "pissa_niter_16"):
        layer = started(name).layers["model.layers.0.mlp.up_proj"]
        rest = weight - layer.scale * (layer.start_B.double() @ layer.start_A.double())
        assert rest.norm() < 1.0001 * best, name


def test_a_shared_start_is_that_of_the_stacked_weights():
    adapters = started("pissa", **GROUPED)
    q, k, v = (adapters.layers[f"model.layers.0.self_attn.{n}_proj"] for n in "qkv")
    assert q.lora_A is k.lora_A is v.lora_A and q.start_A is k.start_A
    stacked = torch.cat([layer.base_layer.weight for layer in (q, k, v)])
    product = torch.cat([layer.scale * layer.start_B @ layer.start_A for layer in (q, k, v)])
    assert (stacked - product).norm() < 1.0001 * torch.linalg.svdvals(stacked)[4:].norm()


def test_quantised_base_keeps_its_bits():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from finerank.models.quantized import QuantizedLinear

    model = tiny_model(hidden_size=64, intermediate_size=128)
    for layer in model.model.layers:
        old = layer.mlp.up_proj.weight.detach()
        layer.mlp.up_proj = QuantizedLinear.of(old, bits=4)
    before = model(IDS).logits
    adapters = started("pissa", model, lora_target_modules=["up_proj"])
    assert largest(adapters.model(IDS).logits, before) < 1e-9
    train(adapters.model, adapters.parameters())
    assert largest(adapters.model(IDS).logits, before) > 1e-3


@pytest.mark.parametrize("name", ["gaussian", "orthogonal"])
def test_random_starts_are_as_wide_as_pefts(name):
    ours = started(name, tiny_model(hidden_size=64), lora_r=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = factors_of(peft_model(name, tiny_model(hidden_size=64), r=8))
    for part in ("lora_A", "lora_B"):
        mine = torch.cat([p.flatten() for n, p in ours.named_parameters() if part in n])
        other = torch.cat([p.detach().flatten() for n, p in theirs.items() if part in n])
        assert mine.std().item() == pytest.approx(other.std().item(), rel=0.05, abs=1e-9)
    for layer in ours.layers.values():
        assert layer.delta_weight().abs().max() < 1e-6


@pytest.mark.parametrize("rho", [1.0, 2.0])
@pytest.mark.parametrize("patterns", [{}, {"down_proj": 6}], ids=["one_rank", "pattern"])
def test_eva_equals_peft(tmp_path, rho, patterns):
    made = batches(tiny_model())
    ours = started("eva", eva_rho=rho, lora_rank_pattern=patterns)
    theirs = peft_model("eva", eva_config=peft.EvaConfig(rho=rho), rank_pattern=patterns)
    peft.initialize_lora_eva_weights(theirs, made, show_progress_bar=False)
    named = factors_of(theirs)
    mine = dict(ours.named_parameters())
    assert set(mine) == set(named)
    assert {n: p.shape for n, p in mine.items()} == {n: p.shape for n, p in named.items()}
    for name, p in mine.items():
        assert largest(p, named[name]) < 1e-4, name
    if rho > 1:
        assert len({layer.rank for layer in ours.layers.values()}) > 1
    scales = {
        n.removeprefix("base_model.model."): m.scaling["default"]
        for n, m in theirs.named_modules()
        if hasattr(m, "lora_A")
    }
    for name, layer in ours.layers.items():
        assert layer.scale == pytest.approx(scales[name])
    train(ours.model, ours.parameters())
    save_adapter(ours, tmp_path, base_model_name="tiny")
    read = peft.PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert largest(read(IDS).logits, ours.model(IDS).logits) < 1e-5


def test_eva_drops_layers_that_explain_little(tmp_path):
    ours = started("eva", lora_r=1, lora_alpha=2, eva_rho=8.0)
    assert 0 < len(ours.layers) < 14
    assert sum(layer.rank for layer in ours.layers.values()) == 14
    for name, layer in ours.layers.items():
        assert layer.scale == 2.0, name
    train(ours.model, ours.parameters())
    save_adapter(ours, tmp_path, base_model_name="tiny")
    read = peft.PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert largest(read(IDS).logits, ours.model(IDS).logits) < 1e-5


def test_eva_with_too_few_tokens_says_so(monkeypatch):
    from finerank.adapters.initial import eva

    monkeypatch.setattr(eva, "MAX_PASSES", 3)
    model = tiny_model()
    settings = AdapterSettings(lora_r=16, init_lora_weights="eva")
    adapters = inject_adapters(model, settings, seed=1)
    few = Pass(trained_BT=torch.tensor([[False, True]]), run=lambda: model(input_ids=torch.tensor([[5, 6]])))
    with pytest.raises(AdapterError, match="too few trained tokens"):
        start_adapters(adapters, settings, seed=1, passes=lambda: iter(lambda: few, None))


@pytest.mark.parametrize("grouped", [{}, GROUPED], ids=["separate", "grouped"])
@pytest.mark.parametrize("name", [*WITH_START, "eva"])
def test_saved_parameters_find_their_places_again(name, grouped):
    ours = started(name, **grouped, **({"eva_rho": 4.0, "lora_r": 2} if name == "eva" else {}))
    saved = {n: p.detach().clone() for n, p in ours.named_parameters()}
    settings = AdapterSettings(
        **{"lora_r": 2 if name == "eva" else 4, "lora_alpha": 8, "init_lora_weights": name, **grouped}
    )
    again = inject_adapters(tiny_model(), settings, seed=42)
    shape_adapters(again, settings, saved)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in saved.items()}
    assert again.config == ours.config
    assert {n: a.scale for n, a in again.layers.items()} == {n: a.scale for n, a in ours.layers.items()}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"init_lora_weights": "pisa"}, "'?pissa'?"),
        ({"init_lora_weights": "eva_niter_3"}, "only pissa"),
        ({"init_lora_weights": "pissa_niter_x"}, "pissa_niter"),
        ({"eva_rho": 3.0}, "without --init-lora-weights eva"),
        ({"init_lora_weights": "eva", "eva_rho": 0.5}, "at least 1"),
        ({"init_lora_weights": "eva", "eva_rho": math.nan}, "at least 1"),
        ({"init_lora_weights": "pissa", "lu_lora_final_layer_index": 0}, "exclude each other"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ConfigError, match=words) as caught:
        check_initial(AdapterSettings(**settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "rank", "words"), [("pissa", 40, "components"), ("orthogonal", 3, "even")])
def test_ranks_that_a_start_cannot_have(name, rank, words):
    with pytest.raises(AdapterError, match=words):
        started(name, lora_r=rank)


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_4", "olora"])
def test_factors_of_a_changed_base_are_refused(tmp_path, name):
    from finerank.checkpoints.formats.peft import read_adapter

    peft_model(name).save_pretrained(tmp_path)
    for read in (lambda: load_adapter(tiny_model(), tmp_path), lambda: read_adapter(tmp_path)):
        with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion") as caught:
            read()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["eva", "gaussian", "orthogonal", "default"])
def test_adapters_of_the_original_base_are_continued(tmp_path, name):
    theirs = peft_model(name)
    if name == "eva":
        peft.initialize_lora_eva_weights(theirs, batches(tiny_model()), show_progress_bar=False)
    train(theirs, [p for p in theirs.parameters() if p.requires_grad])
    theirs.save_pretrained(tmp_path)
    ours = tiny_model()
    adapters = load_adapter(ours, tmp_path, trainable=True)
    assert largest(ours(IDS).logits, theirs(IDS).logits) < 1e-5
    train(ours, adapters.parameters())
    train(theirs, [p for p in theirs.parameters() if p.requires_grad])
    assert largest(ours(IDS).logits, theirs(IDS).logits) < 1e-3
