"""TRL's own loss as an oracle: `GRPOTrainer._compute_loss` on tensors, without its trainer."""

import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from rlsys.algo.batching import loss_weights
from rlsys.algo.losses import LossInput, losses
from rlsys.algo.metrics import MetricSums
from rlsys.config import GrpoConfig

MAX_COMPLETION_LENGTH = 9


@pytest.fixture(scope="module")
def trl_loss():
    with pytest.MonkeyPatch.context() as patch:
        # TRL imports vLLM when it can: 5 seconds, and nothing here needs it.
        patch.setitem(sys.modules, "vllm", None)
        trainer = pytest.importorskip("trl.trainer.grpo_trainer")
    return trainer.GRPOTrainer._compute_loss


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
        "entropy": random(1.0).abs(),
        "advantages": torch.tensor([1.2, -0.7, 0.4, -0.9]),
    }


def run_trl(trl_loss, case, config):
    """TRL's loss, gradient and metrics; the namespace is what `_compute_loss` reads of self."""
    logprobs = case["logprobs"].clone().requires_grad_()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, case["entropy"], None),
        _metrics={"train": defaultdict(list)},
        _entropy_bonus_enabled=False,
        accelerator=SimpleNamespace(
            num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x
        ),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        aux_loss_enabled=False,
        beta=config.beta,
        current_gradient_accumulation_steps=1,
        epsilon_high=config.epsilon_high,
        epsilon_low=config.epsilon,
        importance_sampling_level="token",
        loss_type=config.loss_type,
        max_completion_length=MAX_COMPLETION_LENGTH,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
    )
    tokens = torch.zeros(case["mask"].shape, dtype=torch.int64)
    inputs = {
        "prompt_ids": tokens[:, :1],
        "prompt_mask": torch.ones_like(tokens[:, :1]),
        "completion_ids": tokens,
        "completion_mask": case["mask"].int(),
        "advantages": case["advantages"],
        "old_per_token_logps": case["old"],
        "ref_per_token_logps": case["ref"],
        "num_items_in_batch": case["mask"].sum(),
    }
    loss = trl_loss(trainer, None, inputs)
    (grad,) = torch.autograd.grad(loss, logprobs)
    return loss.item(), grad, {name: v[0] for name, v in trainer._metrics["train"].items()}


def run_ours(case, config):
    logprobs = case["logprobs"].clone().requires_grad_()
    mask = case["mask"]
    weights = loss_weights(
        mask, loss_type=config.loss_type, max_completion_length=MAX_COMPLETION_LENGTH
    )
    inputs = LossInput(
        logprobs=logprobs.flatten(),
        old_logprobs=case["old"].flatten(),
        ref_logprobs=case["ref"].flatten() if config.beta else None,
        rollout_logprobs=case["old"].flatten(),
        advantages=case["advantages"][:, None].expand(mask.shape).flatten(),
        weights=weights.flatten(),
        mask=mask.flatten(),
        entropy=case["entropy"].flatten(),
    )
    loss, statistics = losses["grpo"](inputs, config)
    (grad,) = torch.autograd.grad(loss, logprobs)
    sums = MetricSums()
    sums.add(statistics)
    return loss.item(), grad, sums.means()


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_loss_gradient_and_metrics_equal_trls(trl_loss, case, loss_type, beta):
    config = GrpoConfig(beta=beta, epsilon=0.1, epsilon_high=0.2, loss_type=loss_type)
    expected_loss, expected_grad, expected_metrics = run_trl(trl_loss, case, config)
    loss, grad, metrics = run_ours(case, config)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-7)
    shared = ["entropy", *(f"clip_ratio/{name}_mean" for name in ("low", "high", "region"))]
    for name in shared + (["kl"] if beta else []):
        assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-5), name
        assert metrics[name] > 0
