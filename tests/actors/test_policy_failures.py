"""A failing update raises at once, names the cause, and spoils nothing."""

import os
import time

import pytest
import torch
from patience import PATIENCE_S
from policy_cases import LAYOUTS, exported, policy_config, random_batch

from rlsys.actors.policy import PolicyActors, PolicyRank
from rlsys.actors.waiting import ActorDeath, ActorFailure, get_all

pytestmark = pytest.mark.system

SHARDS = r"raise policy\.tensor_parallel_size or policy\.pipeline_parallel_size"


@pytest.mark.parametrize("layout", ["one rank", "TP 2", "PP 2", "DP 2"])
def test_a_gradient_that_is_not_finite_raises_and_is_not_applied(lab, policy_models, layout):
    config = policy_config(policy_models["qwen3-tied"], on_nonfinite="raise", **LAYOUTS[layout])
    policy = lab.policy(config)
    policy.update(random_batch())
    before = exported(policy)
    batch = random_batch()
    batch.advantages[1] = torch.nan
    message = r"policy rank \d failed in policy update.*policy version 1 .*norm nan.*loss nan"
    with pytest.raises(ActorFailure, match=message):
        policy.update(batch)
    assert policy.policy_version == 1
    after = exported(policy)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("at", "what", "remedy"),
    [
        # More replicas do not make these smaller.
        ("weights", "the policy's weights", rf"{SHARDS};"),
        ("gradients", "the policy's gradients in fp32", rf"{SHARDS};"),
        ("optimizer", "the optimizer's copy of the weights", "policy.use_distributed_optimizer"),
        (
            "update",
            r"the policy's update in micro-batches of \d+ tokens",
            r"lower policy\.max_tokens_per_micro_batch .* set policy\.recompute to",
        ),
        ("optimizer's step", "the optimizer's step", rf"{SHARDS}, or policy\.world_size"),
        (
            "log-probs",
            r"the policy's log-probs in micro-batches of \d+ tokens",
            r"lower policy\.max_tokens_per_micro_batch \(or policy\.micro_batch_size\), or raise",
        ),
        (
            "reference",
            r"the reference's log-probs in micro-batches of \d+ tokens",
            r"lower policy\.max_tokens_.* set reference\.placement to own, or raise reference\.",
        ),
        ("buckets", "two buckets of 0 MiB to send weights in", r"lower weight_sync\.bucket_mb"),
    ],
)
def test_the_error_of_a_full_gpu_says_what_to_change(lab, policy_models, at, what, remedy):
    policy = lab.policy(policy_config(policy_models["qwen3-tied"]))
    message = rf"CUDA out of memory\.\nThe GPU is too small for {what}[^\n]*: [^\n]*{remedy}"
    with pytest.raises(ActorFailure, match=message):
        policy.call("run_out_of_memory", random_batch(), at)


class MortalRank(PolicyRank):
    """Its rank 1 dies in the backward pass, when rank 0 is long waiting for its gradient."""

    def update(self, batch, loss):
        if self.rank == 1:
            weight = next(self.engine.model.parameters())
            weight.register_hook(lambda _: (time.sleep(2), os._exit(1)))
        return super().update(batch, loss)


def test_a_rank_that_dies_is_named_long_before_the_timeout(ray_cluster, policy_models):
    config = policy_config(policy_models["qwen3-tied"], **LAYOUTS["DP 2"], timeout_s=3600.0)
    policy = PolicyActors(config, device="cpu", rank_class=MortalRank)
    get_all(policy.async_start(), phase="start", timeout_s=PATIENCE_S)
    with pytest.raises(ActorDeath, match="policy rank 1 died in policy update"):
        policy.update(random_batch())
    policy.close()
