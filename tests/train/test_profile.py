"""The profile of a step: every product is counted, every part found, and the times add up."""

import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from finerank.adapters.inject import inject_adapters
from finerank.adapters.settings import AdapterSettings
from finerank.cli import main
from finerank.models.attention import use_packed_attention
from finerank.models.forward import loss_sum
from finerank.train.profile import PARTS, Profile, StepProfiler, as_markdown, measured_peak, times_by_part
from tiny import save_tiny, tiny_model

TOKENS = 40


def packed_loss(model):
    ids = (torch.arange(TOKENS) * 7 % 384)[None]
    positions = torch.arange(TOKENS)[None]
    return loss_sum(model, ids, ids, positions, cu_seqlens=torch.tensor([0, TOKENS], dtype=torch.int32))


@pytest.fixture
def model():
    model = tiny_model("llama").requires_grad_(False)
    inject_adapters(model, AdapterSettings(lora_r=2), seed=1)
    use_packed_attention(model)
    return model.train()


def test_products_are_counted_by_part(model):
    packed_loss(model).backward()  # the head is verified at first sight
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as watched:
        packed_loss(model).backward()
    parts, flops = times_by_part(list(watched.events()), low_rank=6, on_gpu=False)
    linears = [m for name, m in model.named_modules() if name.endswith("base_layer")]
    forward = sum(2 * TOKENS * m.weight.numel() for m in linears)
    first = [m.weight.numel() for name, m in model.named_modules() if ".layers.0." in name and "_proj.base" in name]
    below = sum(2 * TOKENS * n for n in first[:3])  # nothing learns below q, k and v of the first layer
    assert flops["base matrix products"] == 2 * forward - below
    vocabulary = model.get_output_embeddings().weight
    assert flops["head"] == 2 * (2 * TOKENS * vocabulary.numel())
    assert flops["low-rank products"] > 0 and flops["attention"] > 0
    assert parts.keys() <= set(PARTS) and {"attention", "head", "elementwise"} <= parts.keys()
    own = sum(event.self_cpu_time_total for event in watched.events()) / 1e6
    assert 0.2 * own < sum(parts.values()) <= own  # the rest is Python's and autograd's own


def test_kept_bytes_are_those_that_autograd_keeps():
    weight = torch.randn(8, 16, requires_grad=True)
    profiler = StepProfiler(torch.nn.Module(), num_steps=1, rank=2, device=torch.device("cpu"), num_tokens=lambda: 1)
    x = torch.randn(4, 8)
    for _ in range(2):
        with profiler.around(0):
            y = (x @ weight).exp()  # keeps x and the result
            y.sum().backward()
            del y
        break
    assert profiler._kept.most == (4 * 8 + 4 * 16) * 4 and profiler._kept._now == 0
    assert profiler.result() is None


def test_the_markdown_has_every_part():
    found = Profile(
        seconds=2.0,
        parts=dict.fromkeys(PARTS, 0.25),
        flops={"head": 1e9, "base matrix products": 3e9},
        peak_flops=4e9,
        precision="bfloat16",
        memory={"frozen weights": 1 << 20},
        tokens=7,
    )
    assert found.roofline_share == 0.5
    text = as_markdown(found)
    assert "take 50% of that" in text and "| head | 0.250 | 12% | 4 |" in text and "| frozen weights | 1 MiB |" in text
    assert all(f"| {name} |" in text for name in PARTS)
    assert measured_peak(torch.float32, torch.device("cpu"), size=128, repeats=2) > 1e8


def test_a_run_writes_its_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_tiny(tmp_path / "base")
    rows = [{"instruction": f"Say {i}.", "output": f"I say {i}!"} for i in range(16)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    out = tmp_path / "out"
    command = f"tune --load {tmp_path}/base --data-path {tmp_path}/rows.json --output-dir {out} --batch-size 4"
    assert main([*command.split(), "--lora-r", "2", "--profile", "--profile-steps", "2", "--no-tune-runtime"]) == 0
    found = json.loads((out / "profile.json").read_text())
    assert set(found["parts"]) == set(PARTS) and found["tokens"] > 0
    assert sum(found["parts"].values()) == pytest.approx(found["seconds"], rel=0.02)
    assert found["parts"]["low-rank products"] > 0 and found["parts"]["base matrix products"] > 0
    assert found["memory"]["kept for backward (largest micro-batch)"] > 0
    assert (out / "profile.png").read_bytes().startswith(b"\x89PNG") and (out / "profile.md").is_file()
    assert "profile: " in capsys.readouterr().err
