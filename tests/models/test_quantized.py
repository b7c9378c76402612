"""Quantised base linears: bitsandbytes' numbers, the same adapter on top, and what loading owes."""

import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from finerank.adapters.files import load_adapter, save_adapter
from finerank.adapters.inject import inject_adapters
from finerank.adapters.lora import LoRALinear
from finerank.adapters.settings import AdapterSettings
from finerank.errors import AdapterError, ConfigError, MissingExtraError, ModelError
from finerank.models import packed as packed_weights
from finerank.models.load import load_model
from finerank.models.quantized import QuantizedLinear, num_weights
from finerank.models.settings import ModelSettings
from tiny import save_tiny, tiny_model

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
functional = bitsandbytes.functional
NF4 = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]


def weight(out_features: int = 96, in_features: int = 64, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (0.05 * torch.randn(out_features, in_features, generator=generator)).to(dtype)


def load(folder: Path, **settings: Any) -> nn.Module:
    return load_model(ModelSettings(load=str(folder), device="cpu", **settings)).model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "llama", "llama", hidden_size=64)


BADLY_DEQUANTIZED = [(64, 32), (64, 96), (5, 32)]
"""Rows that bitsandbytes 0.50.2 dequantises with maxima of other blocks on CPUs with AVX512."""


def one_by_one(packed: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """The definition: each weight's value in the table times its block's maximum, itself looked up the same way."""
    nested = state.state2
    maxima = [
        nested.code[int(m)] * nested.absmax[i // nested.blocksize] + state.offset for i, m in enumerate(state.absmax)
    ]
    values = [value for byte in packed.flatten().tolist() for value in (byte >> 4, byte & 15)][: state.shape.numel()]
    flat = [state.code[value] * maxima[i // state.blocksize] for i, value in enumerate(values)]
    return torch.stack(flat).to(dtype).view(state.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(96, 64), (7, 33), (7, 34), (120, 72), (1, 64), *BADLY_DEQUANTIZED])
def test_4_bits_are_bitsandbytes_own(dtype: torch.dtype, shape: tuple[int, int]):
    w = weight(*shape, dtype=dtype)
    packed, state = functional.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
    linear = QuantizedLinear.of(w, bits=4)
    assert torch.equal(linear.weight, packed)
    dequantized = linear.dequantized_weight()
    assert dequantized.dtype == dtype and torch.equal(dequantized, one_by_one(packed, state, dtype))
    if shape not in BADLY_DEQUANTIZED:
        assert torch.equal(dequantized, functional.dequantize_4bit(packed, state))
    assert torch.equal(linear.product_weight(), dequantized)


def test_4_bits_are_the_nearest_nf4_values():
    """Against the paper's definition: nearest of 16 values times the block's absolute maximum."""
    w = weight(dtype=torch.float32)
    blocks = w.reshape(-1, 64)
    maxima = blocks.abs().amax(dim=1, keepdim=True)
    table = torch.tensor(NF4)
    nearest = table[(blocks[..., None] / maxima[..., None] - table).abs().argmin(-1)] * maxima
    got = QuantizedLinear.of(w, bits=4).dequantized_weight().reshape(-1, 64)
    # the maxima are themselves kept in 8 bits
    assert ((got - nearest).abs() <= 0.02 * maxima).all()
    assert ((got - nearest).abs() / maxima).mean() < 0.005


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(96, 64), (7, 33), (1100, 1000)])
def test_8_bits_are_bitsandbytes_own(dtype: torch.dtype, shape: tuple[int, int]):
    """Packed weights as its Int8Params; the training product and its gradient as its Linear8bitLt on a CPU."""
    w = weight(*shape, dtype=dtype)
    theirs = bitsandbytes.nn.Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False, threshold=6.0)
    theirs.weight = bitsandbytes.nn.Int8Params(w, requires_grad=False, has_fp16_weights=False).to("cpu")
    theirs.train()
    packed, row_max = theirs.weight.CB.clone(), theirs.weight.SCB.clone()
    mine = QuantizedLinear.of(w, bits=8)
    assert torch.equal(mine.weight, packed) and torch.equal(mine.scales["row_max"], row_max)
    x = torch.randn(5, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    dy = torch.randn(5, shape[0], generator=torch.Generator().manual_seed(2)).to(dtype)
    results = []
    for linear in (theirs, mine):
        leaf = x.clone().requires_grad_()
        y = linear(leaf)
        y.backward(dy)
        results.append((y.detach(), leaf.grad))
    for theirs_, mine_ in zip(*results, strict=True):
        assert torch.equal(theirs_, mine_)
    again = packed.to(dtype).mul_(row_max.unsqueeze(1).mul(1.0 / 127.0))
    assert torch.equal(mine.dequantized_weight(), again) and torch.equal(mine.product_weight(), again)


def test_8_bits_lose_half_a_step_at_most():
    w = weight(dtype=torch.float32)
    got = QuantizedLinear.of(w, bits=8).dequantized_weight()
    assert ((got - w).abs() <= 0.57 * w.abs().amax(dim=1, keepdim=True) / 127).all()  # and fp16's rounding
    zero = QuantizedLinear.of(torch.zeros(4, 64), bits=8).dequantized_weight()
    assert torch.equal(zero, torch.zeros(4, 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_where_the_c_function_is_unknown_the_numbers_are_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    linear = QuantizedLinear.of(weight(dtype=dtype), bits=4)
    assert packed_weights._c_function(dtype) is not None
    direct = linear.dequantized_weight()
    monkeypatch.setattr(packed_weights, "_c_function", lambda dtype: None)
    assert torch.equal(linear.dequantized_weight(), direct)


def test_an_unknown_bitsandbytes_is_called_through_its_front_door(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bitsandbytes, "__version__", "9.0.0")
    assert packed_weights._c_function.__wrapped__(torch.bfloat16) is None


@pytest.mark.parametrize("bits", [4, 8])
def test_products_share_one_buffer(bits: int):
    first, second = (QuantizedLinear.of(weight(*shape), bits=bits) for shape in ((96, 64), (64, 96)))
    wanted = [linear.dequantized_weight() for linear in (first, second)]
    one = first.product_weight()
    assert torch.equal(one, wanted[0])
    two = second.product_weight()
    assert two.data_ptr() == one.data_ptr() and torch.equal(two, wanted[1])
    assert wanted[0].data_ptr() != wanted[1].data_ptr() != two.data_ptr()
    others: list[int] = []
    thread = threading.Thread(target=lambda: others.append(first.product_weight().data_ptr()))
    thread.start()
    thread.join()
    assert others != [two.data_ptr()]


@pytest.mark.parametrize("bits", [4, 8])
def test_threads_do_not_disturb_each_other(bits: int, one_thread: None):
    """Products and gradients of different linears at the same time: each the bits that it gives alone."""
    linears = [QuantizedLinear.of(weight(*shape), bits=bits) for shape in ((384, 256), (256, 384), (384, 384))]

    def compute(linear: QuantizedLinear) -> list[Tensor]:
        x = torch.ones(8, linear.in_features, dtype=torch.bfloat16, requires_grad=True)
        y = linear(x)
        return [y.detach(), *torch.autograd.grad(y.sum(), x)]

    def equal_each_time(linear: QuantizedLinear, wanted: list[Tensor]) -> bool:
        return all(all(map(torch.equal, compute(linear), wanted)) for _ in range(200))

    wanted = [compute(linear) for linear in linears]
    with ThreadPoolExecutor(len(linears), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        assert all(pool.map(equal_each_time, linears, wanted))


def test_a_buffer_made_in_generation_serves_training():
    seen: list[Tensor] = []

    def work() -> None:  # a thread of its own has no buffer yet
        linear = QuantizedLinear.of(weight(dtype=torch.float32), bits=4)
        with torch.inference_mode():
            linear(torch.ones(1, 64))
        x = torch.ones(1, 64, requires_grad=True)
        linear(x).sum().backward()
        seen.append(x.grad)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert torch.allclose(
        seen[0][0], QuantizedLinear.of(weight(dtype=torch.float32), bits=4).dequantized_weight().sum(0)
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_autograd_keeps_no_dequantised_weight(bits: int):
    """What forward saves for backward, over a chain of adapted layers: activations and factors only."""
    base = [QuantizedLinear.of(weight(256, 256), bits=bits) for _ in range(4)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x = torch.ones(3, 256, dtype=torch.bfloat16, requires_grad=True)
        for linear in base:
            a, b = (nn.Parameter(torch.ones(shape)) for shape in ((2, 256), (256, 2)))
            x = LoRALinear(linear, a, b, scale=1.0)(linear(x))
    assert kept and max(t.numel() for t in kept) < 256 * 256
    x.sum().backward()


@pytest.mark.parametrize("bits", [4, 8])
def test_product_and_input_gradient_are_those_of_the_dequantised_weight(bits: int):
    linear = QuantizedLinear.of(weight(dtype=torch.float32), torch.ones(96), bits=bits)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    dy = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(2))
    y = linear(x)
    y.backward(dy)
    w = linear.dequantized_weight()
    torch.testing.assert_close(y, F.linear(x, w, torch.ones(96)))
    torch.testing.assert_close(x.grad, dy @ w)


@pytest.mark.parametrize("bits", [4, 8])
def test_every_linear_but_the_head_is_quantised_while_loading(folder: Path, bits: int):
    model = load(folder, **{f"load_{bits}bit": True})
    quantized = {name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    plain = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert len(quantized) == 14 and plain == {"lm_head"}
    reference = load(folder)
    assert num_weights(model) == num_weights(reference) == sum(p.numel() for p in reference.parameters())
    for name in quantized:
        mine = model.get_submodule(name)
        wanted = QuantizedLinear.of(reference.get_submodule(name).weight, bits=bits)
        assert torch.equal(mine.weight, wanted.weight), name
        assert torch.equal(mine.dequantized_weight(), wanted.dequantized_weight()), name
    for name, p in reference.named_parameters():
        if name.rpartition(".")[0] not in quantized:
            assert torch.equal(p, model.get_parameter(name)), name
    assert not any(p.requires_grad for p in model.parameters())


def test_gpt2_keeps_its_transposed_weights(tmp_path: Path):
    import transformers

    from tiny import tiny_tokenizer

    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=384, n_positions=64)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        wanted = load(tmp_path, dtype="fp32")(input_ids=ids).logits
        got = load(tmp_path, dtype="fp32", load_8bit=True)(input_ids=ids).logits
    assert (got - wanted).abs().max() < 0.02 * wanted.abs().max()


@pytest.mark.parametrize("bits", [4, 8])
def test_adapter_on_quantised_base_learns_as_on_its_dequantised_copy(folder: Path, bits: int):
    model = load(folder, **{f"load_{bits}bit": True}, dtype="fp32")
    plain = load(folder, dtype="fp32")
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            plain.get_submodule(name).weight.data = module.dequantized_weight()
    ids = torch.arange(3, 40)[None]
    settings = AdapterSettings(lora_r=4, lora_target_modules=["q_proj", "v_proj", "down_proj"])
    both = [inject_adapters(m, settings, seed=1) for m in (model, plain)]
    for m, adapters in zip((model, plain), both, strict=True):
        for p in adapters.parameters():
            p.data += 0.01
        m(input_ids=ids, labels=ids).loss.backward()
    for (name, mine), (_, wanted) in zip(both[0].named_parameters(), both[1].named_parameters(), strict=True):
        assert mine.grad is not None and mine.grad.any(), name
        torch.testing.assert_close(mine.grad, wanted.grad, rtol=1e-4, atol=1e-6)
    with pytest.raises(AdapterError, match="load the base unquantised"):
        both[0].merge_()


def test_adapter_of_a_quantised_run_fits_the_whole_base(folder: Path, tmp_path: Path):
    adapters = inject_adapters(load(folder, load_4bit=True), AdapterSettings(lora_r=4), seed=1)
    save_adapter(adapters, tmp_path, base_model_name=str(folder))
    again = load_adapter(load(folder), tmp_path)
    for key, tensor in adapters.state().items():
        assert torch.equal(tensor, again.state()[key]), key


def test_linears_take_less_than_three_tenths_of_bf16(folder: Path):
    linear = QuantizedLinear.of(weight(512, 512), bits=4)
    size = sum(t.numel() * t.element_size() for t in (linear.weight, *linear.scales.values()))
    assert size < 0.30 * 512 * 512 * 2
    assert not linear.state_dict().keys() - {"weight"}


def test_scales_keep_their_precision_when_the_model_is_cast():
    linear = QuantizedLinear.of(weight(), bits=4)
    before = linear.dequantized_weight()
    linear.to(torch.bfloat16)
    assert torch.equal(linear.dequantized_weight(), before)


GROWTH = """
import sys, threading, time
from finerank.models import load, quantized
from finerank.models.packed import bitsandbytes_functions
from finerank.models.settings import ModelSettings

def anonymous():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) * 1024

bitsandbytes_functions()
peak, done = 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
load.load_model(ModelSettings(load=sys.argv[2], device="cpu", dtype="bf16", load_4bit=True))  # what loading sets up
before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
bits = {f"load_{sys.argv[3]}bit": True} if sys.argv[3] != "16" else {}
model = load.load_model(ModelSettings(load=sys.argv[1], device="cpu", dtype="bf16", **bits)).model
done = True
thread.join()
print("growth", max(peak, anonymous()) - before)
"""


@pytest.mark.slow  # three processes
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
def test_the_whole_model_is_never_in_memory(folder: Path, tmp_path: Path):
    """Peak memory that loading adds, of a process of its own, against the size of the linears in bf16."""
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 10, "head_dim": 64}
    save_tiny(tmp_path, "llama", num_attention_heads=12, num_key_value_heads=12, **sizes)
    whole = 2 * 10 * (4 * 768**2 + 3 * 768 * 2048)
    growth = {}
    for bits in ("4", "8", "16"):
        command = [sys.executable, "-c", GROWTH, str(tmp_path), str(folder), bits]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        growth[bits] = int(said.split("growth")[1])
    assert growth["4"] < 0.30 * whole + (32 << 20), growth  # what a million weights and the largest need for a moment
    assert growth["8"] < 0.55 * whole + (32 << 20), growth
    assert growth["16"] > 0.9 * whole, growth  # so that is what would be seen


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"load_4bit": True, "load_8bit": True}, ConfigError, "exclude each other"),
        ({"load": None, "model_config": ".", "load_4bit": True}, ConfigError, "name a model with --load"),
    ],
)
def test_bad_settings_are_one_sentence(folder: Path, settings: dict[str, Any], error: type[Exception], words: str):
    with pytest.raises(error, match=words) as caught:
        load_model(ModelSettings(**{"load": str(folder), "device": "cpu", **settings}))
    assert "\n" not in str(caught.value)


def test_layers_smaller_than_a_block_are_refused(tmp_path: Path):
    small = {
        "hidden_size": 4,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 2,
    }
    save_tiny(tmp_path, "llama", **small)
    with pytest.raises(ModelError, match="fewer than a block of 64; use --load-8bit"):
        load(tmp_path, load_4bit=True)


@pytest.mark.parametrize("bits", [4, 8])
def test_without_bitsandbytes_the_extra_is_named(folder: Path, bits: int, monkeypatch: pytest.MonkeyPatch):
    packed_weights.bitsandbytes_functions.cache_clear()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"finerank\[quant\]"):
        load(folder, **{f"load_{bits}bit": True})


def test_weights_beyond_fp16_are_refused_in_8_bits(folder: Path, tmp_path: Path):
    model = load(folder)
    name = "model.layers.1.mlp.down_proj"
    model.get_submodule(name).weight.data[3, 5] = 70000.0
    model.save_pretrained(tmp_path)
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj.*65504.*--load-4bit") as caught:
        load(tmp_path, load_8bit=True)
    assert "\n" not in str(caught.value)
    assert isinstance(load(tmp_path, load_4bit=True), nn.Module)


def test_close_to_the_model_it_stands_for(folder: Path):
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        whole = tiny_model("llama", hidden_size=64)(input_ids=ids).logits
        four, eight = (load(folder, dtype="fp32", **{f"load_{b}bit": True})(input_ids=ids).logits for b in (4, 8))
    assert (eight - whole).abs().mean() < 0.05 * whole.abs().mean()
    assert (four - whole).abs().mean() < 0.6 * whole.abs().mean()
