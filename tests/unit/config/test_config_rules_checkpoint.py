"""Which checkpoint is the best, and when it has a value to be compared by."""

import pytest
from config_cases import write_config

from rlsys.config import CheckpointConfig
from rlsys.config.load import load_config
from rlsys.problems import ProblemsError

EVALUATED = ["--data.val_dataset", "held_out.jsonl", "--eval_steps", "2"]
LOSS = ["--checkpoint.metric_for_best_model", "eval/loss"]


def load(tmp_path, *words):
    return load_config(write_config(tmp_path), list(words)).config.checkpoint


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--checkpoint.load_best_model_at_end"], "needs checkpoint.metric_for_best_model"),
        (["--checkpoint.resume", "best"], "checkpoint.resume = best needs"),
        (["--checkpoint.greater_is_better", "true"], "says what the best is"),
        (LOSS, "eval_steps is null: set eval_steps"),
        ([*LOSS, *EVALUATED, "--checkpoint.save_steps", "3"], "not a multiple of eval_steps = 2"),
        ([*LOSS, *EVALUATED, "--checkpoint.save_steps", "null"], "writes none"),
        (
            ["--checkpoint.save_steps", "null", "--checkpoint.save_retain_interval", "5"],
            "leave save_retain_interval out",
        ),
        (
            [
                *("--policy.on_nonfinite", "rollback", "--policy.snapshot_steps", "0"),
                *("--checkpoint.save_steps", "null"),
            ],
            "rollback goes back to a snapshot or a checkpoint, and the run keeps neither",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, words, says):
    with pytest.raises(ProblemsError) as error:
        load(tmp_path, *words)
    assert says in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        [*LOSS, *EVALUATED, "--checkpoint.save_steps", "4"],
        [*LOSS, *EVALUATED, "--checkpoint.load_best_model_at_end"],
        ["--checkpoint.metric_for_best_model", "reward", "--checkpoint.resume", "best"],
    ],
)
def test_what_fits_is_taken(tmp_path, words):
    assert load(tmp_path, *words).best_metric is not None


@pytest.mark.parametrize(
    ("word", "value"),
    [("true", True), ("false", False), ("newest", "newest"), ("40", 40), ("1", 1)],
)
def test_resume_takes_a_step_or_a_word(tmp_path, word, value):
    found = load(tmp_path, "--checkpoint.resume", word).resume
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("word", ["latest", "-3"])
def test_resume_refuses_other_words(tmp_path, word):
    with pytest.raises(ProblemsError, match=r"checkpoint\.resume"):
        load(tmp_path, "--checkpoint.resume", word)


@pytest.mark.parametrize(("eval_steps", "interval"), [(None, 5), (2, 6), (5, 5), (30, 30)])
def test_auto_saves_after_evaluations_where_one_decides(eval_steps, interval):
    config = CheckpointConfig(metric_for_best_model="eval_loss")
    assert config.interval(100, eval_steps) == interval
    assert CheckpointConfig().interval(100, eval_steps) == 5
