"""Evaluations: what is sampled, and what the scored groups say."""

import itertools
import json
import math

import pytest
from config_cases import values
from data_cases import word_tokenizer

from rlsys.config import Config, DataConfig
from rlsys.data import load_prompts
from rlsys.rollout.draws import sampling_seed
from rlsys.rollout.evaluation import Evaluation, metrics_of_sets
from rlsys.types import Completion, Prompt, RewardOutput, RolloutGroup


def config(**evaluation):
    return Config.model_validate(
        values(
            data={"val_dataset": ["held_out.jsonl"]},
            rollout={"temperature": 0.7, "top_p": 0.9},
            reward={"reward_funcs": ["format", "accuracy"]},
            eval=evaluation,
        )
    )


def prompts(size):
    return [Prompt(f"p{i}", [{"role": "user", "content": "?"}], [1, 2]) for i in range(size)]


def group(texts, accuracy, number=0, opens_think=False):
    """A scored group: accuracy as given, format 1."""
    prompt = Prompt(f"p{number}", [], [1], opens_think=opens_think)
    completions = [Completion([5, 6], [0.0, 0.0], text, "stop", (3,)) for text in texts]
    rewards = [RewardOutput(1 + a, {"format": 1.0, "accuracy": a}) for a in accuracy]
    return RolloutGroup(number, prompt, completions, rewards, number)


# --- what is sampled -----------------------------------------------------------------------------


def test_by_default_a_held_out_prompt_is_sampled_once_as_in_training():
    evaluation = Evaluation(config(), {"": prompts(2)}, itertools.count(7))
    first, second = evaluation.requests()
    assert (first.ticket, second.ticket) == (7, 8)
    assert (first.num_generations, first.temperature, first.top_p, first.top_k) == (
        *(1, 0.7, None, None),
    )
    assert [first.seed, second.seed] == [sampling_seed(42, 0, 0), sampling_seed(42, 0, 1)]


def test_the_sampling_of_an_evaluation_is_its_own():
    own = config(num_generations=4, temperature=0.2, top_p=0.5, top_k=3)
    [request] = Evaluation(own, {"": prompts(1)}, itertools.count()).requests()
    assert request.num_generations == 4
    assert (request.temperature, request.top_p, request.top_k) == (0.2, 0.5, 3)
    [greedy] = Evaluation(config(temperature=0), {"": prompts(1)}, itertools.count()).requests()
    assert greedy.temperature == 0


def test_the_seeds_of_a_set_do_not_depend_on_the_other_sets():
    def seeds(sets):
        evaluation = Evaluation(config(), sets, itertools.count())
        return {r.prompt.prompt_id: r.seed for r in evaluation.requests()}

    one, two = prompts(2), [Prompt("q0", [], [1])]
    both = seeds({"": [], "one": one, "two": two})
    assert both == seeds({"two": two}) | seeds({"one": one})
    assert len(set(both.values())) == 3


def test_groups_come_back_by_set_and_are_numbered_through():
    evaluation = Evaluation(config(), {"a": prompts(1), "b": prompts(2)}, itertools.count())
    taken = [evaluation.take(group(["x"], [1.0], ticket)) for ticket in (2, 0, 1)]
    assert [one.group_id for one in taken] == [2, 0, 1]
    assert evaluation.take(group(["x"], [1.0], 9)) is None
    assert evaluation.done == evaluation.total == 3
    found = evaluation.groups()
    assert {name: [g.ticket for g in groups] for name, groups in found.items()} == {
        "a": [0],
        "b": [1, 2],
    }


# --- what it says --------------------------------------------------------------------------------

GROUPS = [
    group([r"\boxed{4}", r"\boxed{ 4 }", r"\boxed{5}"], [1.0, 1.0, 0.0], 0),
    group([r"\boxed{4}", r"\boxed{5}", r"\boxed{5}"], [1.0, 0.0, 0.0], 1),
    group(["none", "at", "all"], [0.0, 0.0, 0.0], 2),
]


def test_with_one_completion_no_name_is_new():
    metrics = metrics_of_sets(config(), {"": [group(["x"], [1.0])]})
    assert metrics["eval/rewards/accuracy/mean"] == 1.0
    assert not [name for name in metrics if "@" in name or "stderr" in name]


def test_pass_at_k_means_and_votes():
    metrics = metrics_of_sets(config(num_generations=3), {"": GROUPS})
    assert metrics["eval/pass@1"] == pytest.approx((2 / 3 + 1 / 3) / 3)
    assert metrics["eval/pass@2"] == pytest.approx((1 + 2 / 3) / 3)
    assert metrics["eval/pass@3"] == pytest.approx(2 / 3)
    assert metrics["eval/mean@3"] == pytest.approx(metrics["eval/rewards/accuracy/mean"])
    assert metrics["eval/maj@3"] == pytest.approx(1 / 3)
    assert metrics["eval/rewards/format_stderr"] == 0.0
    assert metrics["eval/rewards/accuracy_stderr"] == pytest.approx(
        math.sqrt(((1 / 3) ** 2 + (1 / 3) ** 2) / 2 / 3)
    )


def test_sets_have_names_of_their_own():
    metrics = metrics_of_sets(config(num_generations=3), {"": GROUPS[:1], "aime": GROUPS[1:]})
    assert metrics["eval/pass@3"] == 1.0
    assert metrics["eval/aime/pass@3"] == 0.5
    assert metrics["eval/aime/reward"] == pytest.approx(1 + 1 / 6)
    assert all(name.startswith("eval/") for name in metrics)


@pytest.mark.parametrize(
    ("correct", "ks", "expected"),
    [
        ("accuracy >= 0.5", [2], {"eval/pass@2": 1.0}),
        ("accuracy", [2], {"eval/pass@2": 0.0}),
        ("format", [1], {"eval/pass@1": 1.0}),
    ],
)
def test_what_counts_as_correct(correct, ks, expected):
    own = config(num_generations=2, correct=correct, pass_at_k=ks)
    metrics = metrics_of_sets(own, {"": [group(["a", "b"], [0.5, 0.6])]})
    assert {name: v for name, v in metrics.items() if "pass@" in name} == expected
    assert "eval/maj@2" not in metrics  # nothing is marked as an answer


def test_completions_to_which_the_function_does_not_apply_do_not_count():
    groups = [group(["a", "b"], [1.0, math.nan]), group(["a", "b"], [math.nan, math.nan], 1)]
    metrics = metrics_of_sets(config(num_generations=2), {"": groups})
    assert metrics["eval/pass@1"] == 1.0
    assert math.isnan(metrics["eval/pass@2"])  # no prompt has two completions that count


def test_an_answer_within_unclosed_thoughts_does_not_vote():
    texts = [r"\boxed{1}", r"\boxed{1}", r"so</think> \boxed{2}"]
    groups = [group(texts, [0.0, 0.0, 1.0], opens_think=True)]
    assert metrics_of_sets(config(num_generations=3), {"": groups})["eval/maj@3"] == 1.0


def test_several_weight_versions_are_an_error():
    evaluation = Evaluation(config(), {"": prompts(2)}, itertools.count())
    evaluation.take(group(["x"], [1.0], 0))
    other = group(["x"], [1.0], 1)
    other.completions[0] = Completion([5], [0.0], "x", "stop", (4,))
    evaluation.take(other)
    with pytest.raises(RuntimeError, match="several weight versions"):
        evaluation.groups()


# --- sets ----------------------------------------------------------------------------------------


def test_sets_are_read_apart_with_ids_of_their_own(tmp_path):
    for folder, texts in (("train", "abc"), ("one", "cde"), ("two", "f")):
        (tmp_path / folder).mkdir()
        rows = "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
        (tmp_path / folder / "test.jsonl").write_text(rows)
    paths = {name: str(tmp_path / name / "test.jsonl") for name in ("train", "one", "two")}
    sets = {"one": paths["one"], "two": [paths["two"]]}
    own = DataConfig(dataset=[paths["train"]], val_sets=sets, max_eval_prompts=2)
    data = load_prompts(own, word_tokenizer(), seed=0)
    ids = {name: [p.prompt_id for p in found] for name, found in data.held_out_sets.items()}
    assert ids == {"one": ["one/test:1", "one/test:2"], "two": ["two/test:1"]}
    assert data.num_validation_in_train == 1
    assert len(data.train) == 3
