"""All checks of preflight together."""


def test_a_run_that_has_everything_has_no_problems(problems):
    assert problems() == []


def test_all_problems_are_reported_at_once(problems, tmp_path):
    (tmp_path / "run").touch()
    found = problems(
        "--reward.reward_funcs",
        "nothing",
        "--model.path",
        "./nowhere",
        "--data.dataset",
        "nowhere.jsonl",
    )
    assert len(found) == 4
