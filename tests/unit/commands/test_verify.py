"""`rlsys verify`: a run is as recorded, and whoever changes a digit of it is found."""

from __future__ import annotations

import json
import shutil

import pytest
from verify_cases import STEPS, G, edit_line, write_verified_run

from rlsys.cli import main


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_verified_run(tmp_path_factory.mktemp("verified"))


@pytest.fixture
def run(original):
    """The run, which a test may change; it is put back afterwards."""
    folder = original.path.parent
    kept = folder.with_name("kept")
    shutil.copytree(folder, kept)
    yield original
    shutil.rmtree(folder)
    kept.rename(folder)


def verify(run, capsys, *words):
    code = main(["verify", str(run.path), *words])
    return code, capsys.readouterr().out


def different(run, capsys, *words):
    """What differs, of a run that has to differ."""
    code, out = verify(run, capsys, *words)
    assert code == 1, out
    [line] = [line for line in out.splitlines() if line.startswith("DIFFERENT")]
    return line


def test_a_run_verifies_and_says_what_was_checked(original, capsys):
    code, out = verify(original, capsys)
    assert code == 0, out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    total = STEPS * 2 * G
    for expected in (
        "ok config files 1 of 1 by size and SHA-256",
        "ok data files 2 of 2 by size and SHA-256",
        f"ok steps {STEPS} follow each other, each once",
        "ok evaluations 3 at the steps of eval_steps",
        f"ok completions {total}, each once, of {STEPS} steps",
        f"ok versions and staleness {total} of {total} completions",
        f"ok total rewards {total} of {total} from the rewards by name",
        f"ok advantages {total} of {total}",
        f"ok scores {total + 9} of {total + 9} completions again by countdown, format",
        "ok checkpoints 1 of 1, every byte",
    ):
        assert expected in lines, out
    assert any(line.startswith("not checked 3 other metrics grad_norm") for line in lines), out


def test_a_sample_is_scored_and_the_rest_is_counted(original, capsys):
    _, out = verify(original, capsys, "--sample", "8")
    assert "16 of 41 completions again by countdown, format" in " ".join(out.split())
    code = main(["verify", str(original.path), "--sample", "some"])
    assert code == 2


def set_to(**values):
    return lambda row: row | values


def change_reward(row):
    rewards = {"countdown": 1.0 - row["rewards"]["countdown"], "format": row["rewards"]["format"]}
    return row | {"rewards": rewards, "reward": rewards["countdown"] + 0.3 * rewards["format"]}


TAMPERINGS = [
    # file, line, change, words of the difference
    ("completions", 3, set_to(reward=0.31), ["line 3, reward", "0.31"]),
    ("completions", 3, change_reward, ["advantage"]),
    ("completions", 5, lambda row: row | {"advantage": row["advantage"] + 1e-4}, ["line 5, adv"]),
    ("completions", 9, set_to(policy_versions=[3]), ["line 9, policy_versions", "[3]", "[1]"]),
    ("completions", 9, set_to(policy_versions=[]), ["line 9, policy_versions"]),
    ("completions", 7, lambda row: None, ["completions of group", "recorded 3, expected 4"]),
    ("completions", 7, set_to(num_tokens=9), ["metrics.jsonl, line 2", "from completions"]),
    ("completions", 7, set_to(finish_reason="length"), ["completions/"]),
    ("completions", 2, set_to(prompt="Make 8 of 1."), ["line 2, prompt"]),
    ("completions", 4, set_to(prompt_id="train:99"), ["line 4, prompt_id"]),
    ("eval_completions", 2, set_to(policy_versions=[1]), ["line 2, policy_versions"]),
    ("eval_completions", 2, set_to(reward=0.11), ["line 2, reward"]),
    ("eval_completions", 2, lambda row: None, ["metrics.jsonl, line 1", "from eval_completions"]),
    ("metrics", 2, lambda row: None, ["line 2, step: recorded 2, expected 1"]),
    ("metrics", 2, set_to(reward=0.123), ["metrics.jsonl, line 2, reward", "0.123"]),
    ("metrics", 1, lambda row: row | {"eval/reward": row["eval/reward"] + 0.1}, ["eval/reward"]),
    ("metrics", 2, set_to(policy_version=7), ["line 2, policy_version: recorded 7"]),
    ("metrics", 3, set_to(**{"staleness/mean": 0.5}), ["staleness/mean: recorded 0.5"]),
    ("metrics", 7, lambda row: None, ["evaluations after step 4: recorded 0, expected 1"]),
    ("metrics", 6, lambda row: None, ["last step: recorded 3, expected 4"]),
]


@pytest.mark.parametrize(("file", "number", "change", "words"), TAMPERINGS)
def test_whoever_changes_a_digit_is_found(run, capsys, file, number, change, words):
    edit_line(getattr(run, file), number, change)
    line = different(run, capsys)
    for word in words:
        assert word in line, line


def test_a_score_that_the_functions_do_not_give_is_found(run, capsys):
    """All that follows from it was changed as well: only scoring again shows it."""
    text = run.completions.read_text()
    run.completions.write_text(text.replace("I do not know", "I know it all"))
    code, out = verify(run, capsys)
    assert code == 0, out  # another text without an answer has the same rewards
    run.completions.write_text(text.replace("<answer>1 + 2", "<answer>2 + 2"))
    assert "rewards.countdown: recorded 1, expected 0 (scored again)" in different(run, capsys)


def test_a_step_or_a_completion_that_is_there_twice_is_found(run, capsys):
    lines = run.completions.read_text().splitlines(keepends=True)
    run.completions.write_text("".join([*lines[:2], lines[1], *lines[2:]]))
    assert "completions.jsonl, line 3, group_id, index" in different(run, capsys)
    run.completions.write_text("".join(lines))
    rows = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("".join([*rows[:3], rows[2], *rows[3:]]))
    assert "metrics.jsonl, line 4, step: recorded 2" in different(run, capsys)


@pytest.mark.parametrize("name", ["train.jsonl", "validation.jsonl"])
def test_a_changed_row_of_data_is_found(run, capsys, name):
    path = run.path.parent / name
    path.write_text(path.read_text().replace('"nums": [1', '"nums": [3'))
    line = different(run, capsys)
    assert f"{name}, data: recorded SHA-256" in line
    assert "inputs.jsonl" in line


def test_a_changed_row_of_data_is_found_without_sums(run, capsys):
    run.inputs.unlink()
    path = run.path.parent / "train.jsonl"
    path.write_text(path.read_text().replace("Make ", "Form "))
    code, out = verify(run, capsys)
    assert "not checked  config and data files" in out
    assert (code, "prompt: recorded Make " in out) == (1, True), out


def test_a_changed_config_is_found(run, capsys):
    run.config.write_text(run.config.read_text().replace("beta: 0.0", "beta: 0.1"))
    assert "config.yaml, config: recorded" in different(run, capsys)


def test_a_changed_model_or_checkpoint_is_found(run, capsys):
    weights = run.checkpoints / f"step-{STEPS}/weights"
    weights.write_text("weighty")
    assert "other bytes than were written" in different(run, capsys)
    with (run.path.parent / "model/model.safetensors").open("r+b") as file:
        file.seek(2000)
        file.write(b"1")
    assert "model.safetensors, model" in different(run, capsys)


def test_a_run_that_was_moved_verifies(run, capsys, tmp_path):
    moved = shutil.copytree(run.path, tmp_path / "elsewhere")
    code = main(["verify", str(moved)])
    assert code == 0, capsys.readouterr().out


def test_a_run_that_was_killed_in_a_step_is_read_up_to_it(run, capsys):
    run.ended.unlink()
    rows = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("".join(rows[:5]) + rows[5][:30])
    lines = run.completions.read_text().splitlines(keepends=True)
    run.completions.write_text("".join(lines[:-2]) + lines[-1][:10])
    code, out = verify(run, capsys)
    assert code == 0, out
    assert "3 follow each other" in out


def test_a_run_of_an_older_version_is_read_as_far_as_possible(run, capsys):
    """It has no inputs, no failures, and a field that this version does not know."""
    run.inputs.unlink()
    lines = [json.loads(line) for line in run.completions.read_text().splitlines()]
    for row in lines:
        del row["failures"], row["version_starts"]
    run.completions.write_text("".join(json.dumps(row) + "\n" for row in lines))
    code, out = verify(run, capsys)
    assert code == 0, out
    run.config.write_text(run.config.read_text() + "forgotten: 1\n")
    code, out = verify(run, capsys)
    assert code == 0, out
    assert "this version of rlsys cannot read it" in out
    assert f"{STEPS} follow each other, each once" in out


PLUGIN = '''
"""A reward that nobody can give twice."""

import random

from rlsys.rewards import register_reward


@register_reward("dice")
def dice(completions, **columns):
    return [random.random() for _ in completions]
'''


def test_a_random_reward_is_named_and_not_failed(tmp_path, capsys):
    plugin = tmp_path / "dice.py"
    plugin.write_text(PLUGIN)
    rewards = {
        "reward_funcs": ["countdown", "dice"],
        "reward_weights": None,
        "external_plugins": [str(plugin)],
    }
    run = write_verified_run(tmp_path, steps=2, reward=rewards)
    code, out = verify(run, capsys)
    assert code == 0, out
    assert "not checked  scores of dice" in out
    assert "again by countdown" in out
    assert "plugin files" in out
    plugin.write_text(PLUGIN + "\n")
    assert "dice.py, plugin" in different(run, capsys)


@pytest.mark.parametrize(
    "grpo", [{"scale_rewards": "batch"}, {"advantage_estimator": "reinforce_plus_plus"}]
)
def test_advantages_of_whole_batches_are_checked_by_their_metrics(tmp_path, capsys, grpo):
    run = write_verified_run(tmp_path, steps=2, grpo=grpo)
    code, out = verify(run, capsys)
    assert code == 0, out
    assert "not checked  advantages of completions" in out
    edit_line(run.metrics, 2, lambda row: row | {"advantages/abs_max": 9.0})
    assert "advantages/abs_max: recorded 9" in different(run, capsys)


def test_another_folder_is_refused(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 2
    assert "is not the output directory of a run" in capsys.readouterr().err
