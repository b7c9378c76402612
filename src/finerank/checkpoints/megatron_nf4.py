"""NF4 weights in Megatron checkpoints (`--qlora-nf4`): each rank's linear is packed by itself, its scales beside it.

    M.weight                                  packed, uint8 [n / 2, 1]
    M.weight.absmax                           maxima of 64 weights each: uint8 (double quantisation) or fp32
    M.weight.quant_map                        the 16 values
    M.weight.nested_absmax, .nested_quant_map fp32, for double quantisation
    M.weight.quant_state.bitsandbytes__nf4    bytes of a JSON: shape, dtype, block sizes, offset

They are read as what they stand for, in the dtype that the JSON names. Source: bitsandbytes' `QuantState.as_dict`.
"""

import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from finerank.checkpoints.torch_file import StoredTensor, TorchFile
from finerank.checkpoints.weights import TensorInfo
from finerank.errors import CheckpointError
from finerank.models.packed import BLOCK_SIZE, NESTED_BLOCK_SIZE, bitsandbytes_functions, dequantize_into

_STATE = ".quant_state.bitsandbytes__nf4"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def packed_weights(
    leaves: dict[str, Any], file: TorchFile
) -> tuple[dict[str, tuple[TensorInfo, Callable[[], Tensor]]], set[str]]:
    """The packed weights of one rank by stored name, as lazy dequantised tensors, and every name that belongs to them.

    Raises CheckpointError for a weight whose parts are missing or do not fit each other.
    """
    weights: dict[str, tuple[TensorInfo, Callable[[], Tensor]]] = {}
    taken: set[str] = set()
    for key in leaves:
        if key.endswith(_STATE):
            name = key.removesuffix(_STATE)
            parts = {part: f"{name}.{part}" for part in _PARTS if f"{name}.{part}" in leaves}
            stored = {part: leaves[other] for part, other in parts.items()} | {"weight": leaves.get(name)}
            weights[name] = _weight(name, leaves[key], stored, file)
            taken |= {name, key, *parts.values()}
    return weights, taken


def _weight(name: str, state: Any, stored: dict[str, Any], file: TorchFile) -> tuple[TensorInfo, Callable[[], Tensor]]:
    wrong = [part for part, value in stored.items() if not isinstance(value, StoredTensor)]
    if wrong or not {"absmax", "quant_map"} <= stored.keys() or not isinstance(state, StoredTensor):
        raise CheckpointError(f"{file.path}: the NF4 weight {name} lacks tensors beside it; convert it again.")
    try:
        facts = json.loads(bytes(file.read(state).to(torch.uint8).flatten().tolist()))
        shape, dtype = tuple(int(size) for size in facts["shape"]), _DTYPES[facts["dtype"]]
        blocks = int(facts["blocksize"]), int(facts.get("nested_blocksize", NESTED_BLOCK_SIZE))
        is_nested, offset = "nested_blocksize" in facts, float(facts.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{file.path}: the state of the NF4 weight {name} is damaged; convert it again."
        ) from error
    if blocks != (BLOCK_SIZE, NESTED_BLOCK_SIZE):
        raise CheckpointError(
            f"{file.path}: {name} has NF4 blocks of {blocks[0]}, not of {BLOCK_SIZE}; convert it again."
        )
    num_blocks = -(-math.prod(shape) // BLOCK_SIZE)
    sizes = {part: math.prod(value.info.shape) for part, value in stored.items()}
    wanted = {"weight": -(-math.prod(shape) // 2), "absmax": num_blocks, "quant_map": 16}
    if is_nested:
        wanted |= {"nested_absmax": -(-num_blocks // NESTED_BLOCK_SIZE), "nested_quant_map": 256}
    if len(shape) != 2 or min(shape) < 1 or sizes != wanted:
        raise CheckpointError(
            f"{file.path}: the parts of the NF4 weight {name} do not fit each other; convert it again."
        )

    def read() -> Tensor:
        functional = bitsandbytes_functions()
        parts = {part: file.read(value) for part, value in stored.items()}
        code = parts["quant_map"].float().flatten()
        if not torch.equal(code, functional.get_4bit_type("nf4", device="cpu")):
            raise CheckpointError(f"{file.path}: {name} is packed with a table other than NF4's; convert it again.")
        scales = {"absmax": parts["absmax"].flatten(), "code": code}
        if is_nested:
            scales |= {"nested_absmax": parts["nested_absmax"].flatten(), "offset": torch.tensor(offset)}
            scales["nested_code"] = parts["nested_quant_map"].flatten()
        return dequantize_into(torch.empty(shape, dtype=dtype), parts["weight"].reshape(-1, 1), scales, bits=4)

    return TensorInfo(shape, dtype), read
