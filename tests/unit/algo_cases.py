"""Groups and batches that several tests of rlsys.algo start from."""

from __future__ import annotations

import torch

from rlsys.algo.advantages import compute_advantages
from rlsys.algo.batching import build_train_batch
from rlsys.config import GrpoConfig
from rlsys.types import Completion, Prompt, RewardOutput, RolloutGroup, TrainBatch

VOCAB = 32
PAD = VOCAB - 1
"""Not 0, which stands for "nothing" in packed fields."""


def make_groups(
    lengths_PG: list[list[int]], *, prompt_lengths: list[int] | None = None, seed: int = 0
) -> list[RolloutGroup]:
    """Random tokens, log-probs and rewards; `lengths_PG[p][g]` completion tokens."""
    rng = torch.Generator().manual_seed(seed)
    groups = []
    for p, lengths in enumerate(lengths_PG):
        num_prompt_tokens = prompt_lengths[p] if prompt_lengths else 2 + p % 3
        prompt = Prompt(
            prompt_id=f"p{p}",
            messages=[{"role": "user", "content": "?"}],
            token_ids=torch.randint(1, PAD, (num_prompt_tokens,), generator=rng).tolist(),
        )
        completions, rewards = [], []
        for length in lengths:
            completions.append(
                Completion(
                    token_ids=torch.randint(1, PAD, (length,), generator=rng).tolist(),
                    rollout_logprobs=(-4 * torch.rand(length, generator=rng)).tolist(),
                    text="",
                    finish_reason="length" if length == max(lengths) else "stop",
                    policy_versions=(0,),
                )
            )
            correct, tidy = torch.randint(0, 2, (2,), generator=rng).tolist()
            rewards.append(
                RewardOutput(total=correct + 0.5 * tidy, by_name={"correct": correct, "tidy": tidy})
            )
        groups.append(RolloutGroup(p, prompt, completions, rewards, group_id=p))
    return groups


def padded_batch(groups: list[RolloutGroup]) -> TrainBatch:
    """`build_train_batch`, whose padding is PAD here."""
    batch = build_train_batch(groups)
    batch.input_ids[torch.arange(batch.input_ids.shape[1]) >= batch.lengths[:, None]] = PAD
    return batch


def make_batch(lengths_PG: list[list[int]], *, seed: int = 0) -> TrainBatch:
    """A train batch with reference and old log-probs near the rollout's."""
    groups = make_groups(lengths_PG, seed=seed)
    batch = padded_batch(groups)
    batch.advantages = compute_advantages(groups, batch, GrpoConfig(), None)
    rng = torch.Generator().manual_seed(seed + 1)
    for name, spread in (("ref_logprobs", 0.5), ("old_logprobs", 0.3)):
        noise = spread * torch.randn(batch.input_ids.shape, generator=rng)
        setattr(batch, name, (batch.rollout_logprobs + noise) * batch.completion_mask)
    return batch
