"""Low-rank changes of fused experts: PEFT's `target_parameters`, and a plain reference in float64."""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from peft_pair import IDS, check_pair, check_reading, grown
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from finerank.adapters.expert_products import Change, experts_output
from finerank.adapters.experts import by_expert, flat
from finerank.adapters.files import load_adapter, save_adapter
from finerank.adapters.inject import inject_adapters
from finerank.adapters.settings import AdapterSettings
from finerank.errors import AdapterError, ConfigError
from tiny import tiny_model

FAMILIES = ["mixtral", "qwen3_moe"]
BOTH = ["gate_up_proj", "down_proj"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "settings",
    [
        {"lora_target_modules": ["q_proj", *BOTH]},
        {"lora_target_modules": BOTH},
        {"lora_target_modules": ["gate_up_proj"]},
        {"lora_target_modules": ["experts.down_proj", "v_proj"]},
        {"lora_target_modules": ["linear_fc1", "linear_fc2"]},
        {"lora_target_modules": [r".*layers\.1\.mlp\.experts\.down_proj", "q_proj"]},
        {"lora_target_modules": ["all-linear", *BOTH], "use_rslora": True, "lora_alpha": 4},
        {
            "lora_target_modules": ["q_proj", *BOTH],
            "lora_rank_pattern": {"experts.down_proj": 2, "layers.0.mlp.experts.gate_up_proj": 6},
            "lora_alpha_pattern": {"down_proj": 3.0},
            "use_rslora": True,
        },
        {"lora_target_modules": BOTH, "lora_modules_to_save": ["norm", "lm_head"]},
        {"lora_target_modules": [*BOTH, "embed_tokens"]},
    ],
    ids=lambda s: "-".join(s["lora_target_modules"]) + "-" + "-".join(s)[19:],
)
def test_peft_reads_ours(tmp_path: Path, family: str, settings: dict):
    check_pair(tmp_path, family, **settings)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        {"target_modules": [], "target_parameters": ["down_proj"], "rank_pattern": {"experts.down_proj": 3}},
        {"target_modules": ["v_proj"], "target_parameters": ["model.layers.1.mlp.experts.gate_up_proj"]},
        {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"], "use_rslora": True},
    ],
)
def test_we_read_peft(tmp_path: Path, family: str, config: dict):
    check_reading(tmp_path, family, **config)


@pytest.mark.parametrize("changed", [(True, True), (True, False), (False, True), (False, False)])
def test_outputs_and_all_gradients_equal_a_plain_reference(changed: tuple[bool, bool]):
    g = torch.Generator().manual_seed(1)
    T, K, E, D, FF, R = 9, 2, 5, 6, 4, 3

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64).requires_grad_()

    x, w1, w2 = draw(T, D), draw(E, 2 * FF, D), draw(E, D, FF)
    weights = torch.rand(T, K, generator=g, dtype=torch.float64).requires_grad_()
    index = torch.rand(T, E - 1, generator=g).argsort(1)[:, :K]  # the last expert has no token
    factors = [draw(E, R, D), draw(E, 2 * FF, R), draw(E, R, FF), draw(E, D, R)]
    leaves = [x, weights, *(f for f, used in zip(factors, (changed[0],) * 2 + (changed[1],) * 2, strict=True) if used)]

    def gate(u: torch.Tensor) -> torch.Tensor:
        return F.silu(u[..., :FF]) * u[..., FF:]

    def reference() -> torch.Tensor:
        first = w1 + 0.7 * factors[1] @ factors[0] if changed[0] else w1
        second = w2 + 0.3 * factors[3] @ factors[2] if changed[1] else w2
        rows = []
        for t in range(T):
            rows.append(sum(weights[t, k] * (second[e] @ gate(first[e] @ x[t])) for k, e in enumerate(index[t])))
        return torch.stack(rows)

    def ours() -> torch.Tensor:
        first = Change(factors[0], factors[1], 0.7) if changed[0] else None
        second = Change(factors[2], factors[3], 0.3) if changed[1] else None
        frozen = {"first_EUD": w1.detach(), "second_EDF": w2.detach()}
        return experts_output(x, index, weights, gate=gate, first=first, second=second, **frozen)

    torch.testing.assert_close(ours(), reference(), rtol=1e-12, atol=1e-12)
    dy = torch.randn(T, D, generator=g, dtype=torch.float64)
    for ours_grad, wanted in zip(*(torch.autograd.grad(f(), leaves, dy) for f in (ours, reference)), strict=True):
        torch.testing.assert_close(ours_grad, wanted, rtol=1e-11, atol=1e-11)


def test_keeps_the_input_the_first_product_and_small_ones():
    T, K, E, D, FF, R = 64, 2, 4, 32, 16, 2
    model_weights = torch.randn(E, 2 * FF, D), torch.randn(E, D, FF)
    changes = [
        Change(torch.randn(E, R, i).requires_grad_(), torch.randn(E, o, R), 1.0) for i, o in ((D, 2 * FF), (FF, D))
    ]
    x = torch.randn(T, D, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = experts_output(
            x,
            torch.rand(T, E).argsort(1)[:, :K],
            torch.rand(T, K),
            first_EUD=model_weights[0],
            second_EDF=model_weights[1],
            gate=lambda u: F.silu(u[..., :FF]) * u[..., FF:],
            first=changes[0],
            second=changes[1],
        )
    given = (x, *model_weights, *(f for c in changes for f in (c.a_ERI, c.b_EOR)))
    for t in given:
        kept.pop(t.untyped_storage().data_ptr(), None)
    S = T * K
    assert sum(kept.values()) <= 4 * (S * 2 * FF + 2 * S * R) + 8 * S + 4 * S
    y.sum().backward()
    assert x.grad is not None and all(w.grad is None for w in model_weights)


def test_flat_factors_come_back():
    a, b = torch.randn(12, 5), torch.randn(7, 12)
    again = flat(*by_expert(a, b, 4))
    assert torch.equal(a, again[0]) and torch.equal(b, again[1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_ones_change_nothing_and_the_base_comes_back(family: str, dtype: torch.dtype):
    model = tiny_model(family).to(dtype)
    before = copy.deepcopy(model)
    with torch.no_grad():
        wanted = before(IDS).logits
        adapters = inject_adapters(model, AdapterSettings(lora_r=4, lora_target_modules=BOTH), seed=1)
        close = 1e-5 if dtype == torch.float32 else 0.1
        assert (model(IDS).logits - wanted).abs().max() < close
        with adapters.disabled():
            assert torch.equal(model(IDS).logits, wanted)
    adapters.remove()
    assert [n for n, _ in model.named_modules()] == [n for n, _ in before.named_modules()]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_in_memory_gives_the_same_answers(family: str):
    model = tiny_model(family)
    adapters = grown(model, lora_target_modules=["q_proj", *BOTH])
    with torch.no_grad():
        wanted = model(IDS).logits
        adapters.merge_()
        assert (model(IDS).logits - wanted).abs().max() < 1e-4
        assert (tiny_model(family)(IDS).logits - wanted).abs().max() > 0.1


def test_files_come_back_bit_equal(tmp_path: Path):
    model = tiny_model("mixtral")
    save_adapter(grown(model, lora_target_modules=["v_proj", *BOTH]), tmp_path / "a", base_model_name="tiny")
    loaded = load_adapter(tiny_model("mixtral"), tmp_path / "a", trainable=True)
    save_adapter(loaded, tmp_path / "b", base_model_name="tiny")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert all(p.requires_grad for p in loaded.parameters())
    assert len(loaded.parameters()) == 2 * 2 * 3


def test_copies_of_a_model_are_independent():
    model = tiny_model("mixtral").requires_grad_(False)
    grown(model, lora_target_modules=BOTH)
    other = copy.deepcopy(model)
    with torch.no_grad():
        wanted = model(IDS).logits
        for p in other.parameters():
            if p.requires_grad:
                p.zero_()
        assert torch.equal(model(IDS).logits, wanted)
        assert (other(IDS).logits - tiny_model("mixtral")(IDS).logits).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"use_dora": True}, ConfigError, "--use-dora is for linears"),
        ({"lora_dropout": 0.1}, ConfigError, "--lora-dropout cannot be applied to model.layers.0.mlp.experts"),
        ({"init_lora_weights": "pissa"}, ConfigError, "--init-lora-weights pissa is no start for"),
        ({"lu_lora_final_layer_index": 0}, ConfigError, "leaves model.layers.0.mlp.experts"),
        ({"lora_modules_to_save": ["mlp.experts"]}, AdapterError, "is adapted and in --lora-modules-to-save"),
    ],
)
def test_what_cannot_be_is_one_sentence(settings: dict, error: type[Exception], words: str):
    model = tiny_model("mixtral").requires_grad_(False)
    with pytest.raises(error, match=words) as caught:
        inject_adapters(model, AdapterSettings(lora_r=4, lora_target_modules=["q_proj", *BOTH], **settings), seed=1)
    assert "\n" not in str(caught.value)


def test_experts_of_another_form_are_refused():
    model = tiny_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.forward = lambda x, index, weights: 2 * type(experts).forward(experts, x, index, weights)
    with pytest.raises(AdapterError, match="holds its experts in a form that finerank cannot adapt"):
        inject_adapters(model, AdapterSettings(lora_target_modules=BOTH), seed=1)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"target_parameters": ["gate_up_proj"]}, "2 pairs of factors"),
        ({"target_parameters": None}, "none of its parameters"),
        ({"r": 2}, "was trained on another base|rank"),
    ],
)
def test_files_that_disagree_are_refused(tmp_path: Path, config: dict, words: str):
    save_adapter(grown(tiny_model("mixtral"), lora_target_modules=BOTH), tmp_path, base_model_name="tiny")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(AdapterError, match=words):
        load_adapter(tiny_model("mixtral"), tmp_path)


def test_the_router_of_peft_is_refused(tmp_path: Path):
    model = peft.get_peft_model(
        tiny_model("mixtral"), peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["gate.weight"])
    )
    model.save_pretrained(tmp_path)
    assert any("mlp.gate.lora_A" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    with pytest.raises(AdapterError, match=r"mlp\.gate"):
        load_adapter(tiny_model("mixtral"), tmp_path)


def single_experts(folder: Path, family: str, *, shared: bool = False) -> None:
    """An adapter as PEFT wrote it where each expert's linears were modules, and as Megatron's local experts are."""
    names = {"mixtral": "block_sparse_moe.experts.{}.{}", "qwen3_moe": "mlp.experts.{}.{}"}[family]
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    config = tiny_model(family).config
    D, wide = config.hidden_size, getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    g = torch.Generator().manual_seed(3)
    tensors = {}
    for layer in range(2):
        for expert in range(4):
            first_A = torch.randn(3, D, generator=g)
            for name in (gate, up, down):
                I, O = (wide, D) if name == down else (D, wide)  # noqa: E741
                a = first_A if shared and name != down else torch.randn(3, I, generator=g)
                prefix = f"base_model.model.model.layers.{layer}.{names.format(expert, name)}"
                tensors[f"{prefix}.lora_A.weight"] = 0.2 * a
                tensors[f"{prefix}.lora_B.weight"] = 0.2 * torch.randn(O, 3, generator=g)
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(3, D, generator=g)
        tensors[f"{prefix}.lora_B.weight"] = 0.2 * torch.randn(32, 3, generator=g)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 3,
        "lora_alpha": 5,
        "lora_dropout": 0.0,
        "bias": "none",
    }
    folder.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    text = json.dumps({**values, "target_modules": ["q_proj", gate, up, down]})
    (folder / "adapter_config.json").write_text(text)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shared", [False, True])
def test_adapters_of_single_experts_run_as_in_peft(tmp_path: Path, family: str, shared: bool):
    single_experts(tmp_path / "single", family, shared=shared)
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "single").eval()
    model = tiny_model(family)
    adapters = load_adapter(model, tmp_path / "single", trainable=True)
    save_adapter(adapters, tmp_path / "fused", base_model_name="tiny")
    again = peft.PeftModel.from_pretrained(tiny_model(family), tmp_path / "fused").eval()
    with torch.no_grad():
        ours, wanted = model(IDS).logits, theirs(IDS).logits
        assert (ours - wanted).abs().max() < 2e-5
        assert (again(IDS).logits - wanted).abs().max() < 2e-5
        assert (ours - tiny_model(family)(IDS).logits).abs().max() > 0.05
    ranks = {factors.lora_A.shape[0] // 4 for part in adapters.parts.values() for factors in part.factors.values()}
    assert ranks == ({3} if shared else {3, 6})


def test_single_experts_that_differ_are_refused(tmp_path: Path):
    single_experts(tmp_path, "mixtral")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kept = {name: t for name, t in tensors.items() if "layers.1.block_sparse_moe.experts.2.w2" not in name}
    save_file(kept, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"does not adapt all experts of model\.layers\.1\.mlp\.experts alike"):
        load_adapter(tiny_model("mixtral"), tmp_path)
