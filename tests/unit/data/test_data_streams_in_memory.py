"""The stream of prompts: every prompt once an epoch, and to be continued from its state."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tracking_cases import make_config

from rlsys.data import PromptData
from rlsys.data.streams.in_memory import InMemory
from rlsys.preflight.before_start import check_prompts
from rlsys.types import Prompt

seeds = st.integers(0, 2**31 - 1)


def prompts_of(size):
    return [Prompt(f"p{i}", [{"role": "user", "content": "?"}], [i]) for i in range(size)]


def ids(prompts):
    return [prompt.prompt_id for prompt in prompts]


@given(
    num_prompts=st.integers(1, 40),
    sizes=st.lists(st.integers(0, 50), max_size=12),
    shuffle=st.booleans(),
    seed=seeds,
)
def test_every_epoch_holds_every_prompt_once_however_it_is_cut(num_prompts, sizes, shuffle, seed):
    prompts = prompts_of(num_prompts)
    source = InMemory(prompts, shuffle=shuffle, seed=seed)
    stream = ids(prompt for size in sizes for prompt in source.take(size))
    assert len(stream) == source.num_taken == sum(sizes)
    assert source.epoch == sum(sizes) / num_prompts
    for start in range(0, len(stream) - num_prompts + 1, num_prompts):
        assert sorted(stream[start : start + num_prompts]) == sorted(ids(prompts))
    assert stream == ids(InMemory(prompts, shuffle=shuffle, seed=seed).take(sum(sizes)))
    if not shuffle:
        assert stream == (ids(prompts) * (len(stream) // num_prompts + 1))[: len(stream)]


@given(seed=seeds, taken=st.integers(0, 100))
def test_a_stream_that_loads_a_state_goes_on_as_its_owner(seed, taken):
    source = InMemory(prompts_of(20), shuffle=True, seed=seed)
    source.take(taken)
    resumed = InMemory(prompts_of(20), shuffle=True, seed=seed)
    resumed.load_state_dict(json.loads(json.dumps(source.state_dict())))
    assert resumed.take(45) == source.take(45)
    assert resumed.epoch == source.epoch == (taken + 45) / 20


def test_epochs_and_seeds_differ_in_order():
    prompts = prompts_of(50)
    source = InMemory(prompts, shuffle=True, seed=1)
    first, second = source.take(50), source.take(50)
    assert first != second
    assert first != InMemory(prompts, shuffle=True, seed=2).take(50)
    assert first != prompts


def test_fewer_prompts_than_a_step_needs_names_the_numbers(tmp_path):
    config = make_config(tmp_path, rollout={"generation_batch_size": 16, "num_generations": 2})
    prompts = [replace(prompt, columns={"nums": [1], "target": 1}) for prompt in prompts_of(8)]
    with pytest.raises(ValueError, match=r"a step needs 8 prompts .* the training data has 7"):
        check_prompts(config, PromptData(prompts[:7], [], [7]))
    check_prompts(config, PromptData(prompts, [], [8]))
    ahead = config.rollout.model_copy(update={"max_staleness": 1})
    with pytest.raises(ValueError, match=r"8 prompts .* and 8 ahead .* training data has 8"):
        check_prompts(config.model_copy(update={"rollout": ahead}), PromptData(prompts, [], [8]))


def test_a_column_that_only_held_out_rows_lack_is_named_where_they_are_used(tmp_path):
    fields = {
        "rollout": {"generation_batch_size": 16, "num_generations": 2},
        "data": {"dataset": ["train.jsonl"], "val_dataset": ["validation.jsonl"]},
    }
    prompts = [replace(prompt, columns={"nums": [1], "target": 1}) for prompt in prompts_of(8)]
    data = PromptData(prompts, [replace(prompts[0], columns={"target": 1})], [8])
    with pytest.raises(ValueError, match="nums, which the held-out data does not have"):
        check_prompts(make_config(tmp_path, eval_steps=1, **fields), data)
    check_prompts(make_config(tmp_path, **fields), data)


def test_a_column_that_a_reward_needs_and_no_row_has_is_named_before_the_run(tmp_path):
    config = make_config(tmp_path, rollout={"generation_batch_size": 16, "num_generations": 2})
    prompts = [replace(prompt, columns={"target": 1}) for prompt in prompts_of(8)]
    with pytest.raises(ValueError, match=r"'countdown' needs the column nums.*It has: target"):
        check_prompts(config, PromptData(prompts, [], [8]))
