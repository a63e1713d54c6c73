"""Weights change during a completion: the version of each token, and the cache it reads.

Engines may sleep meanwhile, as where they share a GPU with the policy. Weights come through shared
memory, as there.
"""

import pytest
import ray
import torch
from lora_cases import peft_model, save_peft_adapter, with_lora
from patience import PATIENCE_S
from safetensors.torch import load_file
from tensor_policy import TensorPolicy
from tiny_models import save_endless_qwen3
from transformers import AutoModelForCausalLM

from rlsys.actors import rollout
from rlsys.actors.rollout import RolloutActor, RolloutActors
from rlsys.actors.waiting import ActorFailure
from rlsys.actors.weight_publisher import WeightPublisher
from rlsys.types import Prompt, SampleRequest

pytestmark = pytest.mark.system

# Longer than a KV block (128 tokens), so that the prefix cache holds the beginning.
PROMPTS = [
    Prompt(str(i), [], [2 + (i * 37 + j * (i + 3)) % 250 for j in range(140)]) for i in (1, 2)
]
G, TEMPERATURE = 3, 0.7
BEFORE_THE_CHANGE = 8
LONG = 352
"""Tokens, all that the model has positions for: a busy machine must not be too late for them."""


class PeekingActor(RolloutActor):
    """Its tests know how far it is, and try both ways of `in_flight_kv` on one engine."""

    async def set_in_flight_kv(self, value):
        def change(engine):
            rollout = engine._config.rollout.model_copy(update={"in_flight_kv": value})
            engine._config = engine._config.model_copy(update={"rollout": rollout})

        await self._call(change)

    async def is_asleep(self):
        return await self._call(lambda engine: engine.is_asleep)

    async def break_abort(self):
        def change(engine):
            def abort(tickets):
                raise RuntimeError("nothing can be given up")

            engine.abort = abort

        await self._call(change)

    async def least_tokens(self):
        """The fewest tokens of a completion in flight."""

        def count(engine):
            states = engine._llm.llm_engine.output_processor.request_states.values()
            return min((state.detokenizer.num_output_tokens() for state in states), default=0)

        return await self._call(count)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folders = [tmp_path_factory.mktemp("endless") / str(seed) for seed in (1, 2)]
    for seed, folder in enumerate(folders):
        save_endless_qwen3(folder, seed=seed)
    return folders


@pytest.fixture(scope="module")
def engines(ray_cluster, rollout_config, models):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "RolloutActor", PeekingActor)
        actors = RolloutActors(rollout_config(models[0]), device="cpu")
    actors.start()
    yield actors
    actors.close()


@pytest.fixture(scope="module")
def policy(models):
    policy = TensorPolicy(models[0], transport="ipc")
    yield policy
    policy.close()


@pytest.fixture(scope="module")
def publisher(policy, engines, rollout_config):
    return WeightPublisher(policy, engines, rollout_config().weight_sync, transport="ipc")


def submit(engines, *, first_id):
    requests = [
        SampleRequest(first_id + i, prompt, G, TEMPERATURE, first_id + i)
        for i, prompt in enumerate(PROMPTS)
    ]
    engines.submit(requests)


def wait_for_tokens(engines, number):
    actors = engines.actors.values()
    while min(ray.get([actor.least_tokens.remote() for actor in actors])) < number:
        pass


def collect_all(engines):
    groups = {}
    while engines.num_pending:
        assert ray.wait(engines.pending_refs(), timeout=PATIENCE_S)[0]
        groups |= {group.ticket: group for group in engines.collect()}
    return groups


@torch.no_grad()
def differences(model, group):
    """[G, T] between an engine's log-probs and those of transformers with the weights of now."""
    prompt = group.prompt.token_ids
    ids = torch.tensor([prompt + completion.token_ids for completion in group.completions])
    logprobs = torch.log_softmax(model(input_ids=ids).logits[:, :-1] / TEMPERATURE, dim=-1)
    expected = logprobs.gather(2, ids[:, 1:, None])[:, len(prompt) - 1 :, 0]
    return (expected - torch.tensor([c.rollout_logprobs for c in group.completions])).abs()


@pytest.fixture(scope="module")
def references(models):
    """The models by transformers."""
    return [AutoModelForCausalLM.from_pretrained(m, dtype=torch.float32) for m in models]


def check_spans(groups, references, old, limit, *, recomputed):
    """Completions of tickets 10 and 11 began with the weights before, 20 and 21 did not."""
    before, after = references
    for ticket in (10, 11):
        of_before = differences(before, groups[ticket])
        of_after = differences(after, groups[ticket])
        for index, completion in enumerate(groups[ticket].completions):
            assert completion.policy_versions == (old, old + 1)
            zero, start = completion.version_starts
            assert zero == 0
            assert BEFORE_THE_CHANGE <= start < limit == len(completion.token_ids)
            assert of_before[index, :start].max() < 1e-4
            assert of_before[index, start:].max() > 1e-2
            if recomputed:
                assert of_after[index, start:].max() < 1e-4
            else:  # new weights that look back at what the old ones left
                assert of_after[index, start:].max() > 1e-2
    for ticket in (20, 21):
        assert differences(after, groups[ticket]).max() < 1e-4
        for completion in groups[ticket].completions:
            assert (completion.policy_versions, completion.version_starts) == ((old + 1,), (0,))


@pytest.mark.slow
def test_adapters_change_while_several_engines_sample(
    ray_cluster, models, rollout_config, monkeypatch, tmp_path
):
    folder = models[0]
    plain = rollout_config(folder, num_engines=2, max_completion_length=LONG)
    config = with_lora(plain, {"rank": 4, "alpha": 6.0}, sync="adapter")
    adapters = []
    for seed in (1, 2, 3):
        targets = ["q_proj", "v_proj", "gate_proj", "up_proj"]  # the others could end completions
        settings = {"r": 4, "lora_alpha": 6, "target_modules": targets}
        save_peft_adapter(folder, tmp_path / str(seed), seed=seed, **settings)
        adapters.append(load_file(tmp_path / str(seed) / "adapter_model.safetensors"))
    monkeypatch.setattr(rollout, "RolloutActor", PeekingActor)
    engines = RolloutActors(config, device="cpu")
    engines.start()
    policy = TensorPolicy(folder)
    policy.set_adapter(adapters[0])
    publisher = WeightPublisher(policy, engines, config.weight_sync, adapter_scaling=1.5)
    publisher.publish()
    groups = {}
    for ticket, adapter in ((10, adapters[1]), (20, adapters[2])):
        submit(engines, first_id=ticket)
        wait_for_tokens(engines, BEFORE_THE_CHANGE)
        policy.set_adapter(adapter)
        if ticket == 20:  # as if another engine had been replaced: the base comes again
            publisher.connect()
        publisher.publish()
        groups |= collect_all(engines)
    for version, first in ((1, 10), (2, 20)):
        before, after = (peft_model(folder, tmp_path / str(v)) for v in (version, version + 1))
        for ticket in (first, first + 1):
            of_before = differences(before, groups[ticket])
            of_after = differences(after, groups[ticket])
            for index, completion in enumerate(groups[ticket].completions):
                assert completion.policy_versions == (version, version + 1)
                _, start = completion.version_starts
                assert of_before[index, :start].max() < 1e-4
                assert of_before[index, start:].max() > 1e-2
                assert of_after[index, start:].max() < 1e-4
    engines.close()
    policy.close()


def begin(engines, policy, publisher, model, in_flight_kv):
    """Sample tickets 10 and 11 with `model` for a while; returns the version of its weights."""
    (actor,) = engines.actors.values()
    ray.get(actor.set_in_flight_kv.remote(in_flight_kv))
    policy.set_weights(model)
    publisher.publish()
    submit(engines, first_id=10)
    wait_for_tokens(engines, BEFORE_THE_CHANGE)
    return policy.policy_version


@pytest.mark.parametrize("in_flight_kv", ["recompute", "keep"])
def test_every_token_has_the_version_of_its_span(
    engines, policy, publisher, models, references, rollout_config, in_flight_kv
):
    old = begin(engines, policy, publisher, models[0], in_flight_kv)
    policy.set_weights(models[1])
    publisher.publish()
    submit(engines, first_id=20)  # the same prompts, which the prefix cache may know
    groups = collect_all(engines)
    limit = rollout_config().rollout.max_completion_length
    check_spans(groups, references, old, limit, recomputed=in_flight_kv == "recompute")


@pytest.mark.parametrize("in_flight_kv", ["recompute", "keep"])
def test_completions_continue_after_a_sleep_with_the_weights_that_came(
    engines, policy, publisher, models, references, rollout_config, in_flight_kv
):
    (actor,) = engines.actors.values()
    old = begin(engines, policy, publisher, models[0], in_flight_kv)
    for _ in range(2):  # who sleeps already stays asleep
        engines.call("sleep")
    tokens = ray.get(actor.least_tokens.remote())
    assert ray.get(actor.is_asleep.remote())
    submit(engines, first_id=20)
    policy.set_weights(models[1])
    publisher.publish()
    assert ray.get(actor.is_asleep.remote()), "weights alone do not wake it"
    assert not ray.wait(engines.pending_refs(), timeout=0.5)[0]
    # Requests that came meanwhile have begun, without a token.
    assert ray.get(actor.least_tokens.remote()) == 0
    assert tokens >= BEFORE_THE_CHANGE
    engines.call("wake")
    assert not ray.get(actor.is_asleep.remote())
    groups = collect_all(engines)
    limit = rollout_config().rollout.max_completion_length
    # Keys and values went with the memory, so they are recomputed in any case.
    check_spans(groups, references, old, limit, recomputed=True)
    for ticket in (10, 11):
        assert min(c.version_starts[1] for c in groups[ticket].completions) >= tokens


def test_an_engine_without_weights_does_not_wake(
    engines, policy, publisher, models, references, rollout_config
):
    engines.call("sleep")
    with pytest.raises(ActorFailure, match=r"engine 0 has no weights.*a weight sync has to come"):
        engines.call("wake")
    lacking = TensorPolicy(models[1], transport="ipc")
    lacking.drop("model.layers.1.mlp.down_proj.weight")
    section = rollout_config().weight_sync
    with pytest.raises(ActorFailure, match=r"1 parameters .*layers\.1\.mlp\.down_proj\.weight"):
        WeightPublisher(lacking, engines, section, transport="ipc").publish()
    lacking.close()
    engines.call("sleep")  # from where the failure left it
    with pytest.raises(ActorFailure, match="has no weights"):
        engines.call("wake")
    publisher.connect()
    policy.set_weights(models[1])
    publisher.publish()
    engines.call("wake")
    submit(engines, first_id=25)
    for group in collect_all(engines).values():
        assert differences(references[1], group).max() < 1e-4


def test_giving_up_groups_does_not_change_the_others(engines, publisher):
    submit(engines, first_id=30)
    wait_for_tokens(engines, 1)
    engines.abort([30])
    assert engines.num_pending == 1
    submit(engines, first_id=40)
    assert collect_all(engines).keys() == {31, 40, 41}


def test_a_failure_to_give_up_groups_is_raised_by_collect(engines):
    """The last test of these engines, which it breaks."""
    (actor,) = engines.actors.values()
    ray.get(actor.break_abort.remote())
    submit(engines, first_id=50)
    engines.abort([50])
    with pytest.raises(
        ActorFailure, match=r"failed in giving up groups: .*nothing can be given up"
    ):
        collect_all(engines)
