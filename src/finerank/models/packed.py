"""Weights in 4 and 8 bits as bitsandbytes packs them, and their way back into a buffer that is used again and again.

    packed, scales = quantize(weight_OI, bits=4)
    dequantize_into(out_OI, packed, scales, bits=4)             # the same bits as bitsandbytes' own dequantisation
    weight_OI = dequantize_into(shared_buffer((O, I), torch.bfloat16, device), packed, scales, bits=4)

    4 bits   NF4 in blocks of 64, their maxima in 8 bits in blocks of 256 (double quantisation): 4.127 bits a weight
    8 bits   the weights of LLM.int8(): whole numbers from -127 to 127, a maximum for each output feature

bitsandbytes quantises on the CPU whatever the device, so a base has the same bits everywhere.

Sources: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", 2023, section 3; "LLM.int8(): 8-bit Matrix
Multiplication for Transformers at Scale", 2022, section 3.

Shapes: I in_features, O out_features.
"""

import ctypes
import logging
import platform
import sys
import threading
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from finerank.errors import MissingExtraError, ModelError

BLOCK_SIZE, NESTED_BLOCK_SIZE = 64, 256
"""NF4: weights that share a maximum, and maxima that share a second one."""

_CACHED_WEIGHTS = 1 << 20

_PLAIN_C = ("0.49.", "0.50.")
"""Versions of bitsandbytes whose C function for NF4 takes what `_c_function` passes."""

_C_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@cache
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
            "--load-4bit and --load-8bit need bitsandbytes; install it with: pip install 'finerank[quant]'."
        ) from error
    finally:
        log.setLevel(level)
    return functional


def quantize(weight_OI: Tensor, *, bits: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Packed weight and its scales.

    Returns:
        4 bits: uint8 [ceil(O I / 2), 1], and the parts of bitsandbytes' QuantState. 8 bits: int8 [O, I], and `row_max`.

    Raises ModelError for weights beyond fp16's range in 8 bits, MissingExtraError without bitsandbytes.
    """
    functional, weight_OI = bitsandbytes_functions(), weight_OI.contiguous()
    if bits == 8:
        half_OI = weight_OI.to(torch.float16)
        if not half_OI.isfinite().all():
            raise ModelError("weights beyond 65504 do not fit fp16, which --load-8bit goes through; use --load-4bit.")
        packed, row_max, _ = functional.int8_vectorwise_quant(half_OI)
        return packed, {"row_max": row_max}
    packed, state = functional.quantize_4bit(
        weight_OI, blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4"
    )
    return packed, {
        "absmax": state.absmax,
        "code": state.code,
        "offset": state.offset,
        "nested_absmax": state.state2.absmax,
        "nested_code": state.state2.code,
    }


def give_back_free_memory() -> None:
    """Let glibc return what is free to the system, also between what is in use; nothing elsewhere.

    Quantising takes several times a weight's memory for a moment and leaves a little of it in use, again and again;
    glibc does not fill the gaps well, and a model in 4 bits came to occupy more than it does in 16.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def dequantize_into(out_OI: Tensor, packed: Tensor, scales: Mapping[str, Tensor], *, bits: int) -> Tensor:
    """Fill `out_OI` (contiguous) in its precision; returns it. NF4 may lack `nested_absmax`: quantised once."""
    if bits == 8:
        return _scale_rows_into(out_OI, packed, scales["row_max"].mul(1.0 / 127.0)[:, None])
    functional, maxima = bitsandbytes_functions(), scales["absmax"]
    if "nested_absmax" in scales:
        maxima = functional.dequantize_blockwise(
            maxima, absmax=scales["nested_absmax"], code=scales["nested_code"], blocksize=NESTED_BLOCK_SIZE
        ).add_(scales["offset"])
    out = _in_blocks(out_OI)
    if out.device.type == "cpu":
        into = _c_function(out.dtype) if out.shape[1] % 2 == 0 else None
        if into is not None:
            into(out, packed, maxima)
        else:  # bitsandbytes' CPU side cannot write into a given tensor
            out.copy_(functional.dequantize_4bit(packed, _state(maxima, scales["code"], out)))
        return out_OI
    functional.dequantize_4bit(packed, _state(maxima, scales["code"], out), out=out)
    return out_OI


def _in_blocks(out_OI: Tensor) -> Tensor:
    """The same memory in rows that begin with a block.

    Blocks run on over the ends of rows, but bitsandbytes' AVX512 code (seen in 0.50.2) takes the wrong maximum for
    most weights when rows are short or do not hold whole blocks, e.g. of 32 or 96 weights.
    """
    if out_OI.shape[1] % BLOCK_SIZE == 0:
        return out_OI
    return out_OI.view(-1, BLOCK_SIZE) if out_OI.numel() % BLOCK_SIZE == 0 else out_OI.view(1, -1)


def _scale_rows_into(out_OI: Tensor, packed_OI: Tensor, step_O1: Tensor) -> Tensor:
    """Whole numbers times their row's step, as in bitsandbytes' MatMul8bitFp: in fp32, rounded once."""
    if out_OI.device.type != "cpu":
        return torch.mul(packed_OI, step_O1, out=out_OI)
    if out_OI.dtype == torch.float32:
        return out_OI.copy_(packed_OI).mul_(step_O1)
    # torch multiplies tensors of different types one number at a time; a few rows at a time stay in the cache
    num_rows = max(1, _CACHED_WEIGHTS // out_OI.shape[1])
    for out, packed, step in zip(*(t.split(num_rows) for t in (out_OI, packed_OI, step_O1)), strict=True):
        wide = shared_buffer((out.shape[0], out.shape[1]), torch.float32, out.device)
        out.copy_(wide.copy_(packed).mul_(step))
    return out_OI


def _state(maxima: Tensor, code: Tensor, out_OI: Tensor) -> Any:
    return bitsandbytes_functions().QuantState(
        absmax=maxima, shape=out_OI.shape, code=code, blocksize=BLOCK_SIZE, quant_type="nf4", dtype=out_OI.dtype
    )


@cache
def _c_function(dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], None] | None:
    """bitsandbytes' C function behind `dequantize_4bit`, given our own output; None where it is not known to be right.

    bitsandbytes calls it with a tensor that it allocates anew each time, which for large weights costs more than the
    dequantisation itself: the system clears every page.
    """
    import bitsandbytes

    if not bitsandbytes.__version__.startswith(_PLAIN_C):
        return None
    try:
        function = getattr(bitsandbytes_functions().lib, f"cdequantize_blockwise_cpu_nf4_{_C_NAMES[dtype]}")
    except (AttributeError, KeyError):
        return None

    def into(out_OI: Tensor, packed: Tensor, maxima: Tensor) -> None:
        sizes = (BLOCK_SIZE, *out_OI.shape)
        pointers = (packed.data_ptr(), maxima.data_ptr(), out_OI.data_ptr())
        function(*map(ctypes.c_void_p, pointers), *map(ctypes.c_longlong, sizes))

    # seen to give the same bits, or not used; 3 x 86 weights are 4 blocks and a part of one
    sample = torch.linspace(-1.0, 1.0, 3 * 86).view(3, 86).to(dtype)
    functional = bitsandbytes_functions()
    packed, state = functional.quantize_4bit(sample, blocksize=BLOCK_SIZE, quant_type="nf4")
    got = torch.empty_like(sample)
    try:
        into(got, packed, state.absmax)
    except Exception:  # the library could not be loaded, and says so when a function is called
        return None
    return into if torch.equal(got, functional.dequantize_4bit(packed, state)) else None


_buffers = threading.local()


def shared_buffer(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for one dequantised weight, contiguous; the next call of this thread hands out the same memory.

    It is as large as the largest weight asked for so far, one for each precision and device. Each thread has its own:
    the backward pass on a GPU runs in another one than the forward pass, and servers compute in several.
    """
    kept: dict[tuple[torch.dtype, torch.device], Tensor] = _buffers.__dict__.setdefault("kept", {})
    size, key = shape[0] * shape[1], (dtype, device)
    if key not in kept or kept[key].numel() < size:
        kept.pop(key, None)  # let go of the old one first
        with torch.inference_mode(False):  # else training could not write into what generation has made
            kept[key] = torch.empty(size, dtype=dtype, device=device)
    return kept[key][:size].view(shape)
