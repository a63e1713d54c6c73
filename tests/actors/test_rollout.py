"""Rollouts on a real engine: which tokens, which log-probs, in which order, from which seed."""

import pytest
import ray
import torch
from patience import PATIENCE_S
from tensor_policy import TensorPolicy
from tiny_models import STOP_TOKEN_IDS, save_markov_qwen3, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlsys.actors.rollout import RolloutActors
from rlsys.actors.waiting import ActorFailure
from rlsys.actors.weight_publisher import WeightPublisher
from rlsys.rollout.draws import sampling_seed
from rlsys.types import Prompt, SampleRequest

pytestmark = pytest.mark.system

PROMPTS = [
    Prompt(f"p{i}", [{"role": "user", "content": "?"}], [2 + (i * 37 + j) % 250 for j in range(9)])
    for i in range(8)
]
G = 4


def requests(prompts, *, step=1, temperature=0.7):
    return [
        SampleRequest(i, prompt, G, temperature, sampling_seed(42, step, i))
        for i, prompt in enumerate(prompts)
    ]


def sample(engines, *, step=1, prompts=PROMPTS, temperature=0.7):
    """All groups, by ticket."""
    engines.submit(requests(prompts, step=step, temperature=temperature))
    groups = {group.ticket: group for group in collect_all(engines)}
    assert sorted(groups) == list(range(len(prompts)))
    return groups


def collect_all(engines):
    groups = []
    while engines.num_pending:
        ready, _ = ray.wait(engines.pending_refs(), timeout=PATIENCE_S)
        assert ready
        groups += engines.collect()
    return groups


def token_ids(groups):
    return {i: [c.token_ids for c in group.completions] for i, group in groups.items()}


@pytest.fixture(scope="module")
def model_folder(engines, rollout_config, tiny_models):
    """The model that the engines hold throughout this module."""
    folder = tiny_models[True, 1]
    policy = TensorPolicy(folder)
    WeightPublisher(policy, engines, rollout_config().weight_sync).publish()
    policy.close()
    return folder


@pytest.fixture(scope="module")
def groups(engines, model_folder):
    return sample(engines)


def test_every_prompt_gets_its_own_g_completions(groups):
    for ticket, group in groups.items():
        assert group.prompt == PROMPTS[ticket]
        assert len(group.completions) == G
        assert group.rewards == []


def test_completions_end_with_their_first_stop_token(groups):
    completions = [c for group in groups.values() for c in group.completions]
    for completion in completions:
        *body, last = completion.token_ids
        assert completion.finish_reason == "stop"
        assert last in STOP_TOKEN_IDS
        assert not set(body) & set(STOP_TOKEN_IDS)
    assert len({c.token_ids[-1] for c in completions}) > 1


def test_text_is_decoded_without_the_stop_token(groups, model_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    for completion in groups[0].completions:
        tokens = [i for i in completion.token_ids if i not in STOP_TOKEN_IDS]
        assert completion.text == tokenizer.decode(tokens)


@torch.no_grad()
def test_logprobs_are_those_of_the_sampling_distribution(groups, model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    for group in groups.values():
        for completion in group.completions:
            prompt = group.prompt.token_ids
            ids = torch.tensor([prompt + completion.token_ids])
            logprobs = torch.log_softmax(model(ids).logits[0, :-1] / 0.7, dim=-1)
            expected = logprobs.gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
            assert completion.rollout_logprobs == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_an_fp32_head_does_not_round_logits(ray_cluster, rollout_config, tiny_models, tmp_path):
    """After a weight sync in bfloat16, log-probs are nearer to those of float32 logits."""
    model = AutoModelForCausalLM.from_pretrained(tiny_models[True, 1], dtype=torch.bfloat16)
    save_model(model, tmp_path)
    config = rollout_config(model_path=tmp_path)
    fp32 = config.model.model_copy(update={"dtype": "bfloat16", "fp32_lm_head": True})
    engines = RolloutActors(config.model_copy(update={"model": fp32}), device="cpu")
    engines.start()
    policy = TensorPolicy(tmp_path)
    WeightPublisher(policy, engines, config.weight_sync).publish()
    groups = sample(engines, temperature=1.0)
    engines.close()
    policy.close()
    head = model.get_output_embeddings().weight
    to_rounded, to_unrounded = [], []
    for completion, prompt in [(c, g.prompt) for g in groups.values() for c in g.completions]:
        ids = torch.tensor([prompt.token_ids + completion.token_ids])
        hidden = model.model(ids).last_hidden_state[0, len(prompt.token_ids) - 1 : -1]
        for logits, differences in (
            (hidden @ head.T, to_rounded),
            (hidden.float() @ head.float().T, to_unrounded),
        ):
            logprobs = torch.log_softmax(logits.float(), dim=-1)
            expected = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            differences.append((expected - torch.tensor(completion.rollout_logprobs)).abs())
    assert torch.cat(to_unrounded).mean() < torch.cat(to_rounded).mean()


def test_seeds_reproduce_a_step_on_any_engine(groups, engines):
    assert token_ids(sample(engines)) == token_ids(groups)
    assert token_ids(sample(engines, step=2)) != token_ids(groups)
    # All prompts on one engine instead of two.
    stream = engines.actors["rollout engine 1"].generate.remote(requests(PROMPTS))
    alone = {group.ticket: group for group in map(ray.get, stream)}
    assert token_ids(alone) == token_ids(groups)


def test_completions_of_a_prompt_differ_and_so_do_equal_prompts(engines, model_folder):
    groups = sample(engines, prompts=[PROMPTS[0]] * 8)
    tokens = [tuple(c.token_ids) for group in groups.values() for c in group.completions]
    assert len(set(tokens)) > len(tokens) // 2  # single-token completions may coincide


def test_short_groups_arrive_while_long_ones_are_sampled_and_cut(
    engines, rollout_config, tmp_path, model_folder
):
    """Token 10 is followed by itself for ever, token 11 by a stop token at once."""
    save_markov_qwen3(tmp_path, {10: 10, 11: STOP_TOKEN_IDS[5]})
    policy = TensorPolicy(tmp_path)
    WeightPublisher(policy, engines, rollout_config().weight_sync).publish()
    policy.close()
    endless, short = Prompt("endless", [], [5, 10]), Prompt("short", [], [5, 11])
    # Engine 0 gets the endless ones first, engine 1 the short ones.
    engines.submit(requests([endless, short, short, endless], temperature=1.0))
    first = []
    while len(first) < 2:
        ray.wait(engines.pending_refs(), timeout=PATIENCE_S)
        first += engines.collect()
    assert engines.num_pending == 2
    assert ray.wait(engines.pending_refs(), timeout=0)[0] == []
    for completion in [c for group in first for c in group.completions]:
        assert (completion.token_ids, completion.finish_reason) == ([STOP_TOKEN_IDS[5]], "stop")
        assert completion.text == ""
    last = collect_all(engines)
    limit = rollout_config().rollout.max_completion_length
    for completion in [c for group in last for c in group.completions]:
        assert (completion.token_ids, completion.finish_reason) == ([10] * limit, "length")


def test_a_prompt_over_the_limit_is_refused_by_name(engines, model_folder):
    with pytest.raises(ActorFailure, match=r"'much too long' has 161 tokens.*max_prompt_length"):
        sample(engines, prompts=[Prompt("much too long", [], [5] * 161)])


def test_an_engine_that_cannot_start_shows_vllms_own_error(ray_cluster, rollout_config):
    actors = RolloutActors(rollout_config(max_completion_length=400), device="cpu")
    message = r"\nrollout engine 0 failed in start[^\n]*max_model_len \(560\) is greater than"
    with pytest.raises(ActorFailure, match=message):
        actors.start()
    actors.close()
