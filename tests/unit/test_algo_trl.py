"""TRL's own code as an oracle, on tensors, without its trainer.

`GRPOTrainer._compute_loss` for every loss_type that both have (TRL's vespo is not here), and what
its trainer does to rewards.
"""

import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from rlsys.algo.losses import LossInput, losses
from rlsys.algo.metrics import MetricSums
from rlsys.algo.names import aggregation_of
from rlsys.algo.segments import Segments
from rlsys.algo.weighting import keep_high_entropy, loss_weights
from rlsys.config import GrpoConfig

MAX_COMPLETION_LENGTH = 9


@pytest.fixture(scope="module")
def trl():
    with pytest.MonkeyPatch.context() as patch:
        # TRL imports vLLM when it can: 5 seconds, and nothing here needs it.
        patch.setitem(sys.modules, "vllm", None)
        trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    return trainer.GRPOTrainer


@pytest.fixture(scope="module")
def case():
    """Four completions of up to nine tokens, right-padded, ratios on both sides of both clips."""
    rng = torch.Generator().manual_seed(0)
    mask = torch.arange(9) < torch.tensor([9, 4, 1, 6])[:, None]

    def random(spread):
        return spread * torch.randn(mask.shape, generator=rng)

    logprobs = -2 + random(0.5)
    return {
        "mask": mask,
        "logprobs": logprobs,
        "old": logprobs + random(0.3),
        "ref": logprobs + random(0.3),
        "rollout": logprobs + random(0.3),
        "entropy": random(1.0).abs(),
        "advantages": torch.tensor([1.2, -0.7, 0.4, -0.9]),
    }


def run_trl(trl, case, config, importance_sampling_ratio=None):
    """TRL's loss, gradient and metrics; the namespace is what `_compute_loss` reads of self."""
    logprobs = case["logprobs"].clone().requires_grad_()
    entropy = case["entropy"].clone().requires_grad_()
    sequence_ratio = config.loss_type in ("gspo", "luspo")
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, entropy, None),
        _metrics={"train": defaultdict(list)},
        _entropy_bonus_enabled=config.entropy_coef > 0,
        entropy_coef=config.entropy_coef,
        use_adaptive_entropy=False,
        accelerator=SimpleNamespace(
            num_processes=1,
            sync_gradients=True,
            reduce=lambda x, reduction: x,
            gather=lambda x: x,
            pad_across_processes=lambda x, **_: x,
        ),
        args=SimpleNamespace(
            delta=config.delta,
            use_bias_correction_kl=config.use_bias_correction_kl,
            steps_per_generation=1,
            sapo_temperature_pos=config.sapo_temperature_pos,
            sapo_temperature_neg=config.sapo_temperature_neg,
        ),
        aux_loss_enabled=False,
        beta=config.beta,
        current_gradient_accumulation_steps=1,
        # TRL's cispo reads epsilon_high as the bound itself.
        epsilon_high=config.epsilon_high + (config.loss_type == "cispo"),
        epsilon_low=config.epsilon,
        importance_sampling_level="sequence" if sequence_ratio else "token",
        loss_type="grpo" if config.loss_type == "gspo" else config.loss_type,
        max_completion_length=MAX_COMPLETION_LENGTH,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=config.off_policy_mask_threshold,
        get_off_policy_mask=trl.get_off_policy_mask,
        top_entropy_quantile=config.top_entropy_quantile,
        use_vllm=importance_sampling_ratio is not None,
        vllm_importance_sampling_correction=True,
    )
    trainer.get_high_entropy_mask = lambda *args: trl.get_high_entropy_mask(trainer, *args)
    tokens = torch.zeros(case["mask"].shape, dtype=torch.int64)
    inputs = {
        "prompt_ids": tokens[:, :1],
        "prompt_mask": torch.ones_like(tokens[:, :1]),
        "completion_ids": tokens,
        "completion_mask": case["mask"].int(),
        "advantages": case["advantages"],
        "old_per_token_logps": case["old"],
        "ref_per_token_logps": case["ref"],
        "sampling_per_token_logps": case["rollout"],
        "importance_sampling_ratio": importance_sampling_ratio,
        "num_items_in_batch": case["mask"].sum(),
    }
    loss = trl._compute_loss(trainer, None, inputs)
    grads = torch.autograd.grad(
        loss, (logprobs, entropy), allow_unused=True, materialize_grads=True
    )
    return loss.item(), grads, {name: v[0] for name, v in trainer._metrics["train"].items()}


def run_ours(case, config):
    logprobs = case["logprobs"].clone().requires_grad_()
    entropy = case["entropy"].clone().requires_grad_()
    mask = case["mask"]
    weights = loss_weights(
        mask,
        aggregation=aggregation_of(config.loss_type, None),
        max_completion_length=MAX_COMPLETION_LENGTH,
    )
    advantages = keep_high_entropy(
        case["advantages"][:, None] * mask,
        case["entropy"],
        mask,
        rows=range(len(mask)),
        quantile=config.top_entropy_quantile,
    )
    rows, length = mask.shape
    inputs = LossInput(
        logprobs=logprobs.flatten(),
        old_logprobs=case["old"].flatten(),
        ref_logprobs=case["ref"].flatten() if config.beta else None,
        rollout_logprobs=case["rollout"].flatten(),
        advantages=advantages.flatten(),
        weights=weights.flatten(),
        mask=mask.flatten(),
        segments=Segments(torch.arange(rows).repeat_interleave(length), rows),
        entropy=entropy.flatten(),
    )
    loss, statistics = losses[config.loss_type](inputs, config)
    grads = torch.autograd.grad(
        loss, (logprobs, entropy), allow_unused=True, materialize_grads=True
    )
    sums = MetricSums()
    sums.add(statistics)
    return loss.item(), grads, sums.means()


def assert_equal(ours, expected, *names):
    assert ours[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-7)
    for gradient, other in zip(ours[1], expected[1], strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-7)
    for name in names:
        assert ours[2][name] == pytest.approx(expected[2][name], rel=1e-5), name
        assert ours[2][name] > 0


LOSS_TYPES = ["grpo", "bnpo", "dapo", "dr_grpo", "gspo", "luspo", "cispo", "sapo"]
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


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("token_truncate", {"rollout_is": "token"}),
        ("sequence_truncate", {"rollout_is": "sequence"}),
        ("token_mask", {"rollout_is": "token", "rollout_rs": "token"}),
        ("sequence_mask", {"rollout_is": "sequence", "rollout_rs": "sequence"}),
    ],
)
def test_corrections_equal_trls_modes(trl, case, mode, options):
    """The four values of vllm_importance_sampling_mode, as TRL's documentation defines them."""
    cap, lower = 1.1, 0.8 if mode.endswith("mask") else None
    log_w = (case["old"] - case["rollout"]) * case["mask"]
    ratio = (log_w.sum(-1, keepdim=True) if mode.startswith("sequence") else log_w).exp()
    if mode.endswith("truncate"):
        ratio = ratio.clamp(max=cap)
    else:
        ratio = ratio.masked_fill((ratio < lower) | (ratio > cap), 0.0)
        assert (ratio == 0).any()
    config = GrpoConfig(
        epsilon_high=0.2,
        beta=0.1,
        rollout_is_threshold=cap,
        rollout_rs_threshold=cap,
        rollout_rs_threshold_lower=lower,
        **options,
    )
    assert_equal(run_ours(case, config), run_trl(trl, case, config, ratio))
