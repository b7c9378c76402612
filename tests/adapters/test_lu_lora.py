"""LU-LoRA: rules against golden traces and autograd, and what the local layers owe the run around them."""

import copy
import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finerank import registry
from finerank.adapters.files import load_adapter, save_adapter
from finerank.adapters.initial import Pass
from finerank.adapters.inject import AdapterSet, inject_adapters
from finerank.adapters.local_rules import feedback, mindspeed, oja
from finerank.adapters.lora import LoRALinear
from finerank.adapters.lu_lora import LocalLearning, start_local_learning
from finerank.adapters.settings import AdapterSettings
from finerank.data.batch import Batch
from finerank.errors import AdapterError, ConfigError
from finerank.models.forward import verified_head
from finerank.train.fit import peak_bytes
from finerank.train.held_out import batch_loss_sum
from finerank.train.loop import TrainLoop
from finerank.train.settings import TrainSettings
from tiny import VOCAB_SIZE, tiny_model

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "lu_lora" / "lu_lora.pt"
NUM_LAYERS = 4
FEEDBACK = {"lu_lora_final_layer_index": 1, "lu_lora_rule": "feedback"}


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return torch.load(GOLDEN, weights_only=True)


def batch_first(x_SBI: Tensor) -> Tensor:
    return x_SBI.transpose(0, 1)


def make(
    rule: str = "feedback",
    last: int = 1,
    *,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    passes: Any = None,
    **settings: Any,
) -> tuple[nn.Module, AdapterSet, LocalLearning]:
    model = tiny_model(family, num_hidden_layers=NUM_LAYERS).to(dtype).requires_grad_(False)
    chosen = AdapterSettings(
        **{"lora_r": 4, "lu_lora_final_layer_index": last, "lu_lora_rule": rule, **settings}  # type: ignore[arg-type]
    )
    adapters = inject_adapters(model, chosen, seed=1)
    local = start_local_learning(
        adapters, chosen, lr=1e-2, seed=1, passes=None if passes is None else lambda: passes(model)
    )
    assert local is not None
    return model, adapters, local


def batch(seed: int, *, rows: int = 2, length: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB_SIZE, (rows, length), generator=generator)
    targets = ids.roll(-1, dims=1)
    targets[:, -1] = -100
    return Batch(
        input_ids=ids,
        target_ids=targets,
        position_ids=torch.arange(length).expand_as(ids),
        attention_mask=torch.ones_like(ids),
        rows=tuple(range(rows)),
    )


def passes_of(model: nn.Module, *batches: Batch) -> Iterator[Pass]:
    verified_head(model)
    for one in itertools.cycle(batches):
        mask = one.attention_mask.bool()
        yield Pass(trained_BT=mask, run=lambda one=one: batch_loss_sum(model, one), real_BT=mask)


def backward(model: nn.Module, *batches: Batch) -> None:
    model.train()
    for one in batches:
        batch_loss_sum(model, one).backward()


def local_layers(adapters: AdapterSet, last: int = 1) -> dict[str, LoRALinear]:
    return {n: m for n, m in adapters.layers.items() if int(n.split(".")[2]) <= last}


class TestMindspeed:
    @pytest.mark.parametrize("case", range(4))
    def test_one_call_equals_the_original(self, golden: dict[str, Any], case: int):
        one = golden["rule"][case]
        delta = mindspeed.mindspeed_delta(batch_first(one["x"]), batch_first(one["y"]), one["W"])
        assert delta.dtype == one["delta"].dtype
        torch.testing.assert_close(delta, one["delta"], rtol=0, atol=1e-6)

    @pytest.mark.parametrize(("case", "atol"), [(0, 1e-6), (1, 4e-3)], ids=["fp32", "bf16"])
    def test_three_steps_of_a_layer_equal_the_original(self, golden: dict[str, Any], case: int, atol: float):
        trace = golden["layer"][case]
        base = nn.Linear(16, 24, bias=False, dtype=trace["W"].dtype)
        base.weight.data = trace["W"]
        # fp32 masters: under bf16 they differ from the original by its rounding of the factors
        layer = LoRALinear(
            base, nn.Parameter(trace["A0"].float()), nn.Parameter(trace["B0"].float()), scale=trace["scaling"]
        )
        lr = trace["steps"][0]["lr_a"]
        local = LocalLearning(mindspeed.RULE([layer]), set(), lr_a=lr, lr_b=24 * lr, freeze_after=None)
        for one in trace["steps"]:
            if one["mb"] == 0:
                local.begin_step(one["step"])
            y = local.output(layer, batch_first(one["x"]))
            local.at_boundary(layer, (), y)
            torch.testing.assert_close(batch_first(y), one["y"], rtol=1e-5 if case == 0 else 2e-2, atol=10 * atol)
            if one["mb"] == 1:
                local.apply_local_update(lr_factor=one["lr_a"] / lr)
            torch.testing.assert_close(layer.lora_A.detach(), one["A_after"].float(), rtol=0, atol=atol)
            torch.testing.assert_close(layer.lora_B.detach(), one["B_after"].float(), rtol=0, atol=6 * atol)

    def test_tiny_rates_survive_in_a_bf16_model(self):
        model, adapters, local = make("mindspeed", dtype=torch.bfloat16)
        before = {n: p.detach().clone() for n, p in adapters.named_parameters()}
        local.begin_step(0)
        backward(model, batch(0))
        local.apply_local_update(lr_factor=1.0)
        for name, layer in local_layers(adapters).items():
            for part in ("lora_A", "lora_B"):
                now = getattr(layer, part).detach()
                moved = (now - before[f"base_model.model.{name}.{part}.weight"]).abs().max().item()
                assert 0 < moved < 1e-3, (name, part)


def test_oja_finds_the_leading_component():
    generator = torch.Generator().manual_seed(0)
    direction = nn.functional.normalize(torch.randn(8, generator=generator), dim=0)
    x = torch.randn(1, 512, 8, generator=generator) + 3 * torch.randn(1, 512, 1, generator=generator) * direction
    m = torch.randn(2, 8, generator=generator)
    for _ in range(400):
        m = m + 0.02 * oja.oja_delta(x, x @ m.T, m)
    leading = torch.linalg.eigh(x[0].T @ x[0]).eigenvectors[:, -1]
    torch.testing.assert_close(m @ leading.to(m) * torch.sign(m @ leading), torch.ones(2), rtol=0, atol=1e-3)


class TestFeedback:
    def test_gradient_is_error_times_input(self):
        """Each B gets `g^T (scale A x)`, summed over micro-batches, with g and x as hooks see them."""
        model, adapters, local = make()
        inputs: dict[str, Tensor] = {}
        for name, layer in local_layers(adapters).items():
            layer.register_forward_pre_hook(lambda m, args, name=name: inputs.__setitem__(name, args[0]))
        errors: list[Tensor] = []

        def watch_error(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if args[0].requires_grad:
                args[0].register_hook(lambda g: errors.append(g.clone()))

        model.model.layers[2].register_forward_pre_hook(watch_error)
        local.begin_step(0)
        wanted = {name: torch.zeros_like(layer.lora_B) for name, layer in local_layers(adapters).items()}
        for one in (batch(0), batch(1, rows=1)):
            backward(model, one)
            for name, layer in local_layers(adapters).items():
                u = inputs[name].flatten(0, 1) @ layer.lora_A.detach().T * layer.scale
                wanted[name] += errors[-1].flatten(0, 1).T @ u
        assert len(errors) == 2
        sites = {f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.o_proj", "mlp.down_proj")}
        assert set(wanted) == sites
        for name, layer in local_layers(adapters).items():
            torch.testing.assert_close(layer.lora_B.grad, wanted[name], rtol=1e-4, atol=1e-5)

    def test_last_local_down_proj_gets_the_true_gradient(self):
        """Nothing lies between it and the boundary, so broadcast and backpropagation agree."""
        model, adapters, local = make(last=2, lu_lora_r=4)
        name = "model.layers.2.mlp.down_proj"
        local.begin_step(0)
        backward(model, batch(0), batch(1))
        plain = tiny_model("llama", num_hidden_layers=NUM_LAYERS).requires_grad_(False)
        full = inject_adapters(plain, AdapterSettings(lora_r=4), seed=1)
        backward(plain, batch(0), batch(1))
        torch.testing.assert_close(adapters.layers[name].lora_A, full.layers[name].lora_A)
        torch.testing.assert_close(
            adapters.layers[name].lora_B.grad, full.layers[name].lora_B.grad, rtol=1e-4, atol=1e-5
        )

    def test_upper_gradients_are_those_of_lora(self):
        model, adapters, local = make()
        local.begin_step(0)
        backward(model, batch(0))
        plain = tiny_model("llama", num_hidden_layers=NUM_LAYERS).requires_grad_(False)
        full = inject_adapters(plain, AdapterSettings(lora_r=4), seed=1)
        backward(plain, batch(0))
        upper = set(adapters.layers) - set(local_layers(adapters))
        assert len(upper) == 14
        for name in upper:
            torch.testing.assert_close(adapters.layers[name].lora_B.grad, full.layers[name].lora_B.grad)

    def test_A_becomes_the_leading_components(self):
        """Of the first rows' inputs, padding left out; B and all that is above stay as they are."""
        first = batch(0, rows=8, length=64)
        padded = dataclasses.replace(first, attention_mask=first.attention_mask.clone())
        padded.attention_mask[::2, 40:] = 0
        name = "model.layers.1.mlp.down_proj"
        model, adapters, _ = make(lu_lora_r=8, passes=lambda model: passes_of(model, padded))
        layer, upper = adapters.layers[name], adapters.layers["model.layers.3.mlp.down_proj"]
        assert (layer.rank, upper.rank) == (8, 4) and layer.scale == upper.scale == 8.0
        seen: list[Tensor] = []
        layer.register_forward_pre_hook(lambda m, args: seen.append(args[0]) and None)
        with torch.no_grad():
            batch_loss_sum(model.eval(), padded)
        x = seen[-1][padded.attention_mask.bool()]
        a = layer.lora_A.detach()
        torch.testing.assert_close(a @ a.T, torch.eye(8), rtol=0, atol=1e-5)
        best = torch.linalg.svdvals(x)[:8].square().sum()
        assert (x @ a.T).square().sum() > 0.9 * best
        plain = make(lu_lora_r=8)[1]
        for other, p in plain.named_parameters():
            is_local_A = other.endswith("lora_A.weight") and other.split("layers.")[1][0] in "01"
            assert torch.equal(dict(adapters.named_parameters())[other], p) != is_local_A, other

    def test_the_pass_for_A_ends_at_the_boundary_and_keeps_nothing(self):
        model = tiny_model("llama", num_hidden_layers=NUM_LAYERS).requires_grad_(False)
        settings = AdapterSettings(lora_r=4, lu_lora_r=8, lu_lora_final_layer_index=1, lu_lora_rule="feedback")
        adapters = inject_adapters(model, settings, seed=1)
        verified_head(model)
        called = Counter[int]()
        for i, decoder_layer in enumerate(model.model.layers):
            decoder_layer.register_forward_hook(
                lambda m, _i, out, i=i: called.update({i: 1 + 100 * (out[0].requires_grad or m.training)})  # type: ignore
            )
        model.train()
        passes = passes_of(model, batch(0, rows=2, length=64))
        local = start_local_learning(adapters, settings, lr=1e-2, seed=1, passes=lambda: passes)
        assert local is not None and model.training
        assert called == dict.fromkeys((0, 1), feedback.MIN_TOKENS_PER_COMPONENT * 8 // 128)
        local.begin_step(0)
        backward(model, batch(0))
        assert called[2] > 0

    def test_the_pass_for_A_takes_less_memory_than_a_step(self):
        model = tiny_model("llama", num_hidden_layers=NUM_LAYERS).requires_grad_(False)
        settings = AdapterSettings(lora_r=4, lu_lora_r=8, lu_lora_final_layer_index=1, lu_lora_rule="feedback")
        adapters = inject_adapters(model, settings, seed=1)
        one = batch(0, rows=16, length=64)
        passes = passes_of(model, one)
        started: list[LocalLearning | None] = []
        start = peak_bytes(
            lambda: started.append(start_local_learning(adapters, settings, lr=1e-2, seed=1, passes=lambda: passes))
        )
        assert started[0] is not None
        started[0].begin_step(0)
        assert start < peak_bytes(lambda: backward(model, one))

    def test_own_rank_is_bounded_by_the_linear_and_yields_to_patterns(self):
        """The default of 64 is more than these linears have; a pattern of the user's goes before, with its scale."""
        _, adapters, _ = make()
        hidden = adapters.model.config.hidden_size
        assert {layer.rank for layer in local_layers(adapters).values()} == {min(64, hidden)}
        assert {layer.scale for layer in adapters.layers.values()} == {8.0}
        _, adapters, _ = make(lora_rank_pattern={"down_proj": 2})
        for name, layer in local_layers(adapters).items():
            down = name.endswith("down_proj")
            assert (layer.rank, layer.scale) == ((2, 16.0) if down else (min(64, hidden), 8.0)), name

    def test_backward_passes_may_come_later(self):
        """As in a pipeline: two forward passes, then the two backward passes in the other order."""
        together: list[dict[str, Tensor]] = []
        for late in (False, True):
            model, adapters, local = make()
            model.train()
            local.begin_step(0)
            if late:
                losses = [batch_loss_sum(model, batch(i, rows=i + 1)) for i in range(2)]
                losses[1].backward()
                losses[0].backward()
            else:
                backward(model, batch(0, rows=1), batch(1, rows=2))
            together.append({n: layer.lora_B.grad for n, layer in local_layers(adapters).items()})
        for name, gradient in together[0].items():
            torch.testing.assert_close(gradient, together[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", ["feedback", "mindspeed", "oja", "frozen"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_no_graph_below_the_boundary(rule: str, family: str):
    model, adapters, local = make(rule, family=family)
    outputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, _i, out, name=name: outputs.__setitem__(name, out))
    local.begin_step(0)
    backward(model, batch(0))
    for name, out in outputs.items():
        index = next((int(p) for p in name.split(".") if p.isdigit()), None)
        if name == "model.layers.1" and rule == "feedback":  # the boundary: nothing behind it but each lora_B
            behind = [node for node, _ in out.grad_fn.next_functions if node is not None]
            assert {id(node.variable) for node in behind} == {id(m.lora_B) for m in local_layers(adapters).values()}
        elif index is not None and index <= 1 and isinstance(out, Tensor):
            assert out.grad_fn is None, name
    for name, layer in adapters.layers.items():
        if name in local_layers(adapters):
            assert layer.lora_A.grad is None
            assert (layer.lora_B.grad is not None) == (rule == "feedback")
        else:
            assert layer.lora_B.grad is not None and layer.lora_B.grad.any()


@pytest.mark.parametrize("rule", ["feedback", "mindspeed", "oja"])
def test_only_training_passes_teach(rule: str):
    model, adapters, local = make(rule)
    local.begin_step(0)
    model.eval()
    before = {n: p.detach().clone() for n, p in adapters.named_parameters()}
    with torch.no_grad():
        batch_loss_sum(model, batch(0))
        model.train()
        batch_loss_sum(model, batch(0))
    with pytest.raises(AdapterError, match="no local layer saw a training pass"):
        local.apply_local_update(lr_factor=1.0)
    for name, p in adapters.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None, name


def test_an_abandoned_step_leaves_nothing():
    model, adapters, local = make()
    local.begin_step(0)
    backward(model, batch(5), batch(6))
    local.begin_step(0)
    backward(model, batch(7))
    alone_model, alone, other = make()
    other.begin_step(0)
    backward(alone_model, batch(7))
    for name in local_layers(adapters):
        assert torch.equal(adapters.layers[name].lora_B.grad, alone.layers[name].lora_B.grad)


class _Plan:
    num_steps = 8

    def rows(self, step: int) -> list[int]:
        return [2 * step, 2 * step + 1]

    def micro_batches(self, step: int) -> list[Batch]:
        return [batch(r % 6, rows=1) for r in self.rows(step)]


def run_loop(folder: Path, rule: str, *, stop_at: int | None = None, resume: Any = None, **lu: Any) -> TrainLoop:
    start = None if resume is not None else lambda model: passes_of(model, *(batch(i, rows=1) for i in range(6)))
    model, adapters, local = make(rule, passes=start, **lu)
    settings = TrainSettings(lr=1e-2, log_interval=10**6, save_interval=3, save_interval_minutes=0)  # type: ignore[call-arg]
    plan = _Plan()
    if stop_at is not None:
        plan.num_steps = stop_at
    folder.mkdir(exist_ok=True)
    loop = TrainLoop(
        model,
        adapters,
        plan,
        settings,
        folder=folder,
        origin={},
        adapter_files=dict,
        lr_ratios=adapters.lr_ratios,
        local=local,
    )
    if stop_at is not None:  # the schedule of the whole run
        from finerank.train.schedule import Schedule

        loop.learning_rate = loop.local_learning_rate = Schedule.of(settings, num_steps=_Plan.num_steps)
    if resume is not None:
        loop.restore(resume)
    loop.run()
    return loop


@pytest.mark.parametrize("rule", ["feedback", "mindspeed", "oja", "frozen"])
def test_resumed_run_equals_unbroken_one(tmp_path: Path, rule: str):
    from finerank.checkpoints.native import read_checkpoint

    whole = run_loop(tmp_path / "whole", rule)
    run_loop(tmp_path / "first", rule, stop_at=5)
    resumed = run_loop(tmp_path / "second", rule, resume=read_checkpoint(tmp_path / "first" / "checkpoint-5"))
    start = dict(make(rule)[1].named_parameters())
    for name, p in whole.named_parameters.items():
        assert torch.equal(p, resumed.named_parameters[name]), name
        # every factor moves, the local ones too
        assert not torch.equal(p, start[name]), name


def test_local_B_learns_with_its_own_rate(tmp_path: Path):
    loop = run_loop(tmp_path / "run", "feedback", lu_lora_lr_ratio=5.0)
    rates = {round(group["lr_ratio"], 6): len(group["params"]) for group in loop.optimizer.param_groups}
    assert rates == {1.0: 28, 5.0: 2, round(5 * math.exp(-0.1), 6): 2}  # lower by the layer's depth
    shares = {round(group["lr"] / group["lr_ratio"], 9) for group in loop.optimizer.param_groups}
    assert len(shares) == 1


def test_freeze_after_stops_local_learning_only(tmp_path: Path):
    n = 2
    model, adapters, local = make(lu_lora_freeze_after=n)
    for step, learns in ((n - 1, True), (n, False)):
        local.begin_step(step)
        backward(model, batch(0))
        assert all((m.lora_B.grad is not None) == learns for m in local_layers(adapters).values())
        assert adapters.layers["model.layers.3.mlp.down_proj"].lora_B.grad is not None


@pytest.mark.parametrize("rule", ["feedback", "mindspeed"])
def test_peft_reads_the_trained_adapter(tmp_path: Path, rule: str):
    from peft import PeftModel

    loop = run_loop(tmp_path / "run", rule, lu_lora_r=6)
    model = loop.model.eval()
    adapters = AdapterSet(model, {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}, {}, [])
    config = make(rule, lu_lora_r=6)[1].config
    adapters.config = config
    save_adapter(adapters, tmp_path, base_model_name="tiny")
    ids = batch(3).input_ids
    with torch.no_grad():
        ours = model(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(tiny_model("llama", num_hidden_layers=NUM_LAYERS), tmp_path)(
            input_ids=ids
        ).logits
        again = tiny_model("llama", num_hidden_layers=NUM_LAYERS)
        load_adapter(again, tmp_path)
        loaded = again(input_ids=ids).logits
        base = tiny_model("llama", num_hidden_layers=NUM_LAYERS)(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, loaded, rtol=1e-4, atol=1e-4)
    assert (ours - base).abs().max() > 1e-2


def test_frozen_rule_adapts_only_the_upper_layers():
    _, adapters, _ = make("frozen")
    assert {int(n.split(".")[2]) for n in adapters.layers} == {2, 3}


def test_megatron_targets_keep_their_shared_A_above():
    _, adapters, _ = make("feedback", lora_target_modules=["linear_qkv", "linear_proj", "linear_fc2"])
    assert adapters.groups == ["linear_fc2", "linear_proj", "linear_qkv"]
    upper = adapters.layers
    assert upper["model.layers.2.self_attn.q_proj"].lora_A is upper["model.layers.2.self_attn.v_proj"].lora_A
    assert "model.layers.0.self_attn.q_proj" not in upper


def test_mindspeed_teaches_every_linear_of_a_shared_group():
    model, adapters, local = make("mindspeed", lora_target_modules=["linear_qkv", "linear_fc2"])
    local.begin_step(0)
    before = copy.deepcopy(adapters.state())
    backward(model, batch(0))
    local.apply_local_update(lr_factor=1.0)
    for name in local_layers(adapters):
        for part in ("lora_A", "lora_B"):
            key = f"base_model.model.{name}.{part}.weight"
            assert not torch.equal(adapters.state()[key], before[key]), key


def test_choices_are_the_rules_in_the_folder():
    rules = registry.names("finerank.adapters.local_rules")
    field = AdapterSettings.__dataclass_fields__["lu_lora_rule"]
    assert sorted(field.metadata["choices"]) == rules == ["feedback", "frozen", "mindspeed", "oja", "sampled"]
    for name in rules:
        assert registry.load("finerank.adapters.local_rules", name, "rule").RULE


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"lu_lora_final_layer_index": 3}, ConfigError, "leaves nothing to backpropagate; give 0 to 2"),
        ({"lu_lora_final_layer_index": 9}, ConfigError, "no layer of this model of 4 layers; give 0 to 2"),
        ({"lu_lora_final_layer_index": -1}, ConfigError, "give 0 to 2"),
        ({"lu_lora_final_layer_index": None, "lu_lora_lr": 1e-3}, ConfigError, "no effect without"),
        (
            {"lu_lora_final_layer_index": 1, "lu_lora_rule": "frozen", "lu_lora_lr": 1e-3},
            ConfigError,
            "lu-lora-lr has no effect with .* frozen",
        ),
        (
            {"lu_lora_final_layer_index": 1, "lu_lora_rule": "frozen", "lu_lora_lr_decay_style": "linear"},
            ConfigError,
            "no effect with .* frozen",
        ),
        (
            {"lu_lora_final_layer_index": 1, "lu_lora_rule": "frozen", "lu_lora_freeze_after": 3},
            ConfigError,
            "no effect with .* frozen",
        ),
        ({"lu_lora_final_layer_index": None, "lu_lora_rule": "oja"}, ConfigError, "no effect without"),
        ({**FEEDBACK, "lora_target_modules": ["q_proj"]}, AdapterError, "add o_proj or down_proj"),
        (
            {"lu_lora_final_layer_index": 1, "lora_target_modules": ["layers.0.mlp.down_proj"]},
            AdapterError,
            "nothing would be backpropagated",
        ),
        ({"lu_lora_final_layer_index": 1, "lu_lora_r": 0}, ConfigError, "--lu-lora-r is 0"),
        ({**FEEDBACK, "lu_lora_r": 999}, ConfigError, "input features to find components of"),
        ({"lu_lora_final_layer_index": 1, "lu_lora_lr_ratio": -1.0}, ConfigError, "--lu-lora-lr-ratio must be"),
        ({"lu_lora_final_layer_index": 1, "lora_target_modules": ["embed_tokens"]}, ConfigError, "embed_tokens"),
    ],
)
def test_bad_settings_are_one_sentence(settings: dict[str, Any], error: type[Exception], words: str):
    model = tiny_model("llama", num_hidden_layers=NUM_LAYERS)
    chosen = AdapterSettings(**settings)
    with pytest.raises(error, match=words) as caught:
        start_local_learning(inject_adapters(model, chosen, seed=1), chosen, lr=1e-3, seed=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("style", "share"), [(None, (1 + math.cos(math.pi * 7 / 8)) / 2), ("linear", 1 / 8)])
def test_local_rates_have_their_own_shape(tmp_path: Path, style: str | None, share: float):
    loop = run_loop(tmp_path / "run", "feedback", lu_lora_lr_ratio=5.0, lu_lora_lr_decay_style=style)
    cosine = (1 + math.cos(math.pi * 7 / 8)) / 2  # the run's, at its last step
    for group in loop.optimizer.param_groups:
        assert group["lr"] == pytest.approx(1e-2 * group["lr_ratio"] * (share if group["is_local"] else cosine))
    assert sum(len(group["params"]) for group in loop.optimizer.param_groups if group["is_local"]) == 4


@pytest.mark.parametrize("rule", ["mindspeed", "oja"])
def test_rules_that_apply_themselves_follow_the_local_shape(tmp_path: Path, rule: str, monkeypatch: Any):
    factors: list[float] = []
    monkeypatch.setattr(LocalLearning, "apply_local_update", lambda self, *, lr_factor: factors.append(lr_factor))
    run_loop(tmp_path / "run", rule, lu_lora_lr_decay_style="linear")
    assert factors == pytest.approx([1 - i / 8 for i in range(8)])


def test_the_sampled_rule_decays_by_default():
    styles = {rule: make(rule)[2].lr_decay_style for rule in ("sampled", "feedback", "mindspeed", "oja", "frozen")}
    assert styles == {"sampled": "cosine", "feedback": None, "mindspeed": None, "oja": None, "frozen": None}
    assert make("sampled", lu_lora_lr_decay_style="constant")[2].lr_decay_style == "constant"
