"""Engines sample with the weights of the policy, and a failed weight sync is an error."""

import pytest
import ray
from greedy_rollouts import PROMPTS, greedy
from patience import PATIENCE_S
from tensor_policy import TensorPolicy

from rlsys.actors.rollout import RolloutActors
from rlsys.actors.waiting import ActorFailure, get_all
from rlsys.actors.weight_publisher import WeightPublisher
from rlsys.types import SampleRequest

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def policy(ray_cluster, tiny_models):
    policy = TensorPolicy(tiny_models[True, 1])
    yield policy
    policy.close()


@pytest.fixture(scope="module")
def connect(rollout_config):
    """Connect a policy to engines, whose earlier connections end."""

    def connect(policy, engines, **settings):
        config = rollout_config().weight_sync.model_copy(update=settings)
        return WeightPublisher(policy, engines, config)

    return connect


@pytest.fixture(scope="module")
def untied_engines(ray_cluster, rollout_config, tiny_models):
    actors = RolloutActors(rollout_config(tiny_models[False, 1]), device="cpu")
    actors.start()
    yield actors
    actors.close()


def fresh_greedy(rollout_config, folder):
    """The greedy completions of an engine that starts from `folder`."""
    fresh = RolloutActors(rollout_config(folder), device="cpu")
    result = greedy(fresh)
    fresh.close()
    return result


def assert_update_equals_fresh_start(engines, policy, publisher, folder, rollout_config):
    before, _, _ = greedy(engines)  # and now the prefix cache is warm
    policy.set_weights(folder)
    metrics = publisher.publish()
    tokens, logprobs, versions = greedy(engines)
    fresh_tokens, fresh_logprobs, _ = fresh_greedy(rollout_config, folder)
    assert tokens == fresh_tokens
    assert logprobs == pytest.approx(fresh_logprobs, abs=1e-6)
    assert all(new != old for new, old in zip(tokens, before, strict=True))
    assert versions == {(policy.policy_version,)}
    assert metrics["weight_sync/mb_per_s"] > 0


def test_an_updated_engine_equals_a_fresh_one_tied(
    policy, engines, connect, rollout_config, tiny_models
):
    publisher = connect(policy, engines)
    folder = tiny_models[True, 2]
    assert_update_equals_fresh_start(engines, policy, publisher, folder, rollout_config)


def test_an_updated_engine_equals_a_fresh_one_untied(
    untied_engines, connect, rollout_config, tiny_models
):
    policy = TensorPolicy(tiny_models[False, 1])
    publisher = connect(policy, untied_engines)
    folder = tiny_models[False, 2]
    assert_update_equals_fresh_start(untied_engines, policy, publisher, folder, rollout_config)
    policy.close()


@pytest.mark.slow  # starts two engines; test_weight_sync_in_place.py has one of two workers, too
def test_an_engine_of_two_workers_gets_its_shards(
    policy, engines, connect, rollout_config, tiny_models
):
    policy.set_weights(tiny_models[True, 2])
    connect(policy, engines).publish()
    tokens, logprobs, _ = greedy(engines)
    other = tiny_models[True, 1]
    sharded = RolloutActors(rollout_config(other, tensor_parallel_size=2), device="cpu")
    connect(policy, sharded).publish()
    sharded_tokens, sharded_logprobs, _ = greedy(sharded)
    sharded.close()
    assert sharded_tokens == tokens
    assert sharded_logprobs == pytest.approx(logprobs, abs=2e-5)  # sums in another order


def test_sending_the_same_weights_changes_nothing(policy, engines, connect):
    publisher = connect(policy, engines)
    publisher.publish()
    tokens, logprobs, _ = greedy(engines)
    for _ in range(2):
        policy.policy_version += 1
        publisher.publish()
        again, logprobs_again, versions = greedy(engines)
        assert again == tokens
        assert logprobs_again == logprobs
        assert versions == {(policy.policy_version,)}


def test_an_update_that_overtakes_its_pause_waits_for_it(policy, engines, connect):
    """Ray keeps no order among the calls of an async actor, so now and then one does."""
    publisher = connect(policy, engines)
    policy.policy_version += 1
    version = policy.policy_version
    overtaking = engines.async_call("update_weights", version)
    ready, _ = ray.wait(list(overtaking.values()), timeout=1.0)
    assert not ready
    sending = policy.async_call("send_weights", version, to="rollout")
    get_all(
        engines.async_call("start_weight_update") | sending,
        phase="the others",
        timeout_s=PATIENCE_S,
    )
    assert get_all(overtaking, phase="update", timeout_s=PATIENCE_S) == [version, version]
    publisher.publish()  # and so does one of the usual kind


@pytest.fixture
def healthy_after(policy, engines, connect):
    """Around a failed update: a further update restores the engines."""
    connect(policy, engines).publish()
    before = greedy(engines)
    yield
    connect(policy, engines).publish()
    assert greedy(engines) == before


def test_a_damaged_bucket_is_named(healthy_after, engines, connect, tiny_models):
    damaging = TensorPolicy(tiny_models[True, 1], transport="damaging gloo")
    publisher = connect(damaging, engines)
    message = (
        r"rank ([12]) of 3 received other bytes.*bucket 0 of 1.*model\.embed_tokens\.weight"
        r"[^\n]*\n.*rollout engine [01] failed in weight sync"
    )
    with pytest.raises(ActorFailure, match=message):
        publisher.publish()
    damaging.close()


def test_a_missing_tensor_is_named(healthy_after, engines, connect, tiny_models):
    lacking = TensorPolicy(tiny_models[True, 1])
    lacking.drop("model.layers.1.mlp.down_proj.weight")
    publisher = connect(lacking, engines)
    with pytest.raises(ActorFailure, match=r"1 parameters .*layers\.1\.mlp\.down_proj\.weight"):
        publisher.publish()
    lacking.close()


def test_a_policy_that_never_sends_is_a_named_timeout(healthy_after, engines, connect, tiny_models):
    silent = TensorPolicy(tiny_models[True, 1])
    silent.sends = False
    publisher = connect(silent, engines, timeout_s=8.0)
    # Either engine may be the first to give up.
    message = (
        r"rank [12] of 3, waiting for the sender[^\n]*\n.*rollout engine [01] failed in weight"
    )
    with pytest.raises(ActorFailure, match=message):
        publisher.publish()
    silent.close()


def collect_all(engines):
    """Every submitted group, in the order in which they come."""
    groups = []
    while engines.num_pending:
        ray.wait(engines.pending_refs(), timeout=PATIENCE_S)
        groups += engines.collect()
    return groups


def test_an_engine_that_dies_while_sampling_is_named(untied_engines):
    untied_engines.submit([SampleRequest(i, p, 4, 1.0, i) for i, p in enumerate(PROMPTS)])
    ray.kill(untied_engines.actors["rollout engine 0"])
    with pytest.raises(ActorFailure, match="rollout engine 0 died in rollout"):
        collect_all(untied_engines)
