"""Engines that compute in FP8: each sync quantises as a fresh engine does, and what that costs."""

import json

import pytest
import ray
import torch
from gpu_cases import DEVICE, engine_config, save_gpu_model, transformers_logprobs
from gpu_lab import ReloadingGpuActor
from greedy_rollouts import PROMPTS, check_syncs, greedy, reload
from tensor_policy import TensorPolicy

from rlsys.actors import rollout
from rlsys.actors.rollout import RolloutActors
from rlsys.actors.weight_publisher import WeightPublisher
from rlsys.algo.batching import build_train_batch
from rlsys.types import SampleRequest

pytestmark = pytest.mark.gpu(1)

KINDS = {"fp8": "qwen2-tied", "fp8_per_block": "qwen3-untied"}
"""A model with biases, and one with norms of queries and keys."""


class Fp8Actor(ReloadingGpuActor):
    async def weight_dtypes(self):
        """The types of the engine's parameters."""
        return await self._between_steps(lambda e: e._llm.collective_rpc(_weight_dtypes)[0])


def _weight_dtypes(worker):
    return {str(parameter.dtype) for parameter in worker.model_runner.model.parameters()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By quantization two models, whose sizes are multiples of a block of 128."""
    root = tmp_path_factory.mktemp("fp8")
    found = {name: [root / f"{name}-{seed}" for seed in (0, 1)] for name in KINDS}
    for name, pair in found.items():
        for seed, folder in enumerate(pair):
            save_gpu_model(folder, KINDS[name], seed=seed)
    return found


@pytest.fixture(scope="module")
def reloading(gpus, folders):
    """One engine, which starts again with other settings in `reload`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "RolloutActor", Fp8Actor)
        config = engine_config(folders["fp8"][0])
        reloading = RolloutActors(config, device=DEVICE, place=gpus.on(0))
    reloading.start()
    yield reloading
    reloading.close()


def fp8_config(folder, quantization):
    return engine_config(folder, quantization=quantization, max_completion_length=128)


def mismatch(reloading, folder):
    """How log-probs of sampled tokens differ from those of the model in bfloat16."""
    reloading.submit([SampleRequest(500 + i, p, 4, 1.0, i) for i, p in enumerate(PROMPTS)])
    groups = []
    while reloading.num_pending:
        assert ray.wait(reloading.pending_refs(), timeout=60)[0]
        groups += reloading.collect()
    batch = build_train_batch(groups)
    exact = transformers_logprobs(folder, batch, dtype=torch.bfloat16)
    log_ratio = (exact - batch.rollout_logprobs)[batch.completion_mask]
    return {
        "tokens": log_ratio.numel(),
        "logp_difference_mean": log_ratio.abs().mean().item(),
        "logp_difference_max": log_ratio.abs().max().item(),
        "kl_k3": (log_ratio.exp() - 1 - log_ratio).mean().item(),
    }


@pytest.mark.parametrize("quantization", KINDS)
def test_a_synced_engine_equals_a_fresh_one(reloading, folders, quantization):
    (actor,), folders = reloading.actors.values(), folders[quantization]
    reload(reloading, fp8_config(folders[1], quantization))
    fresh = greedy(reloading)
    reload(reloading, fp8_config(folders[0], quantization))
    assert "torch.float8_e4m3fn" in ray.get(actor.weight_dtypes.remote(), timeout=60)
    policy = TensorPolicy(folders[0])
    section = engine_config(folders[0]).weight_sync.model_copy(update={"transport": "gloo"})
    publisher = WeightPublisher(policy, reloading, section)
    publisher.publish()
    old = greedy(reloading)
    assert old[0] != fresh[0]
    wanted = [(folders[1], fresh), (folders[0], old)]
    check_syncs(policy, publisher, reloading, wanted, tolerance=1e-4)
    policy.close()

    found = {quantization: mismatch(reloading, folders[0])}
    reload(reloading, fp8_config(folders[0], None))
    found["bfloat16"] = mismatch(reloading, folders[0])
    print(json.dumps(found))
    means = {name: values["logp_difference_mean"] for name, values in found.items()}
    assert means["bfloat16"] < means[quantization] < 0.5
