"""What sampling options do on a real engine: which tokens end a completion, and whose log-probs."""

import pytest
import ray
import torch
from policy_cases import policy_config

from rlsys.algo.batching import build_train_batch
from rlsys.engines.vllm.settings import rollout_env
from rlsys.types import Prompt, SampleRequest

pytestmark = pytest.mark.system

PROMPTS = [Prompt(f"p{i}", [], [2 + (i * 37 + j) % 250 for j in range(4 + i)]) for i in range(4)]
G = 4
OPTIONS = {
    "min_p": {"min_p": 0.05},
    "min_p, top_k and top_p": {"min_p": 0.02, "top_k": 40, "top_p": 0.9},
    "penalties": {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.5,
        "top_p": 0.95,
    },
}


class SamplingLab:
    """One vLLM engine that samples by one config after the other."""

    def __init__(self, config):
        from rlsys.engines.vllm.engine import VLLMEngine

        self.engine = VLLMEngine(config.model.path, config=config, device="cpu", engine_rank=0)

    def sample(self, config):
        from pathlib import Path

        from rlsys.model.stop_tokens import read_stop_rules

        engine = self.engine
        engine._config = config
        engine._stops = read_stop_rules(Path(config.model.path), engine._tokenizer, config.rollout)
        engine.add([SampleRequest(i, p, G, 0.8, 7 + i) for i, p in enumerate(PROMPTS)])
        groups = []
        while engine.has_work:
            groups += engine.step()
        return sorted(groups, key=lambda group: group.ticket)


@pytest.fixture(scope="module")
def engine(ray_cluster, rollout_config):
    """`sample(config)`; this engine decodes tokens, which stop texts need."""
    env = {"env_vars": rollout_env("cpu")}
    actor = ray.remote(SamplingLab).options(runtime_env=env, num_cpus=0)
    actor = actor.remote(rollout_config(stop=["never to be found"]))
    yield lambda config: ray.get(actor.sample.remote(config))
    ray.kill(actor)


def policy_logprobs(lab, config, batch, **layout):
    own = policy_config(config.model.path, **layout)
    policy = lab.policy(own.model_copy(update={"rollout": config.rollout}))
    return policy.compute_logprobs(batch)[0]


@pytest.mark.parametrize("name", OPTIONS)
def test_policy_and_engine_agree_about_log_probs(engine, lab, rollout_config, name):
    config = rollout_config(temperature=0.8, max_completion_length=24, **OPTIONS[name])
    batch = build_train_batch(engine(config))
    logprobs = policy_logprobs(lab, config, batch)
    torch.testing.assert_close(logprobs, batch.rollout_logprobs, rtol=0, atol=1e-4)
    plain = rollout_config(temperature=0.8, max_completion_length=24)
    ignored = policy_logprobs(lab, plain, batch)
    assert (ignored - batch.rollout_logprobs).abs().max() > 0.1
    layout = {"world_size": 4, "tensor_parallel_size": 2, "context_parallel_size": 2}
    if name == "penalties":  # each rank has a part of the vocabulary and of the tokens
        shared = policy_logprobs(lab, config, batch, **layout)
        torch.testing.assert_close(shared, logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("keeps", [False, True])
def test_a_stop_text_ends_a_completion_whose_tokens_are_all_trained_on(
    engine, lab, rollout_config, keeps
):
    """Texts such as "word21" are tokens of the tiny model; "d2" is never a token of its own."""
    stop = "d2"
    config = rollout_config(
        temperature=0.8, max_completion_length=24, stop=[stop], include_stop_str_in_output=keeps
    )
    groups = engine(config)
    plain = engine(rollout_config(temperature=0.8, max_completion_length=24))
    by_text = 0
    for group, longer_group in zip(groups, plain, strict=True):
        for completion, longer in zip(group.completions, longer_group.completions, strict=True):
            # The same tokens as without the stop text, up to the one that completes it.
            count = len(completion.token_ids)
            assert completion.token_ids == longer.token_ids[:count]
            assert len(completion.rollout_logprobs) == count
            found = longer.text.find(stop)
            if found < 0:
                assert (completion.text, completion.finish_reason) == (
                    longer.text,
                    longer.finish_reason,
                )
                continue
            by_text += 1
            end = found + len(stop) if keeps else found
            assert completion.text == longer.text[:end]
            assert completion.finish_reason == "stop"  # so it does not count as truncated
    assert by_text > 3
    batch = build_train_batch(groups)
    assert batch.completion_mask.sum() == sum(
        len(completion.token_ids) for group in groups for completion in group.completions
    )
    logprobs = policy_logprobs(lab, config, batch)
    torch.testing.assert_close(logprobs, batch.rollout_logprobs, rtol=0, atol=1e-4)
