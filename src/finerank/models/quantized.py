"""Base linears kept in 4 or 8 bits: the memory side of QLoRA.

    model = load_model(ModelSettings(load="smollm2-135m", load_4bit=True))    # every linear but the output head

    4 bits   NF4 with double quantisation, by bitsandbytes
    8 bits   the weights of LLM.int8(), by bitsandbytes; activations are not quantised

Weights are quantised tensor by tensor while they are read, so the whole model is never in memory in 16 bits. Products
are computed in the activations' precision from a weight that is dequantised for that one product, forward and
backward, into a buffer that all linears of a thread share; no second copy is kept. Nothing but the linear knows:
adapters see `dequantized_weight()` and `product_weight()`. The numbers are in `models.packed`.

Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, sections 3 and 4.

Shapes: I in_features, O out_features, P packed values.
"""

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

from finerank.errors import ConfigError, ModelError
from finerank.models.packed import (
    BLOCK_SIZE,
    bitsandbytes_functions,
    dequantize_into,
    give_back_free_memory,
    quantize,
    shared_buffer,
)
from finerank.models.settings import ModelSettings

_TRIM_EVERY = 1_000_000


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
        packed, self.scales = quantize(weight_OI, bits=self.bits)
        return nn.Parameter(packed, requires_grad=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantizedLinear":
        """Scales follow the weight to its device, and keep their precision whatever the model is cast to."""
        super()._apply(fn, recurse)
        self.scales = {name: tensor.to(self.weight.device) for name, tensor in self.scales.items()}
        return self

    def dequantized_weight(self) -> Tensor:
        """[O, I] in the base's precision, a new tensor."""
        out_OI = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device=self.weight.device)
        return dequantize_into(out_OI, self.weight, self.scales, bits=self.bits)

    def product_weight(self) -> Tensor:
        """[O, I] in the base's precision, in memory that the thread's next quantised product uses again."""
        out_OI = shared_buffer((self.out_features, self.in_features), self.dtype, self.weight.device)
        return dequantize_into(out_OI, self.weight, self.scales, bits=self.bits)

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
        return F.linear(x, linear.product_weight().to(x.dtype), linear.bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None]:  # type: ignore[override]
        return dy @ ctx.linear.product_weight().to(dy.dtype), None


@register_quantization_config("finerank")
class BitsConfig(QuantizationConfigMixin):
    """What `from_pretrained` takes as quantization_config."""

    def __init__(self, bits: int, **_: Any):
        self.quant_method, self.bits = "finerank", bits  # type: ignore[assignment]
        self.refused: list[str] = []
        """Why tensors could not be quantised. The loader goes on to the next tensor and forgets our words."""


def quantization_config(settings: ModelSettings) -> BitsConfig | None:
    """What `--load-4bit` or `--load-8bit` asks `from_pretrained` for; None without them.

    Raises ConfigError for both; MissingExtraError without bitsandbytes.
    """
    if not (settings.load_4bit or settings.load_8bit):
        return None
    if settings.load_4bit and settings.load_8bit:
        raise ConfigError("--load-4bit and --load-8bit exclude each other; give one of them.")
    bitsandbytes_functions()
    return BitsConfig(4 if settings.load_4bit else 8)


@register_quantizer("finerank")
class QuantizeWhileLoading(HfQuantizer):
    """Hands transformers' loader our linears: it reads one tensor, `pack`s it, and goes on to the next."""

    requires_calibration = False

    def __init__(self, quantization_config: BitsConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.bits, self.refused = quantization_config.bits, quantization_config.refused

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
        return _Pack(self.refused)

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
    def __init__(self, refused: list[str]):
        self.refused = refused

    _num_since_trim = 0
    """Weights quantised since free memory was given back, by all of these; the loader makes one for each tensor."""

    def convert(self, input_dict: dict[str, Any], *, model: nn.Module, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        packed = {}
        for name, value in input_dict.items():
            module, _ = get_module_from_name(model, name)
            weight = value[0] if isinstance(value, list) else value
            try:
                packed[name] = module.pack(weight.T if module.stores_transpose else weight)
            except ModelError as error:
                self.refused.append(f"{name.removesuffix('.weight')}: {error}")
                raise
            _Pack._num_since_trim += weight.numel()
            if _Pack._num_since_trim >= _TRIM_EVERY:
                give_back_free_memory()
                _Pack._num_since_trim = 0
            module._is_hf_initialized = True
        return packed


def _check_size(name: str, module: nn.Module, bits: int) -> None:
    size = module.weight.numel()  # type: ignore[operator, union-attr]
    if bits == 4 and size < BLOCK_SIZE:
        raise ModelError(
            f"--load-4bit: {name} has {size} weights, fewer than a block of {BLOCK_SIZE}; use --load-8bit, or neither."
        )
