"""What `rlsys preference` says of its rows before Ray starts."""

import pytest
from answer_templates import TEMPLATES, tokenizer_of, unmarked
from config_cases import write_run
from data_cases import write_jsonl

from rlsys.config import PreferenceConfig
from rlsys.preflight.before_preference import fit_to_preferences, load_preference_data

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
LABELLED = {"prompt": "a", "completion": "b", "label": True}


@pytest.fixture
def config(tmp_path):
    """A config with these rows, whose model has a real tokenizer."""
    write_run(tmp_path)
    tokenizer_of(unmarked(TEMPLATES["chatml"])).save_pretrained(tmp_path / "model")

    def made(rows, *, held_out=(), **sections):
        data = {"dataset": [write_jsonl(tmp_path / "rows.jsonl", rows)], "max_length": 128}
        if held_out:
            data["val_dataset"] = [write_jsonl(tmp_path / "held_out.jsonl", list(held_out))]
        values = {
            "output_dir": str(tmp_path / "run"),
            "num_train_epochs": 2,
            "data": data,
            "model": {"path": str(tmp_path / "model")},
            "policy": {"global_batch_size": 2},
        }
        return PreferenceConfig.model_validate(values | sections)

    return made


def test_pairs_are_counted(config, capsys):
    made = config([PAIR | {"rejected": f"c{n}"} for n in range(3)])
    data = load_preference_data(made)
    assert "data: 3 pairs, " in capsys.readouterr().out
    assert fit_to_preferences(made, data).num_steps == 3


def test_labels_are_counted_and_equal_ones_named(config, capsys):
    section = {"loss_type": "kto"}
    rows = [LABELLED | {"completion": f"b{n}", "label": n < 2} for n in range(3)]
    load_preference_data(config(rows, preference=section))
    text = capsys.readouterr().out
    assert "data: 2 desirable answers and 1 undesirable, " in text
    assert "nothing to tell apart" not in text
    load_preference_data(config(rows[:2], preference=section))
    text = capsys.readouterr().out
    assert "data: 2 desirable answers and 0 undesirable, " in text
    assert "All labels are the same, so there is nothing to tell apart" in text


def test_too_few_rows_are_refused(config):
    with pytest.raises(ValueError, match="has 1 row to train on, and a step takes 2"):
        load_preference_data(config([PAIR]))


def test_kto_needs_two_held_out_rows(config):
    rows = [LABELLED, LABELLED | {"completion": "c", "label": False}]
    held_out = [row | {"prompt": "d"} for row in rows]
    kto, others = {"loss_type": "kto"}, {"loss_type": "apo_zero_unpaired"}
    one = config(rows, eval_steps=1, held_out=held_out[:1], preference=kto)
    with pytest.raises(ValueError, match=r"held-out set has 1 row, and .*loss_type = kto"):
        load_preference_data(one)
    load_preference_data(one.model_copy(update={"eval_steps": None}))
    load_preference_data(config(rows, eval_steps=1, held_out=held_out[:1], preference=others))
    load_preference_data(config(rows, eval_steps=1, held_out=held_out, preference=kto))
