"""The one error for everything that is wrong."""

import pickle

import pytest

from rlsys.problems import Problem, ProblemsError, RunFailed
from rlsys.text import counted, near_multiples


def test_every_problem_has_a_bullet_and_its_other_lines_are_below_it():
    problems = [Problem("policy.lr: is missing"), Problem("plugin.py:\n\n  line 3")]
    error = ProblemsError("run.yaml", problems, note="See docs.")
    assert str(error).splitlines() == [
        "run.yaml has 2 problems:",
        "  - policy.lr: is missing",
        "  - plugin.py:",
        "",
        "      line 3",
        "See docs.",
    ]
    assert error.problems == problems


def test_problems_that_are_only_counted_are_in_the_number():
    text = str(ProblemsError("the data", [Problem("a.jsonl, line 1")], num_more=1499))
    assert text == "the data has 1,500 problems:\n  - a.jsonl, line 1\n  ... and 1,499 more"
    assert str(ProblemsError("x", [Problem("y")])) == "x has 1 problem:\n  - y"


def test_users_mistakes_are_value_errors_and_failed_runs_are_not():
    assert issubclass(ProblemsError, ValueError)
    assert not issubclass(RunFailed, ValueError)


@pytest.mark.parametrize("error", [ProblemsError("m", [Problem("y")], 2, "z"), RunFailed("rank 3")])
def test_errors_come_whole_from_another_process(error):
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), str(error))


def test_numbers_in_messages():
    assert [counted(n, "row") for n in (0, 1, 1200)] == ["0 rows", "1 row", "1,200 rows"]
    assert near_multiples(30, 8) == "24 or 32"
    assert near_multiples(3, 8) == "8"
