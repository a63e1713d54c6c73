"""An engine that sleeps gives its GPU's memory back, and wakes up as if it had never slept."""

import json
import time

import pytest
import ray
from adapter_samples import BOUND, mean_difference, sample
from gpu_cases import DEVICE, engine_config, gpu_config
from gpu_lab import OpenActor, load_weights
from greedy_rollouts import greedy

from rlsys.actors import rollout
from rlsys.actors.rollout import RolloutActors
from rlsys.actors.waiting import ActorFailure
from rlsys.actors.weight_publisher import WeightPublisher
from rlsys.config import LoraConfig

pytestmark = pytest.mark.gpu(1)

CACHE_MB = 8192 if DEVICE == "cuda" else 64
LORA = LoraConfig(rank=8, alpha=16.0)


@pytest.fixture(scope="module", params=["weights", "adapter"])
def sleeper(request, gpus, gpu_models):
    """An engine of seed 1 on the policy's GPU, and what it brings into and out of its config."""
    config = engine_config(
        gpu_models["qwen3-tied", 1], kv_cache_memory_mb=CACHE_MB, max_num_seqs=64
    ).model_copy(update={"placement": "colocated"})

    def with_lora(config):
        if request.param == "weights":
            return config
        policy = config.policy.model_copy(update={"lora": LORA})
        section = config.weight_sync.model_copy(update={"lora": "adapter"})
        return config.model_copy(update={"policy": policy, "weight_sync": section})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "RolloutActor", OpenActor)
        actors = RolloutActors(with_lora(config), device=DEVICE, place=gpus.on(0))
    actors.start()
    yield actors, with_lora, request.param
    actors.close()


def free_bytes(actors):
    (actor,) = actors.actors.values()
    return ray.get(actor.free_bytes.remote(), timeout=60)


def timed(actors, method):
    start = time.perf_counter()
    actors.call(method)
    return time.perf_counter() - start


def sleep_over(actors):
    """Put the engine to sleep; meanwhile others write NaN into the memory that it had.

    Returns:
        Seconds to fall asleep, and the bytes that became free.
    """
    before = free_bytes(actors)
    seconds = timed(actors, "sleep")
    freed = free_bytes(actors) - before
    if DEVICE == "cuda":
        (actor,) = actors.actors.values()
        ray.get(actor.scribble.remote(int(0.9 * (before + freed))), timeout=60)
    return seconds, freed


def assert_samples_with_the_adapter(policy, actors):
    batch = sample(actors)
    assert mean_difference(policy.compute_logprobs(batch)[0], batch) < BOUND
    assert mean_difference(policy.compute_base_logprobs(batch)[0], batch) > 10 * BOUND


def test_a_sleeping_engine_frees_its_memory_and_wakes_up_the_same(sleeper, lab, gpu_models):
    actors, with_lora, content = sleeper
    (actor,) = actors.actors.values()
    config = with_lora(gpu_config(gpu_models["qwen3-tied", 1], longest=16 + 512))
    policy = lab.policy(config)
    section = config.weight_sync.model_copy(update={"bucket_mb": 1, "timeout_s": 60.0})
    results = {1: greedy(actors)} if content == "weights" else {}
    seconds = {"sleep": [], "sync": [], "wake": []}
    publisher = None
    for version in range(1, 6):  # the first goes through vLLM's loader, the others in place
        asleep, freed = sleep_over(actors)
        if DEVICE == "cuda":
            assert freed > 0.95 * CACHE_MB * 2**20
        if publisher is None:  # as in a run, where engines start first
            scaling = 2.0 if content == "adapter" else None
            publisher = WeightPublisher(
                policy, actors, section, transport="ipc", adapter_scaling=scaling
            )
        seed = version % 2
        if content == "weights":
            with pytest.raises(ActorFailure, match="has no weights"):
                actors.call("wake")
            policy.call("run", load_weights, gpu_models["qwen3-tied", seed])
        else:
            policy.call("randomize_adapters", seed)
        policy.policy_version = version
        synced = publisher.publish()["weight_sync/seconds"]
        woke = timed(actors, "wake")
        tokens, logprobs, versions = greedy(actors)
        assert versions == {(version,)}
        expected_tokens, expected_logprobs, _ = results.setdefault(seed, (tokens, logprobs, None))
        if content == "weights":
            assert tokens == expected_tokens
            assert logprobs == pytest.approx(expected_logprobs, abs=1e-4)
        else:
            assert_samples_with_the_adapter(policy, actors)
        for name, value in (("sleep", asleep), ("sync", synced), ("wake", woke)):
            seconds[name].append(round(value, 4))
    assert results[0][0] != results[1][0]
    if content == "adapter":  # base and adapter wait in host memory
        sleep_over(actors)
        actors.call("wake")
        assert_samples_with_the_adapter(policy, actors)
    else:
        assert ray.get(actor.ask_workers.remote("loads_in_place"), timeout=60) == [True]
    print(json.dumps({f"sleeping_{content}_seconds": seconds, "freed_gib": freed / 2**30}))


@pytest.mark.skipif(DEVICE != "cuda", reason="there is no GPU memory that could be full")
def test_waking_up_where_others_have_the_memory_says_what_to_change(sleeper):
    """The last test of the module: the engine cannot be used after it."""
    actors, _, content = sleeper
    if content == "weights":
        pytest.skip("it would have to get weights first, which need little memory")
    actors.call("sleep")
    (actor,) = actors.actors.values()
    ray.get(actor.hold.remote(free_bytes(actors) - 2**30), timeout=60)
    message = r"small for the KV cache of rollout engine 0, which wakes up .*kv_cache_memory_mb"
    with pytest.raises(ActorFailure, match=message):
        actors.call("wake")
    ray.get(actor.hold.remote(0), timeout=60)
