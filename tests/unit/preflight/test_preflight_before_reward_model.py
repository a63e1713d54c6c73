"""What `rlsys reward-model` says of its rows before Ray starts."""

import json

import pytest
from answer_templates import TEMPLATES, tokenizer_of, unmarked
from config_cases import write_run
from data_cases import assistant, user, write_jsonl

from rlsys.config import RewardModelConfig
from rlsys.preflight.before_reward_model import fit_to_rows, load_score_data

PAIR = {"prompt": user("a"), "chosen": assistant("b"), "rejected": assistant("c")}


@pytest.fixture
def config(tmp_path):
    """A config with these rows, whose model has a real tokenizer."""
    write_run(tmp_path)
    tokenizer_of(unmarked(TEMPLATES["chatml"])).save_pretrained(tmp_path / "model")

    def made(rows, **section):
        return RewardModelConfig(
            output_dir=str(tmp_path / "run"),
            num_train_epochs=2,
            data={"dataset": [write_jsonl(tmp_path / "rows.jsonl", rows)], "max_length": 128},
            model={"path": str(tmp_path / "model")},
            policy={"global_batch_size": 2},
            reward_model=section,
        )

    return made


def test_pairs_and_a_new_head_are_counted(config, capsys):
    made = config([PAIR | {"rejected": assistant(f"c{n}")} for n in range(3)])
    data = load_score_data(made)
    text = capsys.readouterr().out
    assert "data: 3 pairs, " in text
    assert "has no score head: a new one starts with random numbers" in text
    assert fit_to_rows(made, data).num_steps == 3


def test_classes_are_counted_and_missing_ones_named(config, capsys):
    kind = {"problem_type": "single_label_classification", "label_names": ["a", "b", "c"]}
    load_score_data(config([{"text": f"x{n}", "label": n % 2} for n in range(5)], **kind))
    text = capsys.readouterr().out
    assert "data: rows of each class: a 3, b 2, c 0" in text
    assert "note: no row to train on has the class c" in text
    several = {"problem_type": "multi_label_classification", "num_labels": 2}
    load_score_data(config([{"text": f"x{n}", "label": [0, 1][:n]} for n in range(3)], **several))
    assert "data: rows of each class: 0 2, 1 1" in capsys.readouterr().out


def test_too_few_rows_and_no_pad_token_are_refused(config, tmp_path):
    with pytest.raises(ValueError, match="has 1 pair to train on, and a step takes 2"):
        load_score_data(config([PAIR]))
    file = tmp_path / "model/tokenizer_config.json"
    values = json.loads(file.read_text())
    values |= {"pad_token": None, "eos_token": None}
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="has neither a pad token nor EOS"):
        load_score_data(config([PAIR, PAIR]))
