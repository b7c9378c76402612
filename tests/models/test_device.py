"""Device and precision: native bf16 or fp32, and a device that is not there is an error at once."""

import pytest
import torch

from finerank.errors import ConfigError
from finerank.models import device
from finerank.models.settings import ModelSettings

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "machine", "expected"),
    [
        ({"avx2", "avx512f"}, "x86_64", torch.float32),
        ({"avx512_bf16"}, "x86_64", torch.bfloat16),
        ({"amx_bf16"}, "x86_64", torch.bfloat16),
        ({"bf16", "asimd"}, "aarch64", torch.bfloat16),
        ({"asimd"}, "aarch64", torch.float32),
    ],
)
def test_auto_takes_bf16_only_where_the_cpu_multiplies_it(monkeypatch, caplog, flags, machine, expected):
    monkeypatch.setattr(device, "cpu_flags", lambda: flags)
    monkeypatch.setattr(device.platform, "machine", lambda: machine)
    with caplog.at_level("INFO"):
        assert device.pick_dtype(ModelSettings(), CPU) is expected
    assert "base weights in" in caplog.text
    assert device.pick_dtype(ModelSettings(dtype="fp32"), CPU) is torch.float32
    assert device.pick_dtype(ModelSettings(bf16=True), CPU) is torch.bfloat16


def test_devices(monkeypatch):
    assert device.pick_device(ModelSettings(device="cpu")) == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.pick_device(ModelSettings()) == CPU
    with pytest.raises(ConfigError, match="sees no CUDA device here; use --device cpu"):
        device.pick_device(ModelSettings(device="cuda:0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device.pick_device(ModelSettings()) == torch.device("cuda", 1)
    assert device.pick_device(ModelSettings(device="cuda:0")) == torch.device("cuda", 0)
    with pytest.raises(ConfigError, match=r"--device cuda:2: this machine has CUDA devices 0\.\.1"):
        device.pick_device(ModelSettings(device="cuda:2"))
