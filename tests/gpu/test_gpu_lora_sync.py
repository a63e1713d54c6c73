"""A policy's LoRA adapter in engines on GPUs, alone and merged; the base stays as it is."""

import pytest
import ray
from adapter_samples import BOUND, mean_difference, sample
from gpu_cases import DEVICE, engine_config, gpu_config
from gpu_lab import OpenActor

from rlsys.actors import rollout
from rlsys.actors.rollout import RolloutActors
from rlsys.actors.weight_publisher import WeightPublisher
from rlsys.config import LoraConfig

pytestmark = pytest.mark.gpu(2)

LORA = LoraConfig(rank=8, alpha=16.0)
SCALING = 2.0


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
