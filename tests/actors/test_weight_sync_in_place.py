"""Weights copied straight into vLLM's parameters, as on GPUs, by a CPU engine without packing."""

import pytest
import ray
from greedy_rollouts import UnpackedActor, greedy, reload, start_reloading_engine
from policy_cases import LAYOUTS, policy_config
from tensor_policy import TensorPolicy

from rlsys.actors import rollout
from rlsys.actors.rollout import RolloutActors
from rlsys.actors.weight_publisher import WeightPublisher

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def engines(ray_cluster, rollout_config):
    engines = start_reloading_engine(rollout_config(), UnpackedActor)
    yield engines
    engines.close()


@pytest.fixture(scope="module")
def pair(ray_cluster, rollout_config, tiny_models):
    """An engine of two workers, and what it gives of the untied model 2 before any weight sync."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "RolloutActor", UnpackedActor)
        config = rollout_config(tiny_models[False, 2], tensor_parallel_size=2)
        pair = RolloutActors(config, device="cpu")
    yield pair, greedy(pair)
    pair.close()


@pytest.mark.parametrize(
    ("layout", "senders", "helpers"),
    [("one rank", [0, 0], set()), ("TP 2", [0, 1], set()), ("PP 2", [0, 0], {1})],
)
def test_each_worker_of_an_engine_is_sent_only_what_it_holds(
    lab, pair, rollout_config, tiny_models, layout, senders, helpers
):
    pair, fresh = pair
    policy = lab.policy(policy_config(tiny_models[False, 1], **LAYOUTS[layout]))
    publisher = WeightPublisher(policy, pair, rollout_config().weight_sync)
    publisher.publish()  # whole tensors, through vLLM's own loader
    loaded = greedy(pair)
    assert loaded[0] != fresh[0]

    by_rank = policy.call("sent_to_engines")
    sends = [[is_sender for is_sender, _, _ in links] for links in by_rank]
    assert sends == [[sender == rank for sender in senders] for rank in range(len(by_rank))]
    names = [names for _, names, _ in by_rank[0]]
    assert all(len(of_worker) == len(policy.weight_metadata()) for of_worker in names)
    assert [of_worker[1] for of_worker in names] == ["model.layers.0.input_layernorm.weight"] * 2
    assert "model.layers.0.mlp.down_proj.weight[0:64, 0:48]" in names[0]
    assert "model.layers.0.mlp.down_proj.weight[0:64, 48:96]" in names[1]
    assert [needed for _, _, needed in by_rank[0]] == [helpers] * 2

    for version, seed, expected in ((1, 2, fresh), (2, 1, loaded)):
        policy.call("load_folder", tiny_models[False, seed])
        policy.policy_version = version
        metrics = publisher.publish()
        tokens, logprobs, versions = greedy(pair)
        assert tokens == expected[0]
        assert logprobs == pytest.approx(expected[1], abs=1e-6)
        assert versions == {(version,)}
        sent = metrics["weight_sync/transport_gb_per_s"] * metrics["weight_sync/transport_seconds"]
        # A few tensors are whole in both shards.
        assert sent * 1e9 < 1.1 * metrics["weight_sync/bytes"] / len(set(senders))


@pytest.mark.parametrize("kind", [True, False, "experts"], ids=["tied", "untied", "experts"])
def test_an_engine_updated_in_place_equals_a_fresh_one(engines, rollout_config, tiny_models, kind):
    first, second = tiny_models[kind, 1], tiny_models[kind, 2]
    reload(engines, rollout_config(second))
    expected_tokens, expected_logprobs, _ = greedy(engines)
    reload(engines, rollout_config(first))
    actor = engines.actors["rollout engine 0"]
    policy = TensorPolicy(first)
    publisher = WeightPublisher(policy, engines, rollout_config().weight_sync)
    assert ray.get(actor.loads_in_place.remote()) == [False]
    publisher.publish()  # through vLLM's own loader, and proves the plan
    # CPU kernels of experts read packed weights, so these go through the loader.
    assert ray.get(actor.loads_in_place.remote()) == [kind != "experts"]
    greedy(engines)  # and now the prefix cache is warm
    policy.set_weights(second)
    publisher.publish()
    tokens, logprobs, versions = greedy(engines)
    assert tokens == expected_tokens
    assert logprobs == pytest.approx(expected_logprobs, abs=1e-6)
    assert versions == {(policy.policy_version,)}
    policy.close()
