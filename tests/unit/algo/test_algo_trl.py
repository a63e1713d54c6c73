"""TRL's own code as an oracle: losses, what its trainer does to log-probs of vLLM, and GMPO."""

import sys
import warnings

import pytest
import torch
from trl_oracle import importance_sampling_ratio, run_ours, run_trl, tensors

from rlsys.config import GrpoConfig


@pytest.fixture(scope="module")
def trl_modules():
    with pytest.MonkeyPatch.context() as patch:
        # TRL imports vLLM when it can: 5 seconds, and nothing here needs it.
        patch.setitem(sys.modules, "vllm", None)
        trainer = pytest.importorskip("trl.trainer.grpo_trainer")
        with warnings.catch_warnings(action="ignore"):  # that it is experimental
            gmpo = pytest.importorskip("trl.experimental.gmpo.gmpo_trainer")
        patch.setattr(trainer, "gather_object", lambda values: values)
        yield trainer.GRPOTrainer, gmpo.GMPOTrainer


@pytest.fixture(scope="module")
def trl(trl_modules):
    return trl_modules[0]


@pytest.fixture(scope="module")
def case():
    return tensors()


def assert_equal(ours, expected, *names):
    assert ours[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-7)
    for gradient, other in zip(ours[1], expected[1], strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-7)
    for name in names:
        assert ours[2][name] == pytest.approx(expected[2][name], rel=1e-5), name
        assert ours[2][name] > 0


LOSS_TYPES = ["grpo", "bnpo", "dapo", "dr_grpo", "gspo", "luspo", "cispo", "sapo", "vespo"]
CLIPS = [f"clip_ratio/{name}_mean" for name in ("low", "high", "region")]


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.1},
        {"delta": 1.3},
        {"off_policy_mask_threshold": 0.05},
        {"top_entropy_quantile": 0.4, "beta": 0.1},
    ],
    ids=str,
)
def test_loss_gradient_and_metrics_equal_trls(trl, case, loss_type, options):
    config = GrpoConfig(epsilon=0.05, epsilon_high=0.1, loss_type=loss_type, **options)
    metrics = ["entropy"] + (["kl"] if config.beta else [])
    if loss_type in ("grpo", "bnpo", "dapo", "dr_grpo") and not options:
        metrics += CLIPS
    if loss_type == "cispo" and not options:
        metrics += ["cispo_clip_ratio"]
    assert_equal(run_ours(case, config), run_trl(trl, case, config), *metrics)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_the_bias_corrected_kl_equals_trls(trl, case, loss_type):
    config = GrpoConfig(
        epsilon_high=0.2, beta=0.1, use_bias_correction_kl=True, loss_type=loss_type
    )
    assert_equal(run_ours(case, config), run_trl(trl, case, config), "kl")


@pytest.mark.parametrize("loss_type", ["bnpo", "dapo", "cispo"])
def test_the_entropy_bonus_equals_trls_where_the_loss_is_a_mean_over_tokens(trl, case, loss_type):
    """TRL's bonus is that with every loss; ours is averaged as the loss is."""
    config = GrpoConfig(epsilon_high=0.2, entropy_coef=0.3, loss_type=loss_type)
    assert_equal(run_ours(case, config), run_trl(trl, case, config))


MODES = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("cap", "lower"), [(3.0, None), (1.1, None), (0.6, None), (1.1, 0.8), (1e9, 0.8)]
)
def test_rollout_is_equals_trls_importance_sampling_modes(trl, case, mode, cap, lower):
    """A mode of TRL is one setting here; its weights come from TRL's own trainer."""
    ratio = importance_sampling_ratio(trl, case, mode, cap if cap < 1e9 else None, lower)
    config = GrpoConfig(
        epsilon_high=0.2,
        beta=0.1,
        rollout_is=mode,
        rollout_is_threshold=cap,
        rollout_is_threshold_lower=lower,
    )
    assert_equal(run_ours(case, config), run_trl(trl, case, config, ratio))
    if lower and mode.endswith("mask"):
        assert (ratio == 0).any()


@pytest.mark.parametrize(("level", "cap"), [("token", 1.1), ("sequence", 0.6)])
def test_a_mode_that_masks_is_truncation_and_rejection_without_lower_bound(case, level, cap):
    mask = GrpoConfig(rollout_is=f"{level}_mask", rollout_is_threshold=cap)
    both = GrpoConfig(
        rollout_is=level,
        rollout_is_threshold=cap,
        rollout_rs=level,
        rollout_rs_threshold=cap,
        rollout_rs_threshold_lower=0,
    )
    ours = run_ours(case, mask)
    assert_equal(run_ours(case, both), ours)
    assert ours[2]["sampling/masked_fraction"] > 0
    assert ours[2]["sampling/clipped_fraction"] == 0


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask"])
def test_vespos_correction_is_part_of_its_weight_as_in_trl(trl, case, mode):
    ratio = importance_sampling_ratio(trl, case, mode, 1.2)
    config = GrpoConfig(loss_type="vespo", rollout_is=mode, rollout_is_threshold=1.2)
    assert_equal(run_ours(case, config), run_trl(trl, case, config, ratio))


@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "grpo"])
def test_ratios_of_sequences_equal_trls(trl, case, loss_type):
    config = GrpoConfig(
        epsilon_high=0.02, loss_type=loss_type, importance_sampling_level="sequence"
    )
    ours, theirs = run_ours(case, config), run_trl(trl, case, config)
    assert_equal(ours, theirs)
    if loss_type == "cispo":
        assert ours[2]["cispo_clip_ratio"] > 0


@pytest.mark.parametrize("options", [{}, {"epsilon_high": 0.3}, {"beta": 0.1}], ids=str)
def test_gmpo_equals_trls(trl_modules, case, options):
    trl, gmpo = trl_modules
    config = GrpoConfig(loss_type="gmpo", epsilon=0.2, **options)
    assert_equal(run_ours(case, config), run_trl(trl, case, config, loss_of=gmpo), *CLIPS)
