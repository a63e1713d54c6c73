"""After an update, engines sample as if they had been started from the policy's saved model."""

from itertools import islice

import pytest
from greedy_rollouts import greedy, reload, start_reloading_engine
from policy_cases import LAYOUTS, policy_config, random_batch

from rlsys.actors.weight_publisher import WeightPublisher

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def engine(ray_cluster, rollout_config):
    engine = start_reloading_engine(rollout_config())
    yield engine
    engine.close()


@pytest.fixture(scope="module", params=[True, False, "experts"], ids=["tied", "untied", "experts"])
def start(request, engine, rollout_config, tiny_models):
    """A model folder, and what an engine that started from it gives."""
    folder = tiny_models[request.param, 1]
    reload(engine, rollout_config(folder))
    return folder, greedy(engine)


def of_each(tokens, logprobs):
    """Log-probs of each completion."""
    values = iter(logprobs)
    return [list(islice(values, len(ids))) for ids in tokens]


@pytest.mark.parametrize("layout", ["one rank", "TP 2", "PP 2"])
def test_an_updated_engine_equals_one_started_from_the_saved_model(
    lab, engine, rollout_config, start, tmp_path, layout
):
    folder, at_start = start
    options = LAYOUTS[layout]
    if folder.name.startswith("experts"):
        options = options | {"expert_model_parallel_size": options.get("tensor_parallel_size", 1)}
    policy = lab.policy(policy_config(folder, lr=1e-2, **options))
    publisher = WeightPublisher(policy, engine, rollout_config().weight_sync)
    publisher.publish()  # what the engine holds is the update of the test before
    assert greedy(engine) == at_start
    policy.update(random_batch())
    publisher.publish()
    tokens, logprobs, versions = greedy(engine)
    assert versions == {(1,)}
    policy.save_model(tmp_path / "saved")
    reload(engine, rollout_config(tmp_path / "saved"))
    fresh_tokens, fresh_logprobs, _ = greedy(engine)
    assert tokens == fresh_tokens
    assert logprobs == pytest.approx(fresh_logprobs, abs=1e-6)
    for new, old in zip(of_each(tokens, logprobs), of_each(*at_start[:2]), strict=True):
        assert new != old
