"""TRL's own code as an oracle of preference losses: value, gradient and metrics at 1e-6."""

import sys
import warnings
from importlib import import_module

import pytest
import torch
from preference_oracle import (
    algorithm,
    run_dpo,
    run_kto,
    run_ours,
    run_without_reference,
    tensors,
)

from rlsys.algo.losses.preference import PAIR_LOSSES

TRAINERS = {
    "DPOTrainer": "trl.trainer.dpo_trainer",
    "KTOTrainer": "trl.trainer.kto_trainer",
    "CPOTrainer": "trl.experimental.cpo.cpo_trainer",
    "ORPOTrainer": "trl.experimental.orpo.orpo_trainer",
}
COMMON = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")


@pytest.fixture(scope="module")
def trl():
    pytest.importorskip("trl")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="ignore"):
        # TRL imports vLLM when it can: 5 seconds, and nothing here needs it.
        patch.setitem(sys.modules, "vllm", None)
        yield {name: getattr(import_module(path), name) for name, path in TRAINERS.items()}


def assert_equal(ours, expected, *names):
    assert ours[0] == pytest.approx(expected[0], rel=1e-6, abs=1e-6)
    torch.testing.assert_close(ours[1], expected[1], rtol=1e-6, atol=1e-6)
    assert expected[1].abs().max() > 1e-4
    for name in names:
        assert ours[2][name] == pytest.approx(float(expected[2][name]), rel=1e-6, abs=1e-6), name


DPO_LOSSES = sorted(PAIR_LOSSES.keys() - {"cpo", "simpo", "orpo"})


@pytest.mark.parametrize("loss_type", DPO_LOSSES)
@pytest.mark.parametrize(
    "options", [{}, {"beta": 0.5}, {"rpo_alpha": 0.7}, {"reference_free": True}], ids=str
)
def test_losses_with_a_reference_are_those_of_dpo(trl, loss_type, options):
    if loss_type in ("robust", "exo_pair"):
        options = options | {"label_smoothing": 0.2}
    check_dpo(trl, loss_type, options)


DIVERGENCES = [
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": -0.4},
]


@pytest.mark.parametrize("loss_type", ["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust"])
@pytest.mark.parametrize("options", DIVERGENCES, ids=str)
def test_divergences_are_those_of_dpo(trl, loss_type, options):
    check_dpo(trl, loss_type, options | {"beta": 0.3})


def check_dpo(trl, loss_type, options):
    config = algorithm(loss_type=loss_type, **options)
    section, case = config.preference, tensors()
    case.logits, case.ref = case.logits.float(), case.ref.float()  # TRL knows no wider type
    types, weights = [loss_type], [1.0]
    if section.rpo_alpha:
        types, weights = [loss_type, "sft"], [1.0, section.rpo_alpha]
    expected = run_dpo(trl["DPOTrainer"], case, section, loss_types=types, weights=weights)
    assert_equal(run_ours(case, config), expected, *COMMON, "rewards/accuracies")


@pytest.mark.parametrize(
    ("loss_type", "options"),
    [
        ("cpo", {}),
        ("cpo", {"cpo_alpha": 0.3, "label_smoothing": 0.1}),
        ("simpo", {}),
        ("simpo", {"beta": 1.3, "simpo_gamma": 0.4}),
        ("simpo", {"cpo_alpha": 0.5, "label_smoothing": 0.1}),
    ],
    ids=str,
)
def test_cpo_and_simpo_are_those_of_trl(trl, loss_type, options):
    config, case = algorithm(loss_type=loss_type, **options), tensors()
    section = config.preference
    expected = run_without_reference(
        trl["CPOTrainer"],
        case,
        loss_type="sigmoid" if loss_type == "cpo" else "simpo",
        beta=section.scale,
        simpo_gamma=section.simpo_gamma,
        label_smoothing=section.label_smoothing,
        cpo_alpha=section.nll_weight,
        alpha=0.0,
    )
    assert_equal(run_ours(case, config), expected, *COMMON, "rewards/accuracies")


@pytest.mark.parametrize("beta", [0.1, 0.6])
def test_orpo_is_that_of_trl(trl, beta):
    """With prompts of one token: TRL's likelihood is of the prompts, too, ours of the answers."""
    config, case = algorithm(loss_type="orpo", beta=beta), tensors(prompts=(1, 1, 1, 1))
    case.logits = case.logits.float()
    expected = run_without_reference(trl["ORPOTrainer"], case, beta=beta)
    names = ("rewards/accuracies", "nll_loss", "log_odds_ratio", "log_odds_chosen")
    assert_equal(run_ours(case, config), expected, *COMMON, *names)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.8},
        {"reference_free": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("kl", [1.7, -0.4])
def test_kto_is_that_of_trl(trl, loss_type, options, kl):
    config, case = algorithm(loss_type=loss_type, **options), tensors()
    ratios = kl + torch.linspace(-1, 1, 8, dtype=torch.float64)
    expected = run_kto(trl["KTOTrainer"], case, config.preference, kl_ratios=ratios)
    estimate = ratios.mean().clamp(min=0).reshape(1) if loss_type == "kto" else None
    assert_equal(run_ours(case, config, kl=estimate), expected, *COMMON)
