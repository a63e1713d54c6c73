"""Columns whose names mean something to a run: they matter only where a reward function asks."""

import pytest
from config_cases import write_config

from rlsys.config.load import load_config
from rlsys.rewards import ORM, OWN_COLUMNS, Reward, register_reward
from rlsys.rewards.columns import column_problems, unread_columns
from rlsys.rewards.scoring import reward_columns
from rlsys.types import Completion, Prompt, RolloutGroup

RESERVED = [*(name for name in OWN_COLUMNS if name != "completions"), "self"]

pytestmark = pytest.mark.usefixtures("forget_registrations")


def config_of(tmp_path, *names):
    return load_config(write_config(tmp_path, reward={"reward_funcs": list(names)})).config


@pytest.mark.parametrize("column", RESERVED)
def test_a_reserved_name_that_no_reward_function_takes_is_ignored_and_named(tmp_path, column):
    config = config_of(tmp_path, "format", "exact_match")
    columns = ["solution", column]
    assert column_problems(config, columns) == []
    assert unread_columns(config, columns) == (
        f"no reward function names the column {column}; functions with **columns may read them"
    )
    prompt = Prompt("a:1", [], [1], {"solution": 7, column: "x"})
    text = "<think>a</think><answer>7</answer>"
    given = reward_columns(
        RolloutGroup(0, prompt, [Completion([1], [0.0], text, "stop", policy_versions=(1,))])
    )
    for name in ("format", "exact_match"):
        assert Reward(name).score_columns(given) == [1.0]
    if column in OWN_COLUMNS:  # the run's own goes before the dataset's
        assert given[column] != ["x"]


def test_a_function_that_takes_one_of_the_runs_own_columns_hides_none_of_the_dataset(tmp_path):
    @register_reward("finished")
    def finished(completions, finish_reasons, **columns):
        return [0.0] * len(completions)

    @register_reward("finished_class")
    class Finished(ORM):
        def __call__(self, completions, finish_reasons=None, **columns):
            return [0.0] * len(completions)

    for name in ("finished", "finished_class"):
        config = config_of(tmp_path, name)
        assert column_problems(config, ["solution"]) == []
        [problem] = column_problems(config, ["solution", "finish_reasons"])
        assert f"{name!r} takes 'finish_reasons', which the run fills in" in problem
        assert "data.columns: {finish_reasons: dataset_finish_reasons}" in problem


def test_every_reward_function_takes_completions_whatever_it_calls_them(tmp_path):
    @register_reward("other_word")
    class OtherWord(ORM):
        def __call__(self, texts, **columns):
            return [0.0] * len(texts)

    [problem] = column_problems(config_of(tmp_path, "format"), ["completions"])
    assert "'format' takes 'completions'" in problem
    [problem] = column_problems(config_of(tmp_path, "other_word"), ["texts"])
    assert "'other_word' takes 'texts', which the run fills in" in problem


def test_columns_that_nothing_reads_are_one_line(tmp_path):
    @register_reward("strict")
    def strict(completions, nums):
        return [0.0] * len(completions)

    config = config_of(tmp_path, "strict")
    assert unread_columns(config, ["nums", "tools", "chat_template_kwargs"]) is None
    many = [f"c{number}" for number in range(20)]
    line = unread_columns(config, ["nums", *many])
    assert line == f"no reward function names the columns {', '.join(many[:12])} and 8 more"
