"""The experts that vLLM chose come back with completions, and close the gap to the trainer."""

import numpy as np
import pytest
import ray
import torch
from family_models import save_family_model
from policy_cases import policy_config
from tensor_policy import TensorPolicy
from test_in_flight import BEFORE_THE_CHANGE, PeekingActor, collect_all, wait_for_tokens
from test_router_replay import replaying_config
from tiny_models import save_endless_qwen3_moe, save_tiny_qwen3_moe
from transformers import AutoModelForCausalLM

from rlsys.actors import rollout
from rlsys.actors.rollout import RolloutActors
from rlsys.actors.weight_publisher import WeightPublisher
from rlsys.algo.batching import build_train_batch
from rlsys.types import Prompt, SampleRequest

pytestmark = pytest.mark.system

# The longer ones are longer than a KV block (128 tokens), so that the prefix cache holds them.
PROMPTS = [
    Prompt(str(i), [], [2 + (i * 37 + j * (i + 3)) % 250 for j in range(length)])
    for i, length in enumerate((140, 5, 140, 150))
]
G, TEMPERATURE = 4, 0.8


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models that never end a completion, and one that does."""
    root = tmp_path_factory.mktemp("routed")
    for seed in (1, 2):
        save_endless_qwen3_moe(root / str(seed), seed=seed)
    save_tiny_qwen3_moe(root / "ending", seed=5)
    return [root / "1", root / "2", root / "ending"]


@pytest.fixture(scope="module")
def engines(ray_cluster, rollout_config, models):
    config = rollout_config(models[0], router_replay=True, max_completion_length=48)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "RolloutActor", PeekingActor)
        actors = RolloutActors(config, device="cpu")
    actors.start()
    yield actors
    actors.close()


@pytest.fixture(scope="module")
def sender(models):
    policy = TensorPolicy(models[0])
    yield policy
    policy.close()


@pytest.fixture(scope="module")
def publish(sender, engines, rollout_config):
    publisher = WeightPublisher(sender, engines, rollout_config().weight_sync)

    def publish(folder):
        sender.set_weights(folder)
        publisher.publish()

    return publish


def submit(engines, first_id=0):
    engines.submit(
        [
            SampleRequest(first_id + i, prompt, G, TEMPERATURE, first_id + i)
            for i, prompt in enumerate(PROMPTS)
        ]
    )


@pytest.fixture(scope="module")
def groups(engines, publish, models):
    """Completions of the model that ends them, twice: the second time all prompts are cached."""
    publish(models[2])
    submit(engines)
    first = collect_all(engines)
    submit(engines, first_id=10)
    return [*first.values(), *collect_all(engines).values()]


@torch.no_grad()
def own_routing(folder, group, completion):
    """[tokens, layers, K] of transformers in fp32, sorted, and of every token but the last."""
    model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    ids = torch.tensor([group.prompt.token_ids + completion.token_ids])
    logits = model(ids, output_router_logits=True).router_logits
    chosen = torch.stack([layer.topk(2).indices for layer in logits], 1)[:-1]
    return np.sort(chosen.numpy(), -1)


def agreement(completion, expected):
    """[tokens] whether vLLM chose the same experts in all layers."""
    assert completion.routed_experts.shape == expected.shape
    assert completion.routed_experts.dtype == np.uint8
    return (np.sort(completion.routed_experts, -1) == expected).all((1, 2))


def test_every_token_has_the_experts_that_it_went_to(groups, models):
    reasons = {completion.finish_reason for group in groups for completion in group.completions}
    assert reasons == {"stop", "length"}
    for group in groups:
        for completion in group.completions[:2]:
            assert agreement(completion, own_routing(models[2], group, completion)).all()


def test_the_mismatch_of_logprobs_falls(lab, groups, models):
    """The policy is in bfloat16, so that its own routers would send some tokens elsewhere."""
    batch = build_train_batch(groups)
    mask = batch.completion_mask
    differences = {}
    for replays, config in ((False, policy_config), (True, replaying_config)):
        options = {"dtype": "bfloat16", "max_tokens_per_micro_batch": 1024}
        policy = lab.policy(config(models[2], **options))
        difference = (policy.compute_logprobs(batch)[0] - batch.rollout_logprobs)[mask].abs()
        differences[replays] = difference.mean().item(), difference.max().item()
    metrics = policy.update(batch).metrics
    assert 0 < metrics["router_replay/changed_experts"] < 0.1
    assert metrics["router_replay/changed_experts"] < metrics["router_replay/changed_tokens"]
    assert differences[True][0] < 0.8 * differences[False][0]
    assert differences[True][1] < differences[False][1]


@pytest.mark.parametrize("in_flight_kv", ["recompute", "keep"])
def test_a_token_keeps_the_experts_of_the_pass_that_sampled_the_next(
    engines, publish, models, in_flight_kv
):
    (actor,) = engines.actors.values()
    ray.get(actor.set_in_flight_kv.remote(in_flight_kv))
    publish(models[0])
    submit(engines)
    wait_for_tokens(engines, BEFORE_THE_CHANGE)
    publish(models[1])
    groups = collect_all(engines)
    assert len(groups) == len(PROMPTS)
    for group in groups.values():
        completion = group.completions[1]
        _, start = completion.version_starts
        change = len(group.prompt.token_ids) + start - 1  # the first token that new weights read
        of_old, of_new = (
            agreement(completion, own_routing(folder, group, completion)) for folder in models[:2]
        )
        assert of_old[:change].all()
        assert not of_old[change:].all()
        if in_flight_kv == "recompute":
            assert of_new[change:].all()
            assert not of_new[:change].all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["glm4_moe", "qwen2_moe"])
@pytest.mark.parametrize("layout", [{}, {"world_size": 2, "pipeline_parallel_size": 2}], ids=str)
def test_engine_and_policy_number_layers_and_experts_alike(
    lab, ray_cluster, rollout_config, tmp_path, name, layout
):
    """Some of their layers have no experts; in fp32 the policy would choose the same."""
    folder = tmp_path / name
    save_family_model(folder, name)
    config = rollout_config(folder, router_replay=True, max_completion_length=24)
    actors = RolloutActors(config, device="cpu")
    actors.start()
    submit(actors)
    batch = build_train_batch([*collect_all(actors).values()])
    actors.close()
    policy = lab.policy(replaying_config(folder, max_tokens_per_micro_batch=1024, **layout))
    metrics = policy.update(batch).metrics
    assert metrics["router_replay/changed_experts"] < 1e-3
