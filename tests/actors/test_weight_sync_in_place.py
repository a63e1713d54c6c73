"""Weights copied straight into vLLM's parameters: the way of GPUs, on a CPU engine that does not
pack its linear layers."""

import pytest
import ray
from greedy_rollouts import ReloadingActor, greedy, reload
from tensor_policy import TensorPolicy

from rlsys.actors import rollout
from rlsys.actors.rollout import RolloutActors
from rlsys.weight_sync.publisher import WeightPublisher

pytestmark = pytest.mark.system


class UnpackedActor(ReloadingActor):
    """vLLM then multiplies with the parameters themselves, as on GPUs."""

    def __init__(self, *args):
        from vllm import _custom_ops

        _custom_ops._supports_onednn = False
        super().__init__(*args)

    async def loads_in_place(self):
        return await self._call("ask_workers", "loads_in_place")


@pytest.fixture(scope="module")
def engines(ray_cluster, rollout_config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "RolloutActor", UnpackedActor)
        engines = RolloutActors(rollout_config(), device="cpu")
    engines.wait_ready()
    yield engines
    engines.close()


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
    # A CPU kernel of experts reads packed weights, unlike those of GPUs: through the loader then.
    assert ray.get(actor.loads_in_place.remote()) == [kind != "experts"]
    greedy(engines)  # and now the prefix cache is warm
    policy.set_weights(second)
    publisher.publish()
    tokens, logprobs, versions = greedy(engines)
    assert tokens == expected_tokens
    assert logprobs == pytest.approx(expected_logprobs, abs=1e-6)
    assert versions == {(policy.policy_version,)}
    policy.close()
