"""Which device the model runs on, and in which precision.

bf16 where the hardware multiplies it natively (CUDA from Ampere on; CPUs with AVX512-BF16, AMX or Arm's BF16), fp32
everywhere else: emulated bf16 is slower than fp32 and less exact, so `auto` never takes it.
"""

import logging
import os
import platform
from pathlib import Path

import torch

from finerank.errors import ConfigError
from finerank.models.settings import ModelSettings

logger = logging.getLogger(__name__)


def pick_device(settings: ModelSettings) -> torch.device:
    """The device of `--device`; `auto` is this process's CUDA device where there is one, else the CPU.

    Under torchrun, `cuda` and `auto` mean the device of LOCAL_RANK. Raises ConfigError for a device that is not there.
    """
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name} is no device; give cpu, cuda, cuda:N, mps or auto.") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError("--device mps: this machine or this torch has no Metal device; use --device cpu.")
        return device
    if device.type != "cuda":
        raise ConfigError(f"--device {name} is not supported; give cpu, cuda, cuda:N, mps or auto.")
    if not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: torch {torch.__version__} sees no CUDA device here; use --device cpu.")
    index = int(os.environ.get("LOCAL_RANK", 0)) if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ConfigError(f"--device cuda:{index}: this machine has CUDA devices 0..{torch.cuda.device_count() - 1}.")
    return torch.device("cuda", index)


def pick_dtype(settings: ModelSettings, device: torch.device) -> torch.dtype:
    """The precision of the base weights on `device`. Raises ConfigError when --bf16 and --dtype fp32 are both given."""
    if settings.bf16 and settings.dtype == "fp32":
        raise ConfigError("--bf16 and --dtype fp32 contradict each other; give one of them.")
    if settings.bf16 or settings.dtype == "bf16":
        return torch.bfloat16
    if settings.dtype == "fp32":
        return torch.float32
    native, why = _has_native_bf16(device)
    logger.info("base weights in %s: %s", "bf16" if native else "fp32", why)
    return torch.bfloat16 if native else torch.float32


def _has_native_bf16(device: torch.device) -> tuple[bool, str]:
    """Whether the device multiplies bf16 natively, and the sentence that says why."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        native = torch.cuda.get_device_capability(device) >= (8, 0) or torch.version.hip is not None
        return native, f"{name} {'has' if native else 'has no'} native bf16"
    if device.type == "mps":
        return False, "bf16 is not faster on this device"
    flags = cpu_flags()
    found = sorted(flags & {"avx512_bf16", "amx_bf16"}) or (["bf16"] if "bf16" in flags and _is_arm() else [])
    if found:
        return True, f"the CPU has {' and '.join(found)}"
    return False, "the CPU has no bf16 instructions"


def _is_arm() -> bool:
    return platform.machine().lower() in ("aarch64", "arm64")


def cpu_flags() -> set[str]:
    """Instruction-set flags of the CPU as Linux lists them; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.partition(":")[2].split()}
