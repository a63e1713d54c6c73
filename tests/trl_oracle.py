"""TRL's own code as an oracle, on tensors, without its trainer; and ours on the same tensors."""

from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch

from rlsys.algo.losses import LossInput, losses
from rlsys.algo.segments import Segments
from rlsys.algo.update_metrics import MetricSums
from rlsys.algo.weighting import keep_high_entropy, loss_weights

MAX_COMPLETION_LENGTH = 9


def tensors():
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


def run_trl(trl, case, config, importance_sampling_ratio=None, loss_of=None):
    """TRL's loss, gradient and metrics; the namespace is what `_compute_loss` reads of self."""
    logprobs = case["logprobs"].clone().requires_grad_()
    entropy = case["entropy"].clone().requires_grad_()
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
            vespo_k_pos=config.vespo_k_pos,
            vespo_lambda_pos=config.vespo_lambda_pos,
            vespo_k_neg=config.vespo_k_neg,
            vespo_lambda_neg=config.vespo_lambda_neg,
        ),
        aux_loss_enabled=False,
        beta=config.beta,
        current_gradient_accumulation_steps=1,
        # TRL's cispo reads epsilon_high as the bound itself.
        epsilon_high=config.epsilons[1] + (config.loss_type == "cispo"),
        epsilon_low=config.epsilon,
        importance_sampling_level=config.loss_settings.importance_sampling_level,
        loss_type="grpo" if config.loss_type == "gspo" else config.loss_type,
        max_completion_length=MAX_COMPLETION_LENGTH,
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=config.off_policy_mask_threshold,
        get_off_policy_mask=trl.get_off_policy_mask,
        get_gamma_weights=trl.get_gamma_weights,
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
    # GMPO is a subclass of TRL's trainer with a loss of its own.
    compute_loss = trl._compute_loss if loss_of is None else loss_of._compute_loss
    loss = compute_loss(trainer, None, inputs)
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
        aggregation=config.loss_settings.loss_aggregation,
        max_completion_length=MAX_COMPLETION_LENGTH,
    )
    batch = SimpleNamespace(
        advantages=case["advantages"][:, None] * mask,
        entropies=case["entropy"],
        completion_mask=mask,
    )
    advantages = keep_high_entropy(batch, range(len(mask)), quantile=config.top_entropy_quantile)
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


def importance_sampling_ratio(trl, case, mode, clip_max, clip_min=None):
    """What TRL's trainer makes of the log-probs of its policy and of vLLM, by its own code."""
    lengths = case["mask"].sum(dim=1).tolist()

    def ragged(values):
        return [row[:length] for row, length in zip(values.tolist(), lengths, strict=True)]

    tokens = ragged(torch.ones(case["mask"].shape, dtype=torch.int64))
    trainer = MagicMock(
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=clip_max,
        vllm_importance_sampling_clip_min=clip_min,
        accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, process_index=0),
        args=SimpleNamespace(
            steps_per_generation=1,
            gradient_accumulation_steps=1,
            per_device_train_batch_size=4,
            gradient_checkpointing_kwargs=None,
            report_to=[],
        ),
        pad_to_multiple_of=None,
        _tokenizer=SimpleNamespace(pad_token_id=0),
        mask_truncated_completions=False,
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        tools=None,
        environment_factories=None,
        environments=None,
        beta=0.0,
        num_iterations=1,
        num_generations=2,
        multi_objective_aggregation="sum_then_normalize",
        scale_rewards="group",
        reward_weights=torch.ones(1),
        reward_funcs=[None],
        reward_func_names=["reward"],
        _pending_extra_logs={},
        _pending_metrics={},
        _metrics={"train": defaultdict(list)},
        log_multimodal=False,
    )
    trainer._generate.return_value = (
        [[1]] * len(lengths),
        tokens,
        None,
        ["text"] * len(lengths),
        ragged(case["rollout"]),
        {},
        None,
        None,
    )
    trainer._get_per_token_logps_and_entropies.return_value = (case["old"], None, None)
    trainer._calculate_rewards.return_value = torch.tensor([[0.0], [1.0], [1.0], [0.0]])
    rows = [{"prompt": "question"}] * len(lengths)
    return trl._generate_and_score_completions(trainer, rows)["importance_sampling_ratio"]
