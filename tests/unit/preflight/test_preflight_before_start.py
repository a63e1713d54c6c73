"""What a run says of its length, its right answers and its GPUs before anything starts."""

import pytest
from config_cases import values, write_run, write_sft_run
from data_cases import chat_tokenizer, write_jsonl

from rlsys.config import Config, SftConfig
from rlsys.config.load import load_config_as
from rlsys.preflight.before_start import check_right_answers, load_checked_prompts, step_notes
from rlsys.preflight.memory import memory_warnings


@pytest.mark.parametrize(
    ("fields", "notes"),
    [
        ({"max_steps": 10}, []),
        ({"max_steps": 10, "num_train_epochs": 2}, []),  # as a finished run saves it
        (
            {"max_steps": None, "num_train_epochs": 2},
            ["num_train_epochs 2 x 20 prompts / 4 per step = 10 steps"],
        ),
        (
            {"max_steps": 3, "num_train_epochs": 2},
            [
                "note: max_steps = 3 overrides num_train_epochs 2 x 20 prompts / 4 per step = "
                "10 steps"
            ],
        ),
    ],
)
def test_a_run_says_what_its_epochs_come_to(fields, notes):
    assert list(step_notes(Config.model_validate(values(**fields)), 20)) == notes


PROSE = "See Figure 4. The slope is minus two."


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_a_right_answer_are_counted_before_the_run(tmp_path, capsys, streaming):
    rows = [{"prompt": "a", "solution": "4"}, {"prompt": "b", "solution": PROSE}]
    source = write_jsonl(tmp_path / "a.jsonl", rows * 4)
    tokenizer = chat_tokenizer("{{ messages[0]['content'] }}")
    data = {"dataset": [source], "streaming": streaming}

    def check(**reward):
        reward = {"reward_funcs": ["exact_match"]} | reward
        config = Config.model_validate(values(data=data, reward=reward))
        check_right_answers(config, load_checked_prompts(config, tokenizer), tokenizer)
        return capsys.readouterr().out

    assert "warning: exact_match finds no right answer in 4 of 8 rows (first: " in check()
    write_jsonl(tmp_path / "a.jsonl", rows[1:] * 4)
    with pytest.raises(ValueError, match=r"no right answer in 4 of 4 rows.*\\boxed"):
        check()
    assert "warning: exact_match finds no right answer in 4 of 4 rows" in check(on_error="zero")
    write_jsonl(tmp_path / "a.jsonl", rows[:1])
    assert check() == ""


@pytest.mark.parametrize(("schema", "write"), [(Config, write_run), (SftConfig, write_sft_run)])
def test_a_gpu_that_is_too_small_is_a_warning_at_the_start(tmp_path, monkeypatch, schema, write):
    config = load_config_as(schema, write(tmp_path)).config
    monkeypatch.setattr("rlsys.preflight.memory.gpu_memory_gib", lambda: 1.0)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert any("GPU of the policy" in text for text in memory_warnings(config, "cuda"))
    assert memory_warnings(config, "cpu") == []
    monkeypatch.setattr("rlsys.preflight.memory.gpu_memory_gib", lambda: 80.0)
    assert memory_warnings(config, "cuda") == []
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # whose GPUs nobody sees from here
    monkeypatch.setattr("rlsys.preflight.memory.gpu_memory_gib", lambda: 1.0)
    assert memory_warnings(config, "cuda") == []
