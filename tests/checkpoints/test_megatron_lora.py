"""LoRA checkpoints in Megatron's form: the original programs' files, and PEFT adapters there and back."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft as peft_library
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finerank.checkpoints import megatron
from finerank.checkpoints.formats import hf, legacy, mcore, peft
from finerank.checkpoints.lora import Adapter, Factors
from finerank.checkpoints.megatron_lora import read_lora
from finerank.checkpoints.merge import merged_model, plan_merge
from finerank.checkpoints.regroup import lora_config
from finerank.checkpoints.torch_file import StoredTensor, TorchFile, walk
from finerank.checkpoints.weights import BaseModel, same_bits
from finerank.cli import main
from finerank.errors import AdapterError
from tiny import save_tiny, tiny_model

CASE = Path("golden/cases/llama_untied_tp2pp2")
QKV = ("q_proj", "k_proj", "v_proj")


def same_factors(a: Adapter, b: Adapter) -> None:
    assert set(a.factors) == set(b.factors)
    for name, factors in b.factors.items():
        mine = a.factors[name]
        assert same_bits(mine.a_RI, factors.a_RI) and same_bits(mine.b_OR, factors.b_OR), name
        assert mine.scale == factors.scale, name


def delta(f: Factors) -> torch.Tensor:
    return f.scale * (f.b_OR.double() @ f.a_RI.double())


def adapter_of(
    base: BaseModel,
    modules: list[str],
    *,
    rank: Any = 3,
    alpha: float = 6,
    shared: bool = False,
    seed: int = 0,
    **more: Any,
) -> Adapter:
    """Random factors on every layer's modules; `shared` gives q, k, v one A and gate, up one A."""
    generator = torch.Generator().manual_seed(0)
    factors, group_a = {}, {}
    for name in base.weights:
        module = name.removesuffix(".weight")
        leaf = module.rsplit(".", 1)[-1]
        if leaf not in modules or "layers" not in module:
            continue
        out, inner = base.weights.info(name).shape
        r = rank if isinstance(rank, int) else rank[leaf]
        a = torch.randn(r, inner, generator=generator)
        if shared:
            key = (module.split(".")[2], "qkv" if leaf in QKV else "fc1" if leaf in ("gate_proj", "up_proj") else leaf)
            a = group_a.setdefault(key, a)
        factors[module] = Factors(a, torch.randn(out, r, generator=generator), alpha / r)
    biggest = rank if isinstance(rank, int) else max(rank.values())
    config = lora_config(biggest, alpha, factors, **more)
    return Adapter(config=config, factors=factors)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tmp_path_factory.mktemp("base")
    return hf.read(save_tiny(folder, "llama", num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4))


@pytest.mark.parametrize("kind", ["lora_filtered", "lora_unified"])
def test_original_lora_checkpoints_merge_to_the_original_result(kind: str, shared: Path) -> None:
    """The original program rounds `B A` to the base's dtype before adding; with that rule we get its bits."""
    case = shared / CASE
    model = mcore.read(case / ("mg" if kind == "lora_filtered" else kind))
    adapter = read_lora(case / kind, lora_alpha=8)
    merged = hf.read(case / "merged_hf_lora_filtered").weights
    assert adapter.factors["model.layers.3.mlp.up_proj"].rank == 4
    for name in merged:
        factors = adapter.factors.get(name.removesuffix(".weight"))
        weight = model.weights[name]
        if factors is not None:
            product = (factors.b_OR.float() @ factors.a_RI.float()).to(weight.dtype)
            weight = weight + product * factors.scale
        assert same_bits(weight, merged[name]), name


def test_our_merge_of_the_original_checkpoint_is_nearer_to_the_exact_sum(shared: Path) -> None:
    case = shared / CASE
    model, adapter = mcore.read(case / "mg"), read_lora(case / "lora_filtered", lora_alpha=8)
    theirs = hf.read(case / "merged_hf_lora_filtered").weights
    ours = merged_model(model, plan_merge(model, adapter)).weights
    errors = [0.0, 0.0]
    for module, factors in adapter.factors.items():
        name = f"{module}.weight"
        exact = model.weights[name].double() + delta(factors)
        assert same_bits(ours[name], exact.float().to(torch.bfloat16)) or (ours[name] - exact).abs().max() < 1e-3
        errors[0] += float((ours[name].double() - exact).abs().sum())
        errors[1] += float((theirs[name].double() - exact).abs().sum())
    assert errors[0] < errors[1]


@pytest.mark.parametrize("kind,with_base", [("lora_filtered", False), ("lora_unified", True)])
def test_our_files_hold_the_original_keys_and_bits(kind: str, with_base: bool, shared: Path, tmp_path: Path) -> None:
    case = shared / CASE
    model = hf.read(shared / "golden" / "models" / "llama_untied")
    adapter = read_lora(case / kind, lora_alpha=8)
    mcore.write_adapter(adapter, tmp_path, base=model, target=megatron.Target(tp=2, pp=2), with_base=with_base)
    for original in sorted((case / kind).rglob("*.pt")):
        theirs, ours = TorchFile(original), TorchFile(tmp_path / original.relative_to(case / kind))
        a, b = (dict(walk({k: v for k, v in f.content.items() if k != "args"})) for f in (theirs, ours))
        assert set(a) == set(b)
        for name, value in a.items():
            if isinstance(value, StoredTensor):
                assert same_bits(theirs.read(value), ours.read(b[name])), name


SPLITS = [
    {},
    {"tp": 2},
    {"tp": 4, "pp": 2},
    {"tp": 2, "pp": 2, "layers_per_virtual_stage": 1},
    {"pp": 2, "num_layer_list": [1, 3]},
]
TARGETS = {
    "alpaca": ["q_proj", "v_proj"],
    "all": [*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"],
    "issue": [*QKV, "gate_proj", "up_proj"],
    "row": ["o_proj", "down_proj"],
}


@pytest.mark.parametrize("form", [mcore, legacy], ids=["mcore", "legacy"])
@pytest.mark.parametrize("shared_a", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("modules", TARGETS.values(), ids=TARGETS)
def test_adapters_come_back_bit_equal(
    base: BaseModel, modules: list[str], shared_a: bool, form: Any, tmp_path: Path
) -> None:
    adapter = adapter_of(base, modules, shared=shared_a)
    for i, split in enumerate(SPLITS):
        folder = tmp_path / str(i)
        folder.mkdir()
        form.write_adapter(adapter, folder, base=base, target=megatron.Target(**split))
        again = form.read_adapter(folder)
        same_factors(again, adapter)
        assert again.config == adapter.config


def test_shared_factors_keep_their_rank_and_separate_ones_become_blocks(base: BaseModel, tmp_path: Path) -> None:
    for shared_a, rank, alpha in ((True, 3, 6), (False, 9, 18)):
        folder = tmp_path / str(shared_a)
        folder.mkdir()
        mcore.write_adapter(adapter_of(base, TARGETS["issue"], shared=shared_a), folder, base=base)
        args = megatron.MegatronCheckpoint.open(folder).args
        assert (args["lora_r"], args["lora_alpha"]) == (rank, alpha)
        assert args["lora_target_modules"] == ["linear_fc1", "linear_qkv"]


def test_blocks_trained_further_stay_the_same_change(base: BaseModel, tmp_path: Path) -> None:
    """Once another program has filled the zeros between the blocks, the parts share one A of the large rank."""
    mcore.write_adapter(adapter_of(base, list(QKV)), tmp_path, base=base)
    path = tmp_path / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    key = "decoder.layers.2.self_attention.linear_qkv.lora_B.default.weight"
    content["model"][key] += 0.5
    torch.save(content, path)
    again = mcore.read_adapter(tmp_path)
    assert again.config["r"] == 9 and again.config["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    a = content["model"][key.replace("lora_B", "lora_A")]
    shared_a = [again.factors[f"model.layers.2.self_attn.{p}"].a_RI for p in QKV]
    assert all(torch.equal(x, a) for x in shared_a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_without_a_field_are_folded(base: BaseModel, dtype: torch.dtype, tmp_path: Path) -> None:
    """rsLoRA and an alpha pattern: the change is the same, and 16-bit factors come back with their bits."""
    adapter = adapter_of(
        base,
        TARGETS["all"],
        rank=3,
        alpha=5,
        use_rslora=True,
        alpha_pattern={"down_proj": 7, "layers.1.mlp.up_proj": 2},
    )
    from finerank.adapters.shapes import shape_of

    for name, f in adapter.factors.items():
        scale = shape_of(adapter.config, name).scale
        adapter.factors[name] = Factors(f.a_RI.to(dtype), f.b_OR.to(dtype), scale)
    mcore.write_adapter(adapter, tmp_path, base=base, target=megatron.Target(tp=2))
    checkpoint = megatron.MegatronCheckpoint.open(tmp_path)
    assert isinstance(checkpoint.args["lora_alpha"], int)
    again = mcore.read_adapter(tmp_path)
    for name, f in adapter.factors.items():
        error = (delta(again.factors[name]) - delta(f)).abs().max()
        assert error <= 1e-6 * delta(f).abs().max(), name
    if dtype == torch.bfloat16:
        same_factors(again, adapter)
    # without the record: what Megatron itself would compute
    del checkpoint.args["finerank_lora"]
    content = torch.load(tmp_path / "iter_0000001/mp_rank_00/model_optim_rng.pt", weights_only=False)
    del content["args"].finerank_lora
    torch.save(content, tmp_path / "iter_0000001/mp_rank_00/model_optim_rng.pt")
    plain = mcore.read_adapter(tmp_path)
    for name, f in adapter.factors.items():
        assert (delta(plain.factors[name]) - delta(f)).abs().max() <= 1e-6 * delta(f).abs().max(), name


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    modules=st.lists(st.sampled_from(TARGETS["all"]), min_size=1, unique=True),
    ranks=st.lists(st.integers(1, 4), min_size=7, max_size=7),
    shared_a=st.booleans(),
    split=st.sampled_from(SPLITS),
)
def test_random_adapters_come_back_bit_equal(
    base: BaseModel, modules: list[str], ranks: list[int], shared_a: bool, split: dict[str, Any], tmp_path: Path
) -> None:
    rank = dict(zip(TARGETS["all"], ranks, strict=True)) if not shared_a else ranks[0]
    pattern = {} if shared_a else {m: rank[m] for m in modules}
    biggest = rank if shared_a else max(rank.values())
    adapter = adapter_of(base, modules, rank=rank, alpha=4, shared=shared_a, rank_pattern=pattern)
    assert adapter.config["r"] == biggest
    # equal scales, so that nothing needs folding: alpha pattern = 4 * rank
    adapter.config["alpha_pattern"] = {m: 4 * (rank if shared_a else rank[m]) for m in modules}
    for name, f in adapter.factors.items():
        adapter.factors[name] = Factors(f.a_RI, f.b_OR, 4.0)
    folder = tmp_path / "x"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    mcore.write_adapter(adapter, folder, base=base, target=megatron.Target(**split))
    same_factors(mcore.read_adapter(folder), adapter)


def test_a_real_peft_adapter_goes_there_and_back(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", "qwen2")
    model = peft_library.get_peft_model(tiny_model("qwen2"), peft_library.LoraConfig(target_modules=TARGETS["issue"]))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    argv = ["export", "--load", str(folder), "--lora-load", str(tmp_path / "adapter"), "--to", "mcore"]
    argv += ["--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2"]
    assert main([*argv, "--save-dir", str(tmp_path / "mg")]) == 0
    argv = ["convert", "--load-dir", str(folder), "--lora-load", str(tmp_path / "mg"), "--save-lora-to-hf"]
    assert main([*argv, "--save-dir", str(tmp_path / "back")]) == 0
    before, after = (tmp_path / x / "adapter_model.safetensors" for x in ("adapter", "back"))
    same_factors(peft.read_adapter(after.parent), peft.read_adapter(before.parent))
    again = peft_library.PeftModel.from_pretrained(tiny_model("qwen2"), tmp_path / "back")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("form", ["full", "filtered"])
def test_unified_and_filtered_checkpoints_convert_to_the_same_merge(form: str, tmp_path: Path) -> None:
    """qwen2's biases survive a unified checkpoint, which the original program drops."""
    folder = save_tiny(tmp_path / "base", "qwen2")
    adapter = adapter_of(hf.read(folder), TARGETS["all"])
    (tmp_path / "adapter").mkdir()
    peft.write_adapter(adapter, tmp_path / "adapter")
    proof = ["--proof", "weights"]
    common = ["--load", str(folder), "--lora-load", str(tmp_path / "adapter")]
    assert main(["merge", *common, "--save-dir", str(tmp_path / "merged"), *proof]) == 0
    cut = ["--target-tensor-parallel-size", "2", "--lora-form", form]
    assert main(["export", *common, "--to", "mcore", "--save-dir", str(tmp_path / "mg"), *cut]) == 0
    if form == "full":
        argv = ["convert", "--load-dir", str(tmp_path / "mg"), "--lora-r", "9"]
    else:
        argv = ["convert", "--load-dir", str(folder), "--lora-load", str(tmp_path / "mg"), "--lora-alpha", "18"]
    assert main([*argv, "--save-dir", str(tmp_path / "out")]) == 0
    a, b = hf.read(tmp_path / "out").weights, hf.read(tmp_path / "merged").weights
    assert set(a) == set(b) and all(same_bits(a[n], b[n]) for n in b)


@pytest.mark.parametrize(
    "flags,match",
    [
        ({}, "give --lora-alpha"),
        ({"lora_alpha": 8, "lora_r": 5}, "--lora-r 5 disagrees"),
        ({"lora_alpha": 8, "lora_target_modules": ["linear_qkv"]}, "--lora-target-modules linear_qkv disagrees"),
    ],
)
def test_flags_that_disagree_are_refused(flags: dict[str, Any], match: str, shared: Path) -> None:
    with pytest.raises(AdapterError, match=match):
        read_lora(shared / CASE / "lora_filtered", **flags)
    legacy_names = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    assert read_lora(shared / CASE / "lora_filtered", lora_alpha=8, lora_r=4, lora_target_modules=legacy_names)


def test_a_wrong_alpha_is_refused_where_it_is_recorded(base: BaseModel, tmp_path: Path) -> None:
    mcore.write_adapter(adapter_of(base, ["q_proj"]), tmp_path, base=base)
    assert mcore.read_adapter(tmp_path, lora_alpha=6)
    with pytest.raises(AdapterError, match=r"--lora-alpha 32 disagrees.*has 6"):
        mcore.read_adapter(tmp_path, lora_alpha=32)


def test_what_megatron_cannot_hold_is_refused_with_the_way_out(base: BaseModel, tmp_path: Path) -> None:
    plain = adapter_of(base, ["q_proj"])
    name = "model.layers.0.self_attn.q_proj"
    f = plain.factors[name]
    dora = Adapter(plain.config, {name: Factors(f.a_RI, f.b_OR, f.scale, magnitude_O=f.b_OR[:, 0])})
    whole = Adapter(plain.config, plain.factors, whole={"lm_head.weight": torch.zeros(2, 2)})
    head = Adapter(plain.config, {"lm_head": Factors(torch.zeros(1, 32), torch.zeros(384, 1), 1.0)})
    for adapter, match in ((dora, "DoRA"), (whole, r"lm_head\.weight whole"), (head, "lm_head")):
        with pytest.raises(AdapterError, match=match):
            mcore.write_adapter(adapter, tmp_path, base=base)


def test_a_damaged_record_is_ignored(base: BaseModel) -> None:
    from finerank.checkpoints.regroup import read_record

    for text in (
        "",
        "[]",
        "{}",
        '{"config": {}, "modules": {"a": [1]}}',
        "[" * 100_000,
        '{"config":{},"modules":[]}',
        None,
    ):
        assert read_record({"finerank_lora": text}) is None
    good = {"config": {}, "modules": {"a": [0, 1, 1.0, "torch.float32"]}}
    assert read_record({"finerank_lora": json.dumps(good)}) == good
