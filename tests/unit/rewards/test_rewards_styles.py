"""Reward functions as TRL, verl and others write them, called in a pool as a run does."""

import json
import math

import pytest

from rlsys.algo.rollout_metrics import logged_metrics
from rlsys.config import RewardConfig
from rlsys.rewards import RewardError, check_call, load_plugins, orms
from rlsys.rewards.base import TrainerState
from rlsys.rewards.logged import CallLog, Logged
from rlsys.rewards.pool.serve import RewardRunner, ScoreRequest, process_settings
from rlsys.tracking.completions import completion_rows
from rlsys.types import Completion, Prompt, RewardOutput, RolloutGroup


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch, forget_registrations):
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str) -> None:
    with open(name, "w") as file:
        file.write(text)


def run(name: str, texts: list[str], columns: dict | None = None, params: dict | None = None):
    """What a reward process makes of one call."""
    import asyncio

    from rlsys.rewards.scoring import is_async

    config = RewardConfig(reward_funcs=[name], reward_params={name: params or {}})
    runner = RewardRunner()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlsys.rewards.pool.serve.start_guard", lambda limit: None)
        assert runner.start(process_settings(config, {})) is None
    completions = [Completion([1, 2], [], text, "stop", (0,)) for text in texts]
    prompt = Prompt("p", [{"role": "user", "content": "a"}], [], columns or {})
    request = ScoreRequest(name, RolloutGroup(0, prompt, completions), TrainerState(3, 10), 5.0)
    return (
        asyncio.run(runner.score_async(request)) if is_async(orms[name]) else runner.score(request)
    )


VERL = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, bonus=0.0):
    assert data_source in (None, "math") and extra_info == {"i": 3}
    right = float(solution_str == ground_truth)
    return {"score": right + bonus, "acc": bool(right), "pred": solution_str}

def plain(data_source, solution_str, ground_truth, extra_info):
    return (solution_str == ground_truth, "more")

def batch(data_sources, solution_strs, ground_truths, extra_infos):
    return [float(a == b) for a, b in zip(solution_strs, ground_truths)]

async def later(solution_str, ground_truth, **kwargs):
    return {"score": float(solution_str == ground_truth), "length": len(solution_str)}

def no_score(solution_str, ground_truth, **kwargs):
    return {"reward": 1.0}
"""
ROW = {"reward_model": {"style": "rule", "ground_truth": "4"}, "extra_info": {"i": 3}}


@pytest.mark.parametrize("function", ["compute_score", "plain", "batch", "later"])
@pytest.mark.parametrize("row", [ROW | {"data_source": "math"}, {"ground_truth": "4"}])
def test_verls_compute_score(function, row):
    write("score.py", VERL)
    outcome = run(f"verl/score.py:{function}", ["4", "5"], {"extra_info": {"i": 3}} | row)
    assert outcome.values == [1.0, 0.0]


def test_what_verls_dictionary_has_besides_the_score_is_logged():
    write("score.py", VERL)
    outcome = run("verl/score.py:compute_score", ["4", "5"], ROW, {"bonus": 0.5})
    assert outcome.values == [1.5, 0.5]
    assert [logged.extra for logged in outcome.logged] == [
        {"acc": True, "pred": "4"},
        {"acc": False, "pred": "5"},
    ]
    assert [logged.metrics for logged in outcome.logged] == [{"acc": 0.5}] * 2
    failed = run("verl/score.py:no_score", ["4"], ROW)
    assert "the dictionary has no 'score', only reward" in failed.report


def test_rows_and_settings_of_verls_functions_are_checked_before_a_run():
    from rlsys.rewards.columns import row_check

    write("score.py", VERL)
    name = "verl/score.py:compute_score"
    problems = row_check([name], {}, {})
    assert problems(ROW) == problems({"ground_truth": 0}) == []
    assert "data.columns: {answer: ground_truth}" in problems({"answer": "4"})[0]
    check_call(name, {"bonus": 1.0}, {}, ["ground_truth"])
    with pytest.raises(ValueError, match=r"sets bonsu .*Did you mean 'bonus'"):
        check_call(name, {"bonsu": 1.0}, {}, ["ground_truth"])


@pytest.mark.parametrize(
    ("signature", "remedy"),
    [
        ("data_source, solution_str, ground_truth", "name it verl/foreign.py:f"),
        ("queries, prompts, labels", "OpenRLHF's signature: write def f(completions, solution"),
        ("args, sample, **kwargs", "slime's signature: write def f(completions, solution"),
        ("completions, environments, **kwargs", "environments are TRL's for tools"),
    ],
)
def test_another_projects_signature_gets_one_line(signature, remedy):
    write("foreign.py", f"def f({signature}):\n    return []\n")
    with pytest.raises(RewardError, match="cannot be called") as caught:
        check_call("foreign.py:f", {}, {}, ["ground_truth"])
    assert remedy in str(caught.value)


TRL = """
def logs(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **kwargs):
    texts = [completion[0]["content"] for completion in completions]
    for text in texts:
        log_extra("text_length", [len(text)])
    log_metric("mean_length", sum(map(len, texts)) / len(texts))
    log_metric("kl", 1.0)
    return [trainer_state.global_step / trainer_state.max_steps + len(i) for i in completion_ids]

def short(completions, **kwargs):
    if log_extra := kwargs.get("log_extra"):
        log_extra("once", [1])
    return [1.0] * len(completions)

def indexes(completions, **kwargs):
    return [float(completions[i][0]["content"] == "a") for i in range(len(completions))]

def zips(completions, prompts, **kwargs):
    scores = []
    for i, (c, p) in enumerate(zip(completions, prompts)):
        scores.append(float(c[-1]["content"] == p[0]["content"]))
    return scores

def gets(completions, **kwargs):
    return [float(c[0].get("content", "") == "a") for c in completions]

def hidden(completions, **kwargs):
    return [helper(c) for c in completions]

def hidden_get(completions, **kwargs):
    return [float(c[0].get("content") == "a") for c in map(list, completions)]

def helper(c):
    return float(c[0]["content"] == "a")

def texts(completions, prompts, messages, **kwargs):
    asked = [p[0]["content"] for p in prompts]
    return [float(c == a == m[0]["content"]) for c, a, m in zip(completions, asked, messages)]
"""


def test_what_trls_functions_log_is_in_metrics_and_completions():
    write("of_trl.py", TRL)
    outcome = run("trl/of_trl.py:logs", ["a", "abc"])
    assert outcome.values == [2.3, 2.3]
    expected = {"mean_length": 2.0, "kl": 1.0}
    assert outcome.logged == [Logged({"text_length": n}, expected) for n in (1, 3)]
    failed = run("trl/of_trl.py:short", ["a", "abc"])
    assert "log_extra('once', ...) got 1 value for 2 completions" in failed.report


@pytest.mark.parametrize("function", ["indexes", "zips", "gets", "texts"])
def test_a_function_that_takes_message_lists_gets_them_without_a_prefix(function):
    write("of_trl.py", TRL)
    for name in (f"of_trl.py:{function}", f"of_trl.{function}"):
        assert run(name, ["a", "b"]).values == [1.0, 0.0]


def test_an_error_of_message_lists_says_how_to_get_them():
    write("of_trl.py", TRL)
    for function in ("hidden", "hidden_get"):
        failed = run(f"of_trl.py:{function}", ["a"])
        assert f"name it trl/of_trl.py:{function}, or put @trl_style" in failed.report


def test_a_registered_function_may_have_a_prefix_too():
    write("of_trl.py", TRL + "\nfrom rlsys.rewards import orms\norms['my_hidden'] = hidden\n")
    load_plugins(["of_trl.py"])
    assert "name it trl/my_hidden" in run("my_hidden", ["a"]).report
    assert run("trl/my_hidden", ["a", "b"]).values == [1.0, 0.0]


def test_a_dotted_name_is_a_function_of_a_module():
    write("module_with_dot.py", "def f(completions, **kw):\n    return [2.0]\n")
    assert orms["module_with_dot.f"](["a"]) == [2.0]
    with pytest.raises(ValueError, match=r"module 'nowhere' is neither installed"):
        orms["nowhere.f"]
    with pytest.raises(ValueError, match=r"name a function in it, as module_with_dot.py:FUNCTION"):
        orms["module_with_dot.py"]
    with pytest.raises(ValueError, match=r"TRL's function of this name is trl/accuracy_reward"):
        orms["accuracy_reward"]


def test_the_trainers_state_says_what_it_has():
    with pytest.raises(AttributeError, match="has global_step and max_steps, not epoch"):
        TrainerState(1, 2).epoch  # noqa: B018


def test_logged_values_are_plain_and_fit_their_completions():
    import numpy as np
    import torch

    log = CallLog(2)
    log.log_extra("a", np.array([1.5, math.nan]))
    log.log_extra("b", [torch.tensor(3), {1, 2}])
    log.log_extra("c", [torch.ones(2), "x"])
    log.log_metric("m", torch.tensor(2.0))
    log.log_metric("m", 4)
    log.log_metric("m", math.nan)
    first, second = log.per_completion()
    assert first == Logged({"a": 1.5, "b": 3, "c": [1.0, 1.0]}, {"m": 3.0})
    assert second.extra == {"a": None, "b": "{1, 2}", "c": "x"}
    json.dumps([first.extra, second.extra])


def test_a_metric_does_not_hide_one_of_rlsys():
    rewards = [RewardOutput(1.0, {"f": 1.0}, metrics={"acc": n, "loss": 3.0}) for n in (0.0, 1.0)]
    rewards += [RewardOutput(1.0, {"f": 1.0})]
    groups = [RolloutGroup(0, Prompt("p", [], []), [], rewards)]
    assert logged_metrics(groups, beside={"loss": 1.0}) == {"acc": 0.5, "logged/loss": 3.0}


def test_columns_that_functions_log_stand_in_completions_jsonl():
    rewards = [RewardOutput(1.0, {"f": 1.0}, extra={"pred": "x", "text": "y"})]
    completion = Completion([1], [], "answer", "stop", (0,))
    prompt = Prompt("p", [{"role": "user", "content": "a"}], [])
    [row] = completion_rows(1, RolloutGroup(0, prompt, [completion], rewards), None)
    assert (row["text"], row["pred"], row["logged/text"]) == ("answer", "x", "y")
    assert row["extra_columns"] == ["pred", "logged/text"]
