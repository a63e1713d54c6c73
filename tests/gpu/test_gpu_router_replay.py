"""Router replay on GPUs: the experts that vLLM's kernels chose, in the policy's kernels."""

import pytest
import ray
import torch
from gpu_cases import DEVICE, engine_config, gpu_config
from policy_cases import random_batch
from routing_oracle import random_routing
from tiny_models import save_tiny_qwen3_moe

from rlsys.actors.rollout import RolloutActors
from rlsys.actors.waiting import get_all
from rlsys.algo.batching import build_train_batch
from rlsys.types import Prompt, SampleRequest

# Longer than a KV block, so that the prefix cache holds their beginning.
PROMPTS = [
    Prompt(str(i), [], [2 + (i * 37 + j * (i + 3)) % 250 for j in range(140)]) for i in range(4)
]
G = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu-replay") / "model"
    sizes = {"hidden_size": 256, "head_dim": 64, "num_hidden_layers": 4, "num_experts": 16}
    sizes |= {"num_experts_per_tok": 4, "moe_intermediate_size": 128}
    save_tiny_qwen3_moe(folder, seed=0, max_position_embeddings=4096, **sizes)
    return folder


@pytest.fixture(scope="module")
def batch(gpus, folder):
    """Completions of an engine, the second half of which came from cached prompts."""
    config = engine_config(folder, router_replay=True, max_completion_length=200)
    actors = RolloutActors(config, device=DEVICE, place=gpus.on(0))
    get_all(actors.async_start(), phase="start", timeout_s=300)
    groups = []
    for first in (0, 10):
        requests = [SampleRequest(first + i, p, G, 1.0, first + i) for i, p in enumerate(PROMPTS)]
        actors.submit(requests)
        while actors.num_pending:
            ray.wait(actors.pending_refs(), timeout=60)
            groups += actors.collect()
    actors.close()
    return build_train_batch(groups)


def config_of(folder, batch, *, replays, dtype="auto", **policy):
    options = {"max_tokens_per_micro_batch": 4096} | policy
    config = gpu_config(folder, num_completions=len(batch.lengths), dtype=dtype, **options)
    rollout = config.rollout.model_copy(update={"router_replay": replays})
    return config.model_copy(update={"rollout": rollout})


@pytest.mark.gpu(1)
def test_replay_closes_the_gap_that_rounding_opens(lab, folder, batch):
    mask, differences = batch.completion_mask, {}
    for replays in (False, True):
        policy = lab.policy(config_of(folder, batch, replays=replays, dtype="bfloat16"))
        found = (policy.compute_logprobs(batch)[0] - batch.rollout_logprobs)[mask].abs()
        differences[replays] = found.mean().item()
    metrics = policy.update(batch).metrics
    assert 0 < metrics["router_replay/changed_experts"] < 0.2
    assert metrics["router_replay/changed_tokens"] < 0.5
    assert differences[True] < 0.9 * differences[False]


@pytest.mark.gpu(2)
@pytest.mark.parametrize(
    "layout",
    [
        {"world_size": 2, "expert_model_parallel_size": 2, "tensor_parallel_size": 2},
        {"world_size": 2, "pipeline_parallel_size": 2, "recompute": "full"},
    ],
    ids=str,
)
def test_replayed_experts_are_the_same_wherever_they_are(lab, tmp_path, layout):
    save_tiny_qwen3_moe(tmp_path / "model", seed=0, hidden_size=256, head_dim=64)
    batch = random_batch()
    batch.routed_experts = random_routing(batch.lengths)
    found = []
    for options in ({}, layout):
        config = config_of(tmp_path / "model", batch, replays=True, dtype="float32", **options)
        policy = lab.policy(config)
        logprobs = policy.compute_logprobs(batch)[0]
        found.append((logprobs, policy.update(batch).metrics))
    (expected, metrics), (logprobs, own_metrics) = found
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-3)
    assert own_metrics == pytest.approx(metrics, rel=1e-2, abs=1e-4)
