"""The Countdown generator: every problem solvable, no problem in both splits."""

import ast
import importlib.util
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.rewards import orms

SCRIPT = Path(__file__).parents[2] / "examples" / "countdown" / "problems.py"
SPEC = importlib.util.spec_from_file_location("countdown_problems", SCRIPT)
problems = importlib.util.module_from_spec(SPEC)
sys.modules["countdown_problems"] = problems
SPEC.loader.exec_module(problems)


def keys(rows: list[dict]) -> list[tuple]:
    return [(*sorted(row["nums"]), row["target"]) for row in rows]


@given(
    seed=st.integers(0, 2**31),
    numbers=st.integers(3, 6),
    operations=st.sampled_from(["+", "+-", "+-*", "*/", "+-*/"]),
    held_out=st.booleans(),
)
@settings(max_examples=30)
def test_every_reference_solution_earns_the_full_reward(seed, numbers, operations, held_out):
    rows = problems.generate_problems(
        8,
        seed=seed,
        numbers=numbers,
        max_number=30,
        max_target=999,
        operations=operations,
        held_out=held_out,
    )
    responses = [row["response"] for row in rows]
    nums, targets = [row["nums"] for row in rows], [row["target"] for row in rows]
    assert orms["countdown"]()(responses, nums=nums, target=targets) == [1.0] * 8
    assert orms["format"]()(responses) == [1.0] * 8
    assert all(len(row["nums"]) == numbers and max(row["nums"]) <= 30 for row in rows)
    assert all(1 <= target <= 999 for target in targets)
    assert all(set(operations) >= set("+-*/") & set(r.split("<answer>")[1][:-9]) for r in responses)


@given(st.integers(0, 1000), st.integers(0, 1000))
@settings(max_examples=20)
def test_the_splits_share_no_problem_whatever_the_seeds(train_seed, validation_seed):
    train = problems.generate_problems(300, seed=train_seed)
    validation = problems.generate_problems(100, seed=validation_seed, held_out=True)
    assert not set(keys(train)) & set(keys(validation))


def test_problems_are_unique_in_any_order_unless_repetition_is_asked_for():
    rows = problems.generate_problems(2000, seed=1)
    assert len(set(keys(rows))) == 2000
    more = problems.generate_problems(12_000, seed=1, unique=False)
    assert len(set(keys(more))) < len(more) == 12_000
    assert not any(problems.is_held_out(row["nums"], row["target"]) for row in more)


def test_a_tenth_is_held_out_and_the_order_of_the_numbers_does_not_matter():
    verdicts = [problems.is_held_out([a, b, 7], a + b) for a in range(60) for b in range(60)]
    assert 0.08 < sum(verdicts) / len(verdicts) < 0.12
    assert {problems.is_held_out(nums, 22) for nums in ([6, 4, 12], [12, 6, 4], [4, 12, 6])} in (
        {True},
        {False},
    )


def test_the_same_arguments_give_the_same_problems():
    assert problems.generate_problems(50, seed=3) == problems.generate_problems(50, seed=3)
    assert problems.generate_problems(50, seed=3) != problems.generate_problems(50, seed=4)


def test_a_row_shows_what_the_model_is_asked_and_how_it_may_answer():
    [row] = problems.generate_problems(1, seed=1)
    [message] = row["messages"]
    assert message["role"] == "user"
    assert message["content"].startswith(
        f"Using the numbers {row['nums']}, create an equation that equals {row['target']}. "
    )
    thought = row["response"].split("</think>")[0].removeprefix("<think>")
    assert thought.split()[-1].endswith(f"={row['target']}")
    assert len(thought.split()) == 2


def test_more_problems_than_exist_is_an_error_and_not_an_endless_loop():
    with pytest.raises(ValueError, match=r"found only \d+ of 100000 problems.*Ask for fewer"):
        problems.generate_problems(100_000, seed=1)
    with pytest.raises(ValueError, match=r"found only 0 of 1 problems"):
        problems.generate_problems(1, seed=1, numbers=3, max_target=2, operations="+")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"numbers": 1}, "numbers must be 2 to 6, not 1"),
        ({"numbers": 7}, "numbers must be 2 to 6, not 7"),
        ({"operations": ""}, r"operations must be some of '\+-\*/', not ''"),
        ({"operations": "+^"}, r"not '\+\^'"),
        ({"max_target": 0}, "at least 1"),
        ({"n": 0}, "at least 1"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        problems.generate_problems(**{"n": 1, "seed": 0} | arguments)


def test_the_command_line_writes_both_files_with_the_data_columns_only(tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text("an older file")
    problems.main(["--out", str(tmp_path), "--train", "40", "--validation", "20", "--seed", "5"])
    assert "train.jsonl: 40 problems" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["train.jsonl", "validation.jsonl"]
    for name, n, held_out in (("train", 40, False), ("validation", 20, True)):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").open()]
        assert len(rows) == n
        for row in rows:
            assert list(row) == ["messages", "nums", "target"]
            assert problems.is_held_out(row["nums"], row["target"]) == held_out


def test_examples_begin_every_prompt_and_are_no_problem_of_either_file(tmp_path):
    problems.main(
        ["--out", str(tmp_path), "--train", "40", "--validation", "20", "--examples", "2"]
    )
    rows = [json.loads(line) for path in tmp_path.iterdir() for line in path.open()]
    assert len(rows) == 60
    shown = rows[0]["messages"][:4]
    assert [turn["role"] for turn in shown] == ["user", "assistant"] * 2
    asked = {row["messages"][4]["content"] for row in rows}
    assert len(asked) == 60
    assert not asked & {shown[0]["content"], shown[2]["content"]}
    assert all(row["messages"][:4] == shown and len(row["messages"]) == 5 for row in rows)
    assert orms["format"]()([shown[1]["content"], shown[3]["content"]]) == [1.0, 1.0]


def test_the_command_line_explains_what_is_impossible(tmp_path, capsys):
    with pytest.raises(SystemExit):
        problems.main(["--out", str(tmp_path), "--train", "100000"])
    assert "found only" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_solutions_are_conversations_that_end_with_a_right_answer(tmp_path):
    options = ["--out", str(tmp_path), "--train", "8", "--validation", "4", "--examples", "1"]
    assert problems.main([*options, "--solutions", "50"]) == 0
    lines = (tmp_path / "solutions.jsonl").read_text().splitlines()
    assert len(lines) == 50
    for line in lines:
        row = json.loads(line)
        assert list(row) == ["messages"]
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * 2
        question, answer = (message["content"] for message in row["messages"][-2:])
        nums = ast.literal_eval(question.partition("numbers ")[2].partition("]")[0] + "]")
        target = int(question.partition("equals ")[2].partition(".")[0])
        assert orms["countdown"]()([answer], nums=[nums], target=[target]) == [1.0]
        assert not problems.is_held_out(nums, target)
