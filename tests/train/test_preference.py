"""Losses over pairs: their papers' formulas by hand, TRL's values, and how `PairLoss` puts them together."""

import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from finerank import registry
from finerank.data.loader import packed_batch, padded_batch
from finerank.errors import ConfigError
from finerank.models.attention import use_packed_attention
from finerank.train.pair_loss import MEASURES, PairLoss, pairs_of
from finerank.train.preference import Pairs, load_loss
from finerank.train.preference.orpo import log_one_minus_exp
from finerank.train.settings import PreferenceSettings
from pair_rows import pair_rows
from tiny import tiny_model

NAMES = registry.names("finerank.train.preference")

CHOSEN, REJECTED = [-12.5, -3.25, -40.0, -1e-7], [-14.0, -2.5, -39.0, -60.0]
REFERENCE = [-13.0, -3.5, -41.5, -0.5], [-13.5, -2.0, -42.0, -55.0]
COUNTS = [7, 3, 20, 1], [9, 2, 17, 30]


def pairs(dtype: torch.dtype = torch.float64) -> Pairs:
    values = [torch.tensor(v, dtype=dtype, requires_grad=i < 2) for i, v in enumerate((CHOSEN, REJECTED, *REFERENCE))]
    num_chosen, num_rejected = (torch.tensor(c) for c in COUNTS)
    return Pairs(
        chosen=values[0],
        rejected=values[1],
        num_chosen=num_chosen,
        num_rejected=num_rejected,
        reference_chosen=values[2],
        reference_rejected=values[3],
    )


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def by_hand(name: str, i: int, *, beta: float, eps: float, gamma: float) -> float:
    """Each paper's formula in plain Python floats."""
    w, l = CHOSEN[i], REJECTED[i]  # noqa: E741 (the papers' names)
    h_w, h_l = w - REFERENCE[0][i], l - REFERENCE[1][i]
    n_w, n_l = COUNTS[0][i], COUNTS[1][i]
    if name in ("sigmoid", "simpo"):
        margin = beta * (h_w - h_l) if name == "sigmoid" else beta * (w / n_w - l / n_l) - gamma
        return -(1 - eps) * log_sigmoid(margin) - eps * log_sigmoid(-margin)
    if name == "hinge":
        return max(0.0, 1 - beta * (h_w - h_l))
    if name == "ipo":
        return (h_w / n_w - h_l / n_l - 1 / (2 * beta)) ** 2
    assert name == "orpo"
    odds = [p / n - math.log(-math.expm1(p / n)) for p, n in ((w, n_w), (l, n_l))]
    return -w / n_w - beta * log_sigmoid(odds[0] - odds[1])


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("name", NAMES)
def test_the_formula_by_hand(name: str, beta: float) -> None:
    settings = PreferenceSettings(dpo_label_smoothing=0.15, simpo_gamma=0.8)
    found = load_loss(name).pair_losses(pairs(), settings, beta)
    want = [by_hand(name, i, beta=beta, eps=0.15, gamma=0.8) for i in range(4)]
    torch.testing.assert_close(found.loss.detach(), torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_equal_numeric_and_push_the_right_way(name: str) -> None:
    made, settings = pairs(), PreferenceSettings()
    loss = load_loss(name)

    def total(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        own = Pairs(**{**vars(made), "chosen": chosen, "rejected": rejected})
        return loss.pair_losses(own, settings, loss.BETA).loss

    some = [v.detach()[:3].requires_grad_() for v in (made.chosen, made.rejected)]
    made = Pairs(**{k: v[:3] for k, v in vars(made).items()})
    assert torch.autograd.gradcheck(total, some)
    if name == "ipo":  # the one that can be over its goal
        return
    to_chosen, to_rejected = torch.autograd.grad(total(*some).sum(), some)
    assert (to_chosen <= 0).all() and (to_rejected >= 0).all() and (to_chosen < 0).any()


def test_odds_of_a_certain_answer_are_finite() -> None:
    x = torch.tensor([-1e-30, -1e-9, -0.3, -0.7, -50.0, -200.0], requires_grad=True)
    value = log_one_minus_exp(x)
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(x.grad).all()
    want = [math.log(-math.expm1(v)) for v in (-0.3, -0.7, -50.0)]
    assert value[2:5].tolist() == pytest.approx(want, rel=1e-6)


def settings_of(name: str, **values: float) -> PreferenceSettings:
    return PreferenceSettings(pref_loss=name, **values)


def referenced(num: int):
    data = pair_rows(num)
    return data.with_reference(np.random.default_rng(7).normal(-40, 3, (num, 2)).astype(np.float32))


@pytest.mark.parametrize("name", NAMES)
def test_packed_shared_and_padded_batches_give_the_same(name: str) -> None:
    data, values, gradients = referenced(5), [], []
    for layout in ("padded", "packed", "shared"):
        model, loss = tiny_model("llama"), PairLoss(settings_of(name, pref_ftx=0.3))
        if layout == "padded":
            batches = [padded_batch(data, [3, 1], length=40, pad_token_id=0)]
            batches.append(padded_batch(data, [0], length=32, pad_token_id=0))
        else:
            use_packed_attention(model)
            batches = [packed_batch(data, [3, 1, 0], share=layout == "shared")]
        assert sum(loss.count(b) for b in batches) == 3
        total = sum(loss(model, b) for b in batches)
        (gradient,) = torch.autograd.grad(total, model.get_parameter("model.layers.0.mlp.up_proj.weight"))
        values.append([total.item(), *loss.measures().values()])
        gradients.append(gradient)
    for other, gradient in zip(values[1:], gradients[1:], strict=True):
        assert other == pytest.approx(values[0], rel=1e-5, abs=1e-6)
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-6)


def test_measures_are_means_since_begin() -> None:
    data, model, loss = referenced(4), tiny_model("llama"), PairLoss(settings_of("sigmoid", pref_beta=0.3))
    batch = padded_batch(data, [0, 1, 2], length=40, pad_token_id=0)
    loss(model, padded_batch(data, [3], length=40, pad_token_id=0))
    loss.begin()
    loss(model, batch)
    found = loss.measures()
    assert tuple(found) == MEASURES
    made = pairs_of(model, batch)
    chosen, rejected = (0.3 * r for r in made.ratios())
    assert found["rewards/chosen"] == pytest.approx(chosen.mean().item())
    assert found["rewards/margins"] == pytest.approx((chosen - rejected).mean().item(), abs=1e-6)
    assert found["rewards/accuracies"] == pytest.approx((chosen > rejected).float().mean().item())
    assert found["logps/rejected"] == pytest.approx(made.rejected.mean().item())


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(ConfigError, match="--simpo-gamma has no effect with --pref-loss hinge"):
        PairLoss(settings_of("hinge", simpo_gamma=1.0))
    with pytest.raises(ConfigError, match="sigmoid"):
        PairLoss(settings_of("sigmod"))


# --- TRL -------------------------------------------------------------------------------------------------------------

TRL_1_16 = {
    "sigmoid": [0.6443967223167419, 0.6563501358032227, 0.7709571123123169, 0.4554924964904785],
    "hinge": [0.9000000953674316, 0.925000011920929, 1.149999976158142, 0.44999998807907104],
    "ipo": [23.74628448486328, 21.77777671813965, 26.025001525878906, 18.77777862548828],
    "simpo": [1.1883753538131714, 0.763282060623169, 0.6588258743286133, 0.37975040078163147],
    "orpo": [1.870216965675354, 1.141266107559204, 2.054034948348999, 1.0156517760151473e-07],
}
"""What TRL 1.16.0 gives for the pairs above; made by `trl_losses`."""


def trl_losses() -> dict[str, list[float]]:
    """TRL's own values: DPO's losses by its trainer over given log-probabilities, SimPO and ORPO by their functions."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    found = {name: [trl_dpo(name, i) for i in range(4)] for name in ("sigmoid", "hinge", "ipo")}
    here = SimpleNamespace(device="cpu")
    chosen, rejected = (torch.tensor(p) / torch.tensor(n) for p, n in zip((CHOSEN, REJECTED), COUNTS, strict=True))
    simpo = {"alpha": 0.0, "accelerator": here, "loss_type": "simpo", "simpo_gamma": 0.5, "beta": 2.0}
    cpo = CPOTrainer.cpo_loss(SimpleNamespace(**simpo, label_smoothing=0.1), chosen, rejected)[0]
    orpo = ORPOTrainer.odds_ratio_loss(SimpleNamespace(accelerator=here, beta=0.1), chosen, rejected)[0]
    return {**found, "simpo": cpo.tolist(), "orpo": (-chosen - orpo).tolist()}


def trl_dpo(name: str, i: int) -> float:
    """`DPOTrainer`'s loss of one pair; its model is one that gives our log-probabilities."""
    from trl.trainer.dpo_trainer import DPOTrainer

    counts, length = (COUNTS[0][i], COUNTS[1][i]), max(COUNTS[0][i], COUNTS[1][i]) + 2
    mask = torch.tensor([[0, 0, *([1] * n), *([0] * (length - 2 - n))] for n in counts])
    given = torch.tensor([CHOSEN[i] / counts[0], REJECTED[i] / counts[1]])
    none = torch.zeros(2, length - 1)
    outputs = SimpleNamespace(
        log_probs=given[:, None] * mask[:, 1:], entropy=none, mean_logits=none, is_top1=none.bool()
    )
    trainer = mock.MagicMock(
        ld_alpha=None, beta=0.1, loss_types=[name], loss_weights=[1.0], f_divergence_type="reverse_kl",
        precompute_ref_logps=True, aux_loss_enabled=False, use_weighting=False, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    trainer.model = mock.MagicMock(return_value=outputs)
    trainer.accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    inputs = {
        "input_ids": mask,
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": torch.tensor([REFERENCE[0][i]]),
        "ref_rejected_logps": torch.tensor([REFERENCE[1][i]]),
    }
    return DPOTrainer._compute_loss(trainer, trainer.model, inputs, False).item()


def ours_for_trl(name: str) -> list[float]:
    settings = PreferenceSettings(dpo_label_smoothing=0.1 if name == "simpo" else 0.0)
    loss = load_loss(name)
    return loss.pair_losses(pairs(torch.float32), settings, loss.BETA).loss.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_trl_has_the_same_values(name: str) -> None:
    assert ours_for_trl(name) == pytest.approx(TRL_1_16[name], rel=1e-6, abs=1e-9)


def test_trl_itself_gives_them() -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    found = trl_losses()
    for name in NAMES:
        assert found[name] == pytest.approx(TRL_1_16[name], rel=1e-6)


def test_supervised_part_is_the_mean_over_the_chosen_answer() -> None:
    data, model = referenced(2), tiny_model("llama")
    batch = padded_batch(data, [1], length=40, pad_token_id=0)
    plain, with_part = (PairLoss(settings_of("sigmoid", pref_ftx=f))(model, batch) for f in (0.0, 0.5))
    (ids, labels) = data.sequences(1)[0]
    logits = model(input_ids=torch.from_numpy(ids)[None].long()).logits[0, :-1]
    mean = F.cross_entropy(logits, torch.from_numpy(labels)[1:].long(), ignore_index=-100)
    assert (with_part - plain).item() == pytest.approx(0.5 * mean.item(), rel=1e-5)
