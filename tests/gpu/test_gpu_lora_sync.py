"""A policy's LoRA adapter in engines on GPUs, alone and merged; the base stays as it is."""

import pytest
import ray
from gpu_cases import DEVICE, engine_config, gpu_config
from gpu_lab import OpenActor
from greedy_rollouts import PROMPTS
from patience import PATIENCE_S

from rlsys.actors import rollout
from rlsys.actors.rollout import RolloutActors
from rlsys.actors.weight_publisher import WeightPublisher
from rlsys.algo.batching import build_train_batch
from rlsys.config import LoraConfig
from rlsys.types import SampleRequest

pytestmark = pytest.mark.gpu(2)

LORA = LoraConfig(rank=8, alpha=16.0)
SCALING = 2.0
BOUND = 2e-2 if DEVICE == "cuda" else 1e-5
"""Mean difference of log-probs that bfloat16 explains, and float32 on CPU."""


def with_lora(config, lora):
    return config.model_copy(
        update={
            "policy": config.policy.model_copy(update={"lora": LORA}),
            "weight_sync": config.weight_sync.model_copy(update={"lora": lora}),
        }
    )


@pytest.fixture(params=["adapter", "merged"])
def engine(request, gpus, gpu_models):
    """An engine, and how it gets adapters."""
    config = with_lora(engine_config(gpu_models["qwen3-tied", 0]), request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "RolloutActor", OpenActor)
        engine = RolloutActors(config, device=DEVICE, place=gpus.on(1))
    engine.start()
    yield engine, request.param
    engine.close()


def sample(engine):
    """Completions at temperature 1, as a batch."""
    engine.submit([SampleRequest(i, prompt, 4, 1.0, i) for i, prompt in enumerate(PROMPTS)])
    groups = []
    while engine.num_pending:
        ray.wait(engine.pending_refs(), timeout=PATIENCE_S)
        groups += engine.collect()
    return build_train_batch(groups)


def mean_difference(logprobs, batch):
    gaps = (logprobs - batch.rollout_logprobs).abs() * batch.completion_mask
    return float(gaps.sum() / batch.completion_mask.sum())


def held_by(engine):
    (actor,) = engine.actors.values()
    return ray.get(actor.parameter_checksums.remote(), timeout=60)


def test_an_engine_samples_with_the_policys_adapter(engine, lab, gpu_models):
    engine, lora = engine
    config = gpu_config(gpu_models["qwen3-tied", 0], longest=16 + 512)
    policy = lab.policy(with_lora(config, lora))
    section = config.weight_sync.model_copy(update={"bucket_mb": 1, "timeout_s": 60.0})
    scaling = SCALING if lora == "adapter" else None
    publisher = WeightPublisher(policy, engine, section, adapter_scaling=scaling)
    publisher.publish()
    base, sent = held_by(engine), set()
    batch = sample(engine)
    assert mean_difference(policy.compute_base_logprobs(batch)[0], batch) < BOUND
    for version in (1, 2):
        policy.call("randomize_adapters", version)
        policy.policy_version = version
        sent.add(publisher.publish()["weight_sync/bytes"])
        batch = sample(engine)
        assert mean_difference(policy.compute_logprobs(batch)[0], batch) < BOUND
        assert mean_difference(policy.compute_base_logprobs(batch)[0], batch) > 10 * BOUND
    assert (held_by(engine) == base) == (lora == "adapter")
    metadata = policy.adapter_metadata() if lora == "adapter" else policy.weight_metadata()
    assert sent == {sum(meta.nbytes for meta in metadata)}
