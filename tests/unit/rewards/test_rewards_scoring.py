"""What crosses between the system and the user's reward code, in both directions."""

import asyncio
import functools
import math
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reward_cases import RewardFunctions

from rlsys.rewards import (
    ORM,
    AsyncORM,
    RewardError,
    TrainerState,
    orms,
    register_reward,
    settings_of,
    trl_style,
)
from rlsys.types import Completion, Prompt, RolloutGroup

np = pytest.importorskip("numpy")

pytestmark = pytest.mark.usefixtures("forget_registrations")


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
    return RolloutGroup(ticket=0, prompt=prompt, completions=completions)


def test_a_class_gets_texts_and_columns_as_lists():
    seen = {}

    @register_reward("spy")
    class Spy(ORM):
        def __call__(self, texts, solution, **columns):
            seen.update(columns, texts=texts, solution=solution)
            return [0.0] * len(texts)

    RewardFunctions(["spy"]).score(group_of("a.", "bc", solution="x", level=[1, 2]))
    assert callable(seen.pop("log_extra"))
    assert callable(seen.pop("log_metric"))
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
        "response_token_ids": [[0, 1], [0, 1]],
        "trainer_state": TrainerState(0, 0),
        "finish_reasons": ["stop", "length"],
        "prompt_opens_think": [False, False],
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
        ([1.0], r"returned 1 value, \[1\.0\]"),
        ([], r"returned 0 values, \[\]"),
        ([1.0, 2.0, 3.0], "returned 3 values"),
        ([0.0, float("nan")], "returned nan for completion 1"),
        ([float("-inf"), 0.0], "returned -inf for completion 0"),
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


def test_an_exception_names_function_and_prompt_and_is_never_a_0():
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
    assert "finish_reasons, goal, messages, numbers, prompt_opens_think, prompts" in str(
        caught.value
    )


def test_the_error_of_a_signature_without_columns_says_how_to_end_it():
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
        (["format", "countdown"], [1.0], r"1 value for 2 reward functions .*\(format, countdown\)"),
        (["format"], [float("nan")], "should be a finite number"),
        (["format", "format"], None, "names format more than once"),
    ],
)
def test_names_and_weights_that_do_not_fit(names, weights, message):
    with pytest.raises(ValueError, match=message):
        RewardFunctions(names, weights)


def test_functions_of_weight_0_alone_are_scored_too():
    """A teacher may be all that is learned from."""
    orms["length"] = lambda completions, **columns: [float(len(text)) for text in completions]
    found = RewardFunctions(["length"], [0.0]).score(group_of("a", "bb"))
    assert [(one.total, one.by_name) for one in found] == [
        (0.0, {"length": 1.0}),
        (0.0, {"length": 2.0}),
    ]


def test_none_means_not_applicable_and_is_left_out_of_the_total():
    orms["half"] = lambda completions, **columns: [None, 2.0]
    orms["one"] = lambda completions, **columns: [1.0, 1.0]
    first, second = RewardFunctions(["half", "one"], [10.0, 1.0]).score(group_of("a", "b"))
    assert math.isnan(first.by_name["half"])
    assert (first.total, second.total) == (1.0, 21.0)


def test_a_completion_that_no_function_applies_to_is_dropped():
    orms["never"] = lambda completions, **columns: [None] * len(completions)
    [first] = RewardFunctions(["never"]).score(group_of("a"))
    assert math.isnan(first.total)


@pytest.mark.parametrize("form", ["function", "class", "object", "method", "partial"])
def test_async_functions_are_awaited(form):
    async def score(completions, nums, **columns):
        await asyncio.sleep(0)
        return [len(text) + nums[0] for text in completions]

    class Waits(AsyncORM):
        async def __call__(self, completions, nums, **columns):
            return await score(completions, nums)

    forms = {
        "function": score,
        "class": Waits,
        "object": Waits(),
        "method": Waits().__call__,
        "partial": functools.partial(score),
    }
    orms["waits"] = forms[form]
    rewards = RewardFunctions(["waits"]).score(group_of("a", "bcd", nums=1))
    assert [reward.total for reward in rewards] == [2.0, 4.0]


def test_an_async_exception_is_reported_like_any_other():
    async def score(completions, **columns):
        raise ConnectionError("no server")

    orms["waits"] = score
    with pytest.raises(RewardError, match="'waits' raised ConnectionError on prompt 'train:7'"):
        RewardFunctions(["waits"]).score(group_of("a"))


def test_a_trl_style_function_gets_messages_and_others_texts():
    seen = []

    def spy(prompts, completions, **kwargs):
        seen.append(completions)
        return [0.0] * len(completions)

    orms["texts"] = spy
    orms["chats"] = trl_style(spy)
    RewardFunctions(["texts", "chats"]).score(group_of("a", "b"))
    assert seen == [
        ["a", "b"],
        [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]],
    ]


def test_a_class_is_not_of_trl_style():
    with pytest.raises(ValueError, match=r"Settled is a class.*leave out @trl_style, or trl/"):
        trl_style(Settled)


@pytest.mark.parametrize("kind", [staticmethod, classmethod])
def test_a_call_without_self_gets_the_same(kind):
    def score(completions, nums):
        return [len(text) + nums[0] for text in completions]

    def of_class(cls, texts, nums, **columns):
        return score(texts, nums)

    def static(texts, nums, **columns):
        return score(texts, nums)

    call = kind(static if kind is staticmethod else of_class)
    orms["selfless"] = type("Selfless", (), {"__call__": call})
    assert RewardFunctions(["selfless"]).score(group_of("ab", nums=1))[0].total == 3.0


class Settled(ORM):
    def __init__(self, scale: float, offset: float = 0.5, max_completion_length: int = 7):
        self.value = scale * max_completion_length + offset

    def __call__(self, completions, **columns):
        return [self.value] * len(completions)


def test_settings_reach_the_class_and_the_run_fills_the_rest():
    orms["settled"] = Settled
    [reward] = RewardFunctions(["settled"], params={"settled": {"scale": 2}}).score(group_of("a"))
    assert reward.total == 14.5
    run_values = {"max_completion_length": 100, "model_path": "m"}
    assert settings_of("settled", {"scale": 2}, run_values) == {
        "scale": 2,
        "max_completion_length": 100,
    }
    given = {"scale": 2, "max_completion_length": 3}
    assert settings_of("settled", given, run_values) == given


def test_settings_of_a_function_are_passed_in_every_call():
    def over(completions, limit=5, **columns):
        return [float(len(text) > limit) for text in completions]

    orms["over"] = over
    group = group_of("abc", limit="a column of this name")
    assert RewardFunctions(["over"], params={"over": {"limit": 2}}).score(group)[0].total == 1.0


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"scale": 1, "ofset": 1}, r"sets ofset for 'settled'.*Did you mean 'offset'.*scale, off"),
        (
            {"scale": "1e-3x"},
            r"sets scale = '1e-3x' for 'settled', which is a text, and a number is",
        ),
        ({}, r"'settled' needs scale: set it with reward.reward_params, {settled: {scale: VALUE}}"),
    ],
)
def test_settings_that_do_not_fit_name_the_parameters(params, message):
    orms["settled"] = Settled
    with pytest.raises(ValueError, match=message):
        settings_of("settled", params, {})


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("strict", "true or false"),
        ("loose", "true or false"),
        ("limit", "a number"),
        ("either", None),
        ("name", None),
    ],
)
def test_a_text_is_not_taken_for_true_or_a_number(setting, wanted):
    def asks(completions, strict=False, loose: bool | None = None, limit: "float | None" = None,
             either: bool | str = True, name="a", **columns):  # fmt: skip
        return [0.0] * len(completions)

    orms["asks"] = asks
    if wanted is None:
        assert settings_of("asks", {setting: "no"}, {}) == {setting: "no"}
        return
    with pytest.raises(ValueError, match=f"{setting} = 'no' for 'asks'.*{wanted} is wanted"):
        settings_of("asks", {setting: "no"}, {})


def test_a_class_without_parameters_takes_none():
    with pytest.raises(ValueError, match="It has: none"):
        settings_of("countdown", {"strict": True}, {})


def test_a_class_of_ms_swift_finds_its_settings_in_args():
    class Cosine(ORM):
        def __init__(self, args=None, accuracy_orm=None):
            super().__init__(args)
            self.max_len = args.cosine_max_len

        def __call__(self, completions, **kwargs):
            return [self.max_len for _ in completions]

    orms["cosine_of_swift"] = Cosine
    params = {"cosine_of_swift": {"cosine_max_len": 9}}
    assert RewardFunctions(["cosine_of_swift"], params=params).score(group_of("a"))[0].total == 9
    with pytest.raises(RewardError, match=r"set it with reward.reward_params, {cosine_of_"):
        RewardFunctions(["cosine_of_swift"])


def test_a_class_that_cannot_be_made_is_reported_with_its_settings():
    class Broken(ORM):
        def __init__(self, path: str):
            Path(path).read_text()

    orms["broken"] = Broken
    with pytest.raises(RewardError, match=r"Broken\(path='no such'\) raised FileNotFoundError"):
        RewardFunctions(["broken"], params={"broken": {"path": "no such"}})


def test_a_dataset_cannot_replace_the_systems_arguments():
    group = group_of("a", "b")
    columns = {"finish_reasons": "dataset"}
    group = replace(group, prompt=replace(group.prompt, columns=columns))
    orms["reasons"] = lambda completions, finish_reasons, **columns: [
        float(reason == "length") for reason in finish_reasons
    ]
    assert [r.total for r in RewardFunctions(["reasons"]).score(group)] == [1.0, 1.0]
