"""Base linears kept in 4 or 8 bits: the memory side of QLoRA.

    model = load_model(ModelSettings(load="smollm2-135m", load_4bit=True))    # every linear but the output head

    4 bits   NF4 in blocks of 64 with double quantisation, by bitsandbytes: 4.127 bits a weight
    8 bits   whole numbers from -127 to 127 times a scale for each output feature; activations are not quantised

Weights are quantised tensor by tensor while they are read, so the whole model is never in memory in 16 bits. Products
are computed in the activations' precision from a weight that is dequantised for that one product, forward and
backward; no second copy is kept. Nothing but the linear knows: adapters see `dequantized_weight()`.

Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, sections 3 and 4.

Shapes: I in_features, O out_features, P packed values.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from finerank.errors import ConfigError, MissingExtraError, ModelError
from finerank.models.settings import ModelSettings

BLOCK_SIZE, NESTED_BLOCK_SIZE = 64, 256
"""NF4: weights that share a maximum, and maxima that share a second one."""


def bitsandbytes_functions() -> Any:
    """`bitsandbytes.functional`. Raises MissingExtraError without the package."""
    # it logs that an optional kernel of another package is missing, which is not used here
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise MissingExtraError(
            "--load-4bit needs bitsandbytes; install it with: pip install 'finerank[quant]'."
        ) from error
    finally:
        log.setLevel(level)
    return functional


class QuantizedLinear(nn.Module):
    """A frozen linear whose weight is packed.

    Args:
        in_features: I.
        out_features: O.
        bits: 4 or 8.
        dtype: of dequantised weights.
        bias: [O] or None.
    """

    def __init__(self, in_features: int, out_features: int, *, bits: int, dtype: torch.dtype, bias: Tensor | None):
        super().__init__()
        self.in_features, self.out_features, self.bits, self.dtype = in_features, out_features, bits, dtype
        shape = (-(-in_features * out_features // 2), 1) if bits == 4 else (out_features, in_features)
        packed = torch.empty(shape, dtype=torch.uint8 if bits == 4 else torch.int8, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.stores_transpose = False
        self.scales: dict[str, Tensor] = {}  # no buffers: the loader starts those anew

    @classmethod
    def of(cls, weight_OI: Tensor, bias: Tensor | None = None, *, bits: int) -> "QuantizedLinear":
        """A quantised copy of a weight."""
        features_O, features_I = weight_OI.shape
        linear = cls(features_I, features_O, bits=bits, dtype=weight_OI.dtype, bias=bias)
        linear.weight = linear.pack(weight_OI)
        return linear

    def pack(self, weight_OI: Tensor) -> nn.Parameter:
        """Quantise: the packed weight, whose scales this module keeps."""
        weight_OI = weight_OI.contiguous()
        if self.bits == 8:
            # as bitsandbytes' row-wise quantiser, which takes fp16 only: bf16 and fp32 weights may not fit that
            self.scales = {"row_max": weight_OI.float().abs().amax(dim=1)}
            steps_O = self.scales["row_max"].clamp_min(torch.finfo(torch.float32).tiny) / 127
            packed = (weight_OI.float() / steps_O[:, None]).round_().to(torch.int8)
            return nn.Parameter(packed, requires_grad=False)
        packed, state = bitsandbytes_functions().quantize_4bit(
            weight_OI, blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4"
        )
        self.scales = {
            "absmax": state.absmax,
            "code": state.code,
            "offset": state.offset,
            "nested_absmax": state.state2.absmax,
            "nested_code": state.state2.code,
        }
        return nn.Parameter(packed, requires_grad=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        """Scales follow the weight to its device, and keep their precision whatever the model is cast to."""
        super()._apply(fn, recurse)
        self.scales = {name: tensor.to(self.weight.device) for name, tensor in self.scales.items()}
        return self

    def dequantized_weight(self) -> Tensor:
        """[O, I] in the base's precision; a new tensor that the caller lets go of after one product."""
        if self.bits == 8:
            return (self.weight * (self.scales["row_max"] / 127)[:, None]).to(self.dtype)
        functional, scales = bitsandbytes_functions(), self.scales
        nested = functional.QuantState(
            absmax=scales["nested_absmax"], code=scales["nested_code"], blocksize=NESTED_BLOCK_SIZE, dtype=torch.float32
        )
        state = functional.QuantState(
            absmax=scales["absmax"],
            shape=torch.Size((self.out_features, self.in_features)),
            code=scales["code"],
            blocksize=BLOCK_SIZE,
            quant_type="nf4",
            dtype=self.dtype,
            offset=scales["offset"],
            state2=nested,
        )
        return functional.dequantize_4bit(self.weight, state)

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]"""
        return _QuantizedProduct.apply(x, self)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


def num_weights(model: nn.Module) -> int:
    """Parameters of a model, packed ones counted as what they stand for."""
    packed = {id(m.weight): m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear)}
    return sum(packed.get(id(p), p.numel()) for p in model.parameters())


class _QuantizedProduct(torch.autograd.Function):
    """`x W^T + b` that keeps neither x nor the dequantised W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: QuantizedLinear) -> Tensor:  # type: ignore[override]
        ctx.linear = linear
        return F.linear(x, linear.dequantized_weight().to(x.dtype), linear.bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None]:  # type: ignore[override]
        return dy @ ctx.linear.dequantized_weight().to(dy.dtype), None


@register_quantization_config("finerank")
class BitsConfig(QuantizationConfigMixin):
    """What `from_pretrained` takes as quantization_config."""

    def __init__(self, bits: int, **_: Any):
        self.quant_method, self.bits = "finerank", bits  # type: ignore[assignment]


def quantization_config(settings: ModelSettings) -> BitsConfig | None:
    """What `--load-4bit` or `--load-8bit` asks `from_pretrained` for; None without them.

    Raises ConfigError for both; MissingExtraError when 4 bits lack bitsandbytes.
    """
    if not (settings.load_4bit or settings.load_8bit):
        return None
    if settings.load_4bit and settings.load_8bit:
        raise ConfigError("--load-4bit and --load-8bit exclude each other; give one of them.")
    if settings.load_4bit:
        bitsandbytes_functions()
    return BitsConfig(4 if settings.load_4bit else 8)


@register_quantizer("finerank")
class QuantizeWhileLoading(HfQuantizer):
    """Hands transformers' loader our linears: it reads one tensor, `pack`s it, and goes on to the next."""

    requires_calibration = False

    def __init__(self, quantization_config: BitsConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.bits = quantization_config.bits

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
        """Left to the caller."""
        return device_map

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        head = model.get_output_embeddings()
        for name, module in list(model.named_modules()):
            if module is head or not isinstance(module, nn.Linear | Conv1D):
                continue
            _check_size(name, module, self.bits)
            wide = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
            quantized = QuantizedLinear(wide[1], wide[0], bits=self.bits, dtype=module.weight.dtype, bias=module.bias)
            quantized.stores_transpose = isinstance(module, Conv1D)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, quantized)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether the loader shall pass this tensor through `_Pack`."""
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, QuantizedLinear) and name == "weight"

    def get_quantize_ops(self) -> ConversionOps:
        """The loader's operation on one tensor."""
        return _Pack()

    def is_serializable(self) -> bool:
        """Adapters are saved, never the quantised base."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Through adapters."""
        return True

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        del model.config.quantization_config  # the adapter's base is the model itself, not this form of it


class _Pack(ConversionOps):
    def convert(self, input_dict: dict[str, Any], *, model: nn.Module, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        packed = {}
        for name, value in input_dict.items():
            module, _ = get_module_from_name(model, name)
            weight = value[0] if isinstance(value, list) else value
            packed[name] = module.pack(weight.T if module.stores_transpose else weight)
            module._is_hf_initialized = True
        return packed


def _check_size(name: str, module: nn.Module, bits: int) -> None:
    size = module.weight.numel()  # type: ignore[operator, union-attr]
    if bits == 4 and size < BLOCK_SIZE:
        raise ModelError(
            f"--load-4bit: {name} has {size} weights, fewer than a block of {BLOCK_SIZE}; use --load-8bit, or neither."
        )
