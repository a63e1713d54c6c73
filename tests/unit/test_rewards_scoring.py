"""What crosses between the system and the user's reward code, in both directions."""

import traceback
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.rewards import ORM, RewardError, RewardFunctions, orms, register_reward
from rlsys.types import Completion, Prompt, RolloutGroup

np = pytest.importorskip("numpy")


@pytest.fixture(autouse=True)
def _forget_registrations():
    before = dict(orms.data)
    yield
    orms.data.clear()
    orms.data.update(before)


def group_of(*texts: str, **columns: object) -> RolloutGroup:
    prompt = Prompt(
        prompt_id="train:7",
        messages=[{"role": "user", "content": "count"}],
        token_ids=[1, 2, 3],
        columns=columns,
    )
    completions = [
        Completion(
            token_ids=list(range(len(text))),
            rollout_logprobs=[-1.0] * len(text),
            text=text,
            finish_reason="stop" if text.endswith(".") else "length",
            policy_versions=(0,),
        )
        for text in texts
    ]
    return RolloutGroup(group_id=0, prompt=prompt, completions=completions)


def test_a_class_gets_texts_and_columns_as_lists():
    seen = {}

    @register_reward("spy")
    class Spy(ORM):
        def __call__(self, texts, solution, **columns):
            seen.update(columns, texts=texts, solution=solution)
            return [0.0] * len(texts)

    RewardFunctions(["spy"]).score(group_of("a.", "bc", solution="x", level=[1, 2]))
    assert seen == {
        "texts": ["a.", "bc"],
        "solution": ["x", "x"],
        "level": [[1, 2], [1, 2]],
        "prompts": [[{"role": "user", "content": "count"}]] * 2,
        "messages": [
            [{"role": "user", "content": "count"}, {"role": "assistant", "content": "a."}],
            [{"role": "user", "content": "count"}, {"role": "assistant", "content": "bc"}],
        ],
        "completion_ids": [[0, 1], [0, 1]],
        "finish_reasons": ["stop", "length"],
    }


def test_a_function_is_called_by_keyword_as_trl_does():
    @register_reward("trl")
    def trl_style(prompts, completions, completion_ids, **kwargs):
        return [float(len(ids)) for ids in completion_ids]

    [first, second] = RewardFunctions(["trl"]).score(group_of("ab", "c"))
    assert (first.total, second.total) == (2.0, 1.0)


def test_a_class_is_instantiated_once():
    created = []

    @register_reward("counted")
    class Counted(ORM):
        def __init__(self):
            created.append(self)

        def __call__(self, completions, **columns):
            return [0] * len(completions)

    functions = RewardFunctions(["counted"])
    functions.score(group_of("a", "b"))
    functions.score(group_of("c", "d"))
    assert len(created) == 1


def test_totals_are_weighted_and_values_are_not():
    group = group_of("<think>a</think><answer>1+2</answer>", "1+2", nums=[1, 2], target=3)
    good, bad = RewardFunctions(["countdown", "format"], [2.0, 0.5]).score(group)
    assert good.by_name == {"countdown": 1.0, "format": 1.0}
    assert good.total == 2.5
    assert bad.by_name == {"countdown": 0.0, "format": 0.0}
    assert bad.total == 0.0
    assert [r.total for r in RewardFunctions(["countdown", "format"]).score(group)] == [2.0, 0.0]


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=5))
def test_any_finite_floats_come_back_in_order(values):
    orms.data["values"] = lambda completions, **columns: values
    rewards = RewardFunctions(["values"]).score(group_of(*"abcde"[: len(values)]))
    assert [reward.by_name["values"] for reward in rewards] == values


@pytest.mark.parametrize(
    "returned",
    [
        [True, False],
        [1, 0],
        (1.0, 0.0),
        np.array([1, 0]),
        np.array([1.0, 0.0], dtype=np.float32),
        [np.float16(1), np.bool_(False)],
    ],
    ids=repr,
)
def test_numbers_of_all_kinds_are_rewards(returned):
    orms["numbers"] = lambda completions, **columns: returned
    rewards = RewardFunctions(["numbers"]).score(group_of("a", "b"))
    assert [reward.total for reward in rewards] == [1.0, 0.0]
    assert all(type(reward.total) is float for reward in rewards)


@pytest.mark.parametrize(
    ("returned", "shown"),
    [
        (None, "returned None"),
        (1.0, r"returned 1\.0"),
        ("10", "returned '10'"),
        ({0: 1.0, 1: 0.0}, "returned {0: 1.0, 1: 0.0}"),
        ((x for x in (1.0, 0.0)), "returned <generator"),
        ([1.0], r"returned 1 values, \[1\.0\]"),
        ([], r"returned 0 values, \[\]"),
        ([1.0, 2.0, 3.0], "returned 3 values"),
        ([0.0, float("nan")], "returned nan for completion 1"),
        ([float("-inf"), 0.0], "returned -inf for completion 0"),
        ([1.0, None], "returned None for completion 1"),
        ([1.0, "0"], "returned '0' for completion 1"),
        ([1.0, [0.0]], r"returned \[0\.0\] for completion 1"),
        ([1.0, 10**400], "returned 1000.* for completion 1"),
        (np.zeros((2, 2)), r"returned array\(\[0\., 0\.\]\) for completion 0"),
    ],
)
def test_anything_else_is_an_error_that_names_the_function(returned, shown):
    orms["odd"] = lambda completions, **columns: returned
    with pytest.raises(RewardError, match=shown) as caught:
        RewardFunctions(["format", "odd"]).score(group_of("a", "b"))
    message = str(caught.value)
    assert "'odd'" in message
    assert "'train:7'" in message
    assert "one finite number for each of the 2 completions" in message


def test_an_exception_is_told_with_function_and_prompt_and_never_a_0():
    @register_reward("raises")
    class Raises(ORM):
        def __call__(self, completions, answer, **columns):
            return [float(value) for value in answer]

    functions = RewardFunctions(["format", "raises"])
    with pytest.raises(RewardError, match=r"'raises' raised ValueError on prompt 'train:7'") as e:
        functions.score(group_of("a", "b", answer="four"))
    assert isinstance(e.value.__cause__, ValueError)
    assert "return [float(value) for value in answer]" in "".join(
        traceback.format_exception(e.value.__cause__)
    )


def test_a_missing_column_lists_those_that_exist():
    with pytest.raises(RewardError, match=r"missing a required argument: 'nums'") as caught:
        RewardFunctions(["countdown"]).score(group_of("a", "b", numbers=[1, 2], goal=3))
    assert "completion_ids, finish_reasons, goal, messages, numbers, prompts" in str(caught.value)


def test_a_signature_without_columns_is_told_how_to_end():
    orms["narrow"] = lambda completions: [0.0] * len(completions)
    with pytest.raises(RewardError, match=r"end the function's parameters with \*\*columns"):
        RewardFunctions(["narrow"]).score(group_of("a", "b"))


def test_a_typeerror_inside_the_function_is_not_taken_for_a_missing_column():
    orms["adds"] = lambda completions, **columns: [text + 1 for text in completions]
    with pytest.raises(RewardError, match="'adds' raised TypeError"):
        RewardFunctions(["adds"]).score(group_of("a", "b"))


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match=r"unknown reward function 'cuontdown'\..*'countdown'.*fo"):
        RewardFunctions(["format", "cuontdown"])


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (["format", "countdown"], [1.0], r"1 values for 2 reward functions \(format, countdown\)"),
        (["format"], [float("nan")], "must be finite"),
        (["format", "format"], None, "lists a function twice: format, format"),
    ],
)
def test_names_and_weights_that_do_not_fit(names, weights, message):
    with pytest.raises(ValueError, match=message):
        RewardFunctions(names, weights)


def test_a_class_that_needs_arguments_is_named():
    @register_reward("needy")
    class Needy(ORM):
        def __init__(self, model):
            self.model = model

    with pytest.raises(RewardError, match=r"'needy': Needy\(\) raised TypeError.*'model'"):
        RewardFunctions(["needy"])


def test_a_dataset_cannot_replace_what_the_system_passes():
    group = group_of("a", "b")
    columns = {"finish_reasons": "dataset"}
    group = replace(group, prompt=replace(group.prompt, columns=columns))
    orms["reasons"] = lambda completions, finish_reasons, **columns: [
        float(reason == "length") for reason in finish_reasons
    ]
    assert [r.total for r in RewardFunctions(["reasons"]).score(group)] == [1.0, 1.0]
