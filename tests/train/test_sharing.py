"""When prompts are shared, and that a run with shared prompts learns what one without them learns."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from finerank.cli import main
from finerank.errors import ConfigError
from finerank.models.attention import use_packed_attention
from finerank.train.metrics import read_metrics
from finerank.train.sharing import choose_sharing
from tiny import save_tiny, tiny_model


def settings(**changes: object) -> SimpleNamespace:
    values = {
        "share_prompts": None,
        "pack": True,
        "lora_dropout": 0.0,
        "lu_lora_final_layer_index": None,
        "lu_lora_rule": "feedback",
        "cache_boundary": False,
    }
    return SimpleNamespace(**{**values, **changes})


OBSTACLES = [
    {"pack": False},
    {"lora_dropout": 0.1},
    {"cache_boundary": True},
    {"lu_lora_final_layer_index": 0, "lu_lora_rule": "oja"},
]


def test_on_the_cpu_prompts_are_shared_where_nothing_stands_against_it():
    model = tiny_model("llama")
    use_packed_attention(model)
    assert choose_sharing(settings(), model) and choose_sharing(settings(share_prompts=True), model)
    assert choose_sharing(settings(lu_lora_final_layer_index=0), model)
    assert not choose_sharing(settings(share_prompts=False), model)
    for changes in OBSTACLES:
        assert not choose_sharing(settings(**changes), model)


@pytest.mark.parametrize("changes", OBSTACLES, ids=lambda changes: next(iter(changes)))
def test_asked_for_where_it_cannot_be_is_one_sentence(changes: dict):
    model = tiny_model("llama")
    use_packed_attention(model)
    with pytest.raises(ConfigError, match=r"--share-prompts is not possible: .*; leave it out"):
        choose_sharing(settings(share_prompts=True, **changes), model)


def test_a_run_learns_the_same(tmp_path: Path):
    save_tiny(tmp_path / "base")
    system = "You answer in one short and friendly sentence, whatever you are asked."
    rows = [{"instruction": f"Say {i}.", "output": f"I say {i * i}!", "system": system} for i in range(24)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    losses = {}
    for switch in ("--share-prompts", "--no-share-prompts"):
        out = tmp_path / switch
        command = f"tune --load {tmp_path}/base --data-path {tmp_path}/rows.json --output-dir {out} --dtype fp32"
        command += " --lr 0.01 --val-set-size 4 --batch-size 8 --num-epochs 2 --no-tune-runtime"
        assert main([*command.split(), "--prompt-type", "qwen", "--map-keys", "system=system", switch]) == 0
        losses[switch] = read_metrics(out / "metrics.jsonl")
    shared, apart = losses.values()
    assert [row["step"] for row in shared] == [row["step"] for row in apart]
    for one, other in zip(shared, apart, strict=True):
        assert one.keys() == other.keys()
        for name in ("loss", "eval_loss", "grad_norm"):
            if one.get(name) is None or other.get(name) is None:
                assert one.get(name) is other.get(name)
            else:
                assert one[name] == pytest.approx(other[name], rel=1e-4)
    assert shared[-1]["eval_loss"] < shared[0]["eval_loss"]
