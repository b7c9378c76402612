"""Megatron checkpoints: the original programs' files, and round trips of every family through every kind of split."""

import json
import shutil
from pathlib import Path
from typing import Any

import packing_reference as reference
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finerank.checkpoints import megatron
from finerank.checkpoints.formats import hf, legacy, mcore
from finerank.checkpoints.torch_file import StoredTensor, TorchFile, walk
from finerank.checkpoints.weights import BaseModel, Weights, in_memory, same_bits
from finerank.cli import main
from finerank.errors import CheckpointError, ConfigError
from tiny import FAMILIES, VOCAB_SIZE, tiny_config, tiny_model, tiny_tokenizer

GOLDEN = [
    ("llama_untied_tp2pp2", "llama_untied", mcore, {"tp": 2, "pp": 2}),
    ("qwen3_tied_tp1pp2_vpp1", "qwen3_tied", mcore, {"pp": 2, "layers_per_virtual_stage": 1}),
    ("legacy_llama_tied_tp2pp1", "llama_tied", legacy, {"tp": 2}),
]


def assert_same(a: Weights, b: Weights) -> None:
    assert set(a) == set(b), set(a) ^ set(b)
    for name in b:
        assert a.info(name) == b.info(name), name
        assert same_bits(a[name], b[name]), name


def tensors_of(path: Path) -> dict[str, Any]:
    """Everything but args, tensors read."""
    file = TorchFile(path)
    leaves = walk({k: v for k, v in file.content.items() if k != "args"})
    return {name: file.read(value) if isinstance(value, StoredTensor) else value for name, value in leaves}


def base_of(family: str, *, dtype: torch.dtype = torch.bfloat16, **overrides: Any) -> BaseModel:
    """A tiny model under its files' names (the library holds experts fused in memory)."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        tiny_model(family, **overrides).to(dtype).save_pretrained(folder)
        model = hf.read(Path(folder))
        return BaseModel(config=model.config, weights=in_memory(dict(model.weights)))


@pytest.mark.parametrize("case,model,form,target", GOLDEN)
def test_original_files_give_the_original_model(case: str, model: str, form: Any, target: Any, shared: Path) -> None:
    folder = shared / "golden" / "cases" / case / "mg"
    assert form.matches(folder)
    read = form.read(folder)
    expected = hf.read(shared / "golden" / "models" / model)
    assert_same(read.weights, expected.weights)
    for key in ("hidden_size", "num_key_value_heads", "head_dim", "tie_word_embeddings", "vocab_size", "rms_norm_eps"):
        assert read.config[key] == expected.config[key]


@pytest.mark.parametrize("case,model,form,target", GOLDEN)
def test_our_files_hold_the_original_keys_and_bits(
    case: str, model: str, form: Any, target: Any, shared: Path, tmp_path: Path
) -> None:
    form.write(hf.read(shared / "golden" / "models" / model), tmp_path, target=megatron.Target(**target))
    original = shared / "golden" / "cases" / case / "mg"
    files = sorted(p.relative_to(original) for p in original.rglob("*.pt"))
    assert files == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*.pt"))
    for file in files:
        ours, theirs = tensors_of(tmp_path / file), tensors_of(original / file)
        assert list(ours) == list(theirs) or set(ours) == set(theirs)
        for name, value in theirs.items():
            assert same_bits(ours[name], value) if isinstance(value, torch.Tensor) else ours[name] == value, name


def test_our_files_load_with_plain_torch(tmp_path: Path) -> None:
    model = base_of("llama")
    mcore.write(model, tmp_path, target=megatron.Target(pp=2))
    path = tmp_path / "iter_0000001" / "mp_rank_00_001" / "model_optim_rng.pt"
    loaded = torch.load(path, weights_only=False, mmap=True)
    assert loaded["checkpoint_version"] == 3.0 and loaded["iteration"] == 1
    assert loaded["args"].num_query_groups == loaded["args"].num_key_value_heads == 2
    assert loaded["args"].group_query_attention is True
    assert torch.equal(loaded["model"]["decoder.final_layernorm.weight"], model.weights["model.norm.weight"])


def test_shards_equal_the_slow_reference(tmp_path: Path) -> None:
    model = base_of("qwen2")
    mcore.write(model, tmp_path, target=megatron.Target(tp=2))
    w = model.weights
    for rank in range(2):
        got = tensors_of(tmp_path / "iter_0000001" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt")
        for suffix in ("weight", "bias"):
            q, k, v = (w[f"model.layers.1.self_attn.{p}_proj.{suffix}"] for p in "qkv")
            qkv = reference.pack_qkv(q, k, v, heads=4, groups=2, d=8)
            name = f"model.decoder.layers.1.self_attention.linear_qkv.{suffix}"
            assert torch.equal(got[name], reference.rows_of_rank(qkv, tp=2, rank=rank))
        gate, up = (w[f"model.layers.1.mlp.{p}_proj.weight"] for p in ("gate", "up"))
        expected = reference.fc1_of_rank(gate, up, tp=2, rank=rank)
        assert torch.equal(got["model.decoder.layers.1.mlp.linear_fc1.weight"], expected)
        down = reference.columns_of_rank(w["model.layers.1.mlp.down_proj.weight"], tp=2, rank=rank)
        assert torch.equal(got["model.decoder.layers.1.mlp.linear_fc2.weight"], down)


SPLITS = [
    {},
    {"tp": 2},
    {"tp": 4, "divisible_by": 50},
    {"pp": 2},
    {"tp": 2, "pp": 2, "layers_per_virtual_stage": 1},
    {"tp": 4, "pp": 2, "num_layer_list": [3, 1]},
    {"pp": 2, "schedules_method": "dualpipev", "te_norms": True},
    {"tp": 2, "pp": 3, "noop_layers": [0, 5]},
]


@pytest.mark.parametrize("form", [mcore, legacy], ids=["mcore", "legacy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_bit_equal_from_every_split(family: str, form: Any, tmp_path: Path) -> None:
    overrides = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = base_of(family, **overrides)
    experts = {"ep": 2} if family in ("mixtral", "qwen3_moe") else {}
    for i, split in enumerate(SPLITS):
        for more in ({}, experts) if experts and "tp" in split else ({},):
            folder = tmp_path / f"{i}{len(more)}"
            folder.mkdir()
            form.write(model, folder, target=megatron.Target(**split, **more))
            assert_same(form.read(folder).weights, model.weights)
            shutil.rmtree(folder)


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    tp, pp = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    groups = tp * draw(st.integers(1, 2))
    layers = pp * draw(st.integers(1, 2))
    target: dict[str, Any] = {"tp": tp, "pp": pp, "divisible_by": draw(st.sampled_from([1, 7, 64]))}
    if pp == 2 and draw(st.booleans()):
        layers, target["layers_per_virtual_stage"] = 4, 1
    heads = groups * draw(st.integers(1, 3))
    config = {
        "num_key_value_heads": groups,
        "num_attention_heads": heads,
        "head_dim": 2 * draw(st.integers(1, 3)),
        "hidden_size": heads * draw(st.integers(1, 2)),
        "intermediate_size": tp * draw(st.integers(1, 4)),
        "num_hidden_layers": layers,
        "vocab_size": draw(st.integers(5, 40)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    return config, target


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(), form=st.sampled_from([mcore, legacy]), family=st.sampled_from(["llama", "qwen3"]))
def test_random_shapes_come_back_bit_equal(case: Any, form: Any, family: str, tmp_path: Path) -> None:
    config, target = case
    values = {**config, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    built = tiny_config(family, **values)
    model = transformers.AutoModelForCausalLM.from_config(built)
    tensors = {n: t for n, t in model.state_dict().items() if not (built.tie_word_embeddings and n == "lm_head.weight")}
    base = BaseModel(config=built.to_dict(), weights=in_memory(tensors))
    folder = tmp_path / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    form.write(base, folder, target=megatron.Target(**target))
    assert_same(form.read(folder).weights, base.weights)


def save(model: BaseModel, folder: Path) -> Path:
    folder.mkdir()
    hf.write(model, folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("flags", [[], ["--save-to-legacy"], ["--transformer-impl", "transformer_engine"]])
def test_the_command_converts_there_and_back(flags: list[str], tmp_path: Path) -> None:
    source = save(base_of("qwen3", num_hidden_layers=4), tmp_path / "hf")
    cut = ["--target-tensor-parallel-size", "2", "--target-pipeline-parallel-size", "2", *flags]
    mg, back = tmp_path / "mg", tmp_path / "back"
    argv = ["convert", "--load-model-type", "hf", "--save-model-type", "mg", "--load-dir", str(source)]
    assert main([*argv, "--save-dir", str(mg), "--model-type-hf", "qwen3", *cut]) == 0
    argv = ["convert", "--load-model-type", "mg", "--save-model-type", "hf", "--load-dir", str(mg)]
    assert main([*argv, "--save-dir", str(back), "--hf-cfg-dir", str(source)]) == 0
    assert_same(hf.read(back).weights, hf.read(source).weights)
    assert (back / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    ids = torch.arange(30).reshape(2, 15)
    with torch.no_grad():
        a, b = (transformers.AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (source, back))
    assert torch.equal(a, b)


def test_resharding_needs_no_hugging_face_folder(tmp_path: Path) -> None:
    model = base_of("qwen2", num_hidden_layers=4)
    (tmp_path / "a").mkdir()
    mcore.write(model, tmp_path / "a", target=megatron.Target(tp=2, pp=2, layers_per_virtual_stage=1))
    argv = ["convert", "--load-dir", str(tmp_path / "a"), "--save-dir", str(tmp_path / "b"), "--save-model-type", "mg"]
    assert main([*argv, "--num-layer-list", "1,3", "--target-pipeline-parallel-size", "2", "--save-to-legacy"]) == 0
    assert_same(legacy.read(tmp_path / "b").weights, model.weights)


def test_a_config_is_made_from_the_args_of_a_trained_checkpoint(tmp_path: Path) -> None:
    from finerank.checkpoints.megatron_args import config_of
    from finerank.models.families import dims_of, family_named

    args = {
        **{"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4, "kv_channels": 8},
        **{"group_query_attention": True, "num_query_groups": 2, "padded_vocab_size": 384, "norm_epsilon": 1e-6},
        **{"untie_embeddings_and_output_weights": True, "rotary_base": 1000000, "max_position_embeddings": 512},
    }
    config = config_of(args, family=family_named("qwen3"), source="x")
    dims = dims_of(config)
    assert (dims.num_layers, dims.num_key_value_heads, dims.head_dim, dims.vocab_size) == (4, 2, 8, 384)
    assert transformers.AutoConfig.for_model(**config).num_key_value_heads == 2
    with pytest.raises(CheckpointError, match="--hf-cfg-dir"):
        config_of(args, family=None, source="x")


def test_a_group_query_checkpoint_is_never_read_as_multi_head(tmp_path: Path) -> None:
    model = base_of("llama")
    mcore.write(model, tmp_path)
    wrong = {**model.config, "num_key_value_heads": 4}
    with pytest.raises(CheckpointError, match="key-value heads"):
        mcore.read(tmp_path, hf_config=wrong)


def test_grouped_gemm_experts_come_apart(tmp_path: Path) -> None:
    model = base_of("mixtral")
    mcore.write(model, tmp_path, target=megatron.Target(tp=2))
    for rank in range(2):
        path = tmp_path / "iter_0000001" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
        content = torch.load(path, weights_only=False)
        tensors = content["model"]
        for layer in range(2):
            prefix = f"decoder.layers.{layer}.mlp.experts"
            fc1 = [tensors.pop(f"{prefix}.local_experts.{j}.linear_fc1.weight") for j in range(4)]
            fc2 = [tensors.pop(f"{prefix}.local_experts.{j}.linear_fc2.weight") for j in range(4)]
            stacked = torch.stack([w.T for w in fc1])
            tensors[f"{prefix}.weight1"] = stacked.contiguous().view(fc1[0].shape[1], -1)
            tensors[f"{prefix}.weight2"] = torch.cat([w.T for w in fc2])
        torch.save(content, path)
    assert_same(mcore.read(tmp_path).weights, model.weights)


def test_release_wrapped_names_and_extra_state_are_read(tmp_path: Path) -> None:
    model = base_of("llama")
    mcore.write(model, tmp_path)
    path = tmp_path / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content["model"] = {f"module.{k}": v for k, v in content["model"].items()}
    content["model"]["module.decoder.layers.0.self_attention.linear_qkv._extra_state"] = None
    content["rng_state"] = [{"np_rng_state": ("MT19937", torch.zeros(3).numpy(), 1, 0, 0.0)}]
    torch.save(content, path)
    (tmp_path / "iter_0000001").rename(tmp_path / "release")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert_same(mcore.read(tmp_path).weights, model.weights)


def test_ranks_that_drifted_apart_are_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = base_of("llama")
    mcore.write(model, tmp_path, target=megatron.Target(tp=2))
    path = tmp_path / "iter_0000001" / "mp_rank_01" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content["model"]["decoder.layers.1.input_layernorm.weight"] += 1
    torch.save(content, path)
    read = mcore.read(tmp_path)
    assert_same(read.weights, model.weights)
    assert "differs between tensor-parallel ranks" in caplog.text


def test_damage_is_named(tmp_path: Path) -> None:
    model = base_of("llama", num_hidden_layers=4)
    whole = tmp_path / "whole"
    whole.mkdir()
    mcore.write(model, whole, target=megatron.Target(tp=2, pp=2))
    rank = Path("iter_0000001") / "mp_rank_01_001" / "model_optim_rng.pt"

    def broken(change: Any) -> Path:
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        change(folder)
        return folder

    def cut(folder: Path) -> None:
        data = (folder / rank).read_bytes()
        (folder / rank).write_bytes(data[: len(data) // 2])

    def flip(folder: Path) -> None:
        data = bytearray((folder / rank).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / rank).write_bytes(bytes(data))

    for change in (cut, flip, lambda f: shutil.rmtree((f / rank).parent), lambda f: (f / rank).unlink()):
        folder = broken(change)
        with pytest.raises(CheckpointError, match=r"mp_rank_01_001|rank tp 1 pp 1"):
            dict(mcore.read(folder).weights)
    folder = broken(lambda f: (f / "latest_checkpointed_iteration.txt").write_text("../../etc"))
    with pytest.raises(CheckpointError, match="step number"):
        mcore.read(folder)
    config = {**model.config, "num_hidden_layers": 5}
    with pytest.raises(CheckpointError, match="holds 4 layers"):
        mcore.read(whole, hf_config=config)


def test_sizes_that_do_not_divide_are_refused_with_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_key_value_heads \(2\).*use 1 or 2"):
        mcore.write(base_of("llama"), tmp_path, target=megatron.Target(tp=4))
    with pytest.raises(ConfigError, match="expert"):
        mcore.write(base_of("llama"), tmp_path, target=megatron.Target(ep=2))


def test_flags_without_effect_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(base_of("llama"), tmp_path / "hf")
    argv = ["convert", "--load-dir", str(source), "--save-dir", str(tmp_path / "out")]
    for flag in (["--target-pipeline-parallel-size", "2"], ["--lora-alpha", "3"], ["--load-model-type", "mg"]):
        assert main([*argv, *flag]) == 2
        assert flag[0] in capsys.readouterr().err
    assert main([*argv, "--model-type-hf", "qwen3"]) == 2
    assert not (tmp_path / "out").exists()


def test_a_cast_is_asked_for(tmp_path: Path) -> None:
    source = save(base_of("llama", dtype=torch.float32), tmp_path / "hf")
    argv = ["convert", "--load-dir", str(source), "--save-dir", str(tmp_path / "out"), "--params-dtype", "bf16"]
    assert main(argv) == 0
    out = hf.read(tmp_path / "out")
    assert out.config["dtype"] == "bfloat16"
    for name, tensor in hf.read(source).weights.items():
        assert same_bits(out.weights[name], tensor.to(torch.bfloat16))


def test_vocabulary_padding_is_recorded(tmp_path: Path) -> None:
    mcore.write(base_of("llama"), tmp_path, target=megatron.Target(tp=2, divisible_by=128))
    args = megatron.MegatronCheckpoint.open(tmp_path).args
    assert (args["vocab_size"], args["padded_vocab_size"]) == (VOCAB_SIZE, 512)
    assert json.loads(args["finerank_hf_config"])["model_type"] == "llama"


@pytest.mark.slow
def test_the_real_model_comes_back_bit_equal_from_three_ranks(smollm2: Path, tmp_path: Path) -> None:
    model = hf.read(smollm2)
    for form, split in ((mcore, {"tp": 3, "pp": 2, "divisible_by": 128}), (legacy, {"tp": 3, "num_layer_list": [30]})):
        folder = tmp_path / form.__name__
        folder.mkdir()
        form.write(model, folder, target=megatron.Target(**split))
        assert_same(form.read(folder).weights, model.weights)
        shutil.rmtree(folder)
