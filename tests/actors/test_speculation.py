"""Speculative decoding on a real engine: completions and log-probs stay the policy's.

On CPU, with one of vLLM's kernels mended (drafting_workers.py): a run could not have it there.
"""

import pytest
import ray
import torch
from greedy_rollouts import ReloadingActor, greedy, reload, start_reloading_engine
from patience import PATIENCE_S
from policy_cases import policy_config
from sampled_distribution import compare
from tensor_policy import TensorPolicy

from rlsys.actors.weight_publisher import WeightPublisher
from rlsys.algo.batching import build_train_batch
from rlsys.types import Prompt, SampleRequest

pytestmark = [pytest.mark.system, pytest.mark.slow]

# Short loops, so that n-grams of the text so far come again.
PROMPTS = [Prompt(f"p{i}", [], [2 + (i * 37 + j) % 250 for j in range(5)] * 4) for i in range(8)]
G, TEMPERATURE, DRAFTED = 8, 0.25, 3
NGRAM = {"method": "ngram", "num_speculative_tokens": DRAFTED, "prompt_lookup_min": 1}


class SettingActor(ReloadingActor):
    def __init__(self, *args):
        import drafting_workers

        from rlsys.engines.vllm import engine as vllm

        vllm.WORKER_EXTENSION = drafting_workers.WORKER_EXTENSION
        vllm.engine_option_problems = lambda *_, **__: []
        super().__init__(*args)

    async def use(self, config):
        """Sample as another config says."""
        await self._call(lambda engine: setattr(engine, "_config", config))


@pytest.fixture
def engines(ray_cluster, rollout_config):
    """An engine in a process of its own: no other one starts in a process that has used ngrams."""
    engines = start_reloading_engine(rollout_config(max_completion_length=48), SettingActor)
    yield engines
    engines.close()


def use(engines, config):
    ray.get(engines.actors["rollout engine 0"].use.remote(config))


def sample(engines, *, first, prompts=PROMPTS):
    requests = [
        SampleRequest(first + i, prompt, G, TEMPERATURE, 100 * (first + i))
        for i, prompt in enumerate(prompts)
    ]
    engines.submit(requests)
    groups = []
    while engines.num_pending:
        assert ray.wait(engines.pending_refs(), timeout=PATIENCE_S)[0]
        groups += engines.collect()
    return sorted(groups, key=lambda group: group.ticket)


def check_distribution(groups, folder, **settings):
    differences, deviation = compare(groups, folder, temperature=TEMPERATURE, **settings)
    assert differences.max() < 2e-4
    assert abs(deviation) < 4


def likeliest(logits):
    """The likeliest tokens with nine tenths of the mass."""
    probs, order = logits.softmax(dim=-1).sort(dim=-1)
    left_out = probs.cumsum(dim=-1) <= 1 - 0.9
    return logits.masked_fill(left_out.gather(1, order.argsort(dim=-1)), -torch.inf)


def test_drafts_of_ngrams_change_neither_distribution_nor_log_probs(
    engines, rollout_config, tiny_models
):
    def config(**more):
        return rollout_config(max_completion_length=48, speculative_config=NGRAM, **more)

    plain = greedy(engines)[0]
    assert engines.draft_counts().num_drafts == 0
    reload(engines, config())
    assert greedy(engines)[0] == plain
    before = engines.draft_counts()
    groups = sample(engines, first=100)
    check_distribution(groups, tiny_models[True, 1])
    counts = engines.draft_counts() - before
    assert 0 < counts.num_accepted_tokens < counts.num_draft_tokens
    assert counts.num_draft_tokens <= DRAFTED * counts.num_drafts
    tokens = sum(len(c.token_ids) for group in groups for c in group.completions)
    assert counts.num_drafts < tokens
    (alone,) = sample(engines, first=100, prompts=PROMPTS[:1])
    assert [c.token_ids for c in alone.completions] == [c.token_ids for c in groups[0].completions]

    use(engines, config(top_p=0.9))
    check_distribution(sample(engines, first=200), tiny_models[True, 1], cut=likeliest)

    policy = TensorPolicy(tiny_models[True, 1])
    publisher = WeightPublisher(policy, engines, rollout_config().weight_sync)
    policy.set_weights(tiny_models[True, 2])
    publisher.publish()
    use(engines, config())
    groups = sample(engines, first=300)
    assert {c.policy_versions for g in groups for c in g.completions} == {(policy.policy_version,)}
    check_distribution(groups, tiny_models[True, 2])
    policy.close()


def test_penalties_are_those_of_each_drafted_token(engines, lab, rollout_config):
    """Each token's from its own prefix, with the tokens that were drafted before it."""
    penalties = {"repetition_penalty": 1.03, "presence_penalty": 0.02, "frequency_penalty": 0.03}
    config = rollout_config(
        max_completion_length=48, temperature=TEMPERATURE, speculative_config=NGRAM, **penalties
    )
    reload(engines, config)
    groups = sample(engines, first=100)
    assert engines.draft_counts().num_accepted_tokens > 0  # larger penalties leave none
    batch = build_train_batch(groups)
    own = policy_config(config.model.path).model_copy(update={"rollout": config.rollout})
    logprobs, _ = lab.policy(own).compute_logprobs(batch)
    torch.testing.assert_close(logprobs, batch.rollout_logprobs, rtol=0, atol=2e-4)


def test_a_draft_model_keeps_its_weights_and_the_policy_its_distribution(
    engines, rollout_config, tiny_models
):
    """The draft model is the policy's first version: all of its greedy drafts are accepted."""
    drafts = {"model": str(tiny_models[True, 1]), "num_speculative_tokens": DRAFTED}
    limits = {"max_completion_length": 48}
    reload(engines, rollout_config(tiny_models[True, 2], **limits))
    plain = greedy(engines)[0]
    reload(engines, rollout_config(speculative_config=drafts, **limits))
    greedy(engines)
    same = engines.draft_counts()
    assert same.num_accepted_tokens > 0.9 * same.num_draft_tokens > 0
    policy = TensorPolicy(tiny_models[True, 1])
    publisher = WeightPublisher(policy, engines, rollout_config().weight_sync)
    policy.set_weights(tiny_models[True, 2])
    publisher.publish()
    assert greedy(engines)[0] == plain
    after = engines.draft_counts() - same
    assert after.num_accepted_tokens < 0.5 * after.num_draft_tokens
    check_distribution(sample(engines, first=100), tiny_models[True, 2])
    policy.close()
