"""Bad rows of supervised training stop a run before Ray starts, with row and value."""

import pytest
from answer_templates import TEMPLATES, tokenizer_of, unmarked
from config_cases import write_run
from data_cases import write_jsonl

from rlsys.config import SftConfig
from rlsys.preflight.before_sft import load_sample_data
from rlsys.preflight.sft import sample_file_problems

UPPER = "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}</s>{% endfor %}"
CHATML = unmarked(TEMPLATES["chatml"])
GOOD = {"query": "a", "response": "b"}


@pytest.fixture
def config(tmp_path):
    """A config with these rows, whose model has a real tokenizer with this template."""
    write_run(tmp_path)

    def made(rows, template=CHATML, **sft):
        tokenizer_of(template).save_pretrained(tmp_path / "model")
        source = write_jsonl(tmp_path / "rows.jsonl", rows)
        return SftConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=1,
            data={"dataset": [source], "max_length": 128},
            model={"path": str(tmp_path / "model")},
            policy={"global_batch_size": 2},
            sft=sft,
        )

    return made


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([GOOD, {"query": "a"}], "line 2: has no turn of the assistant to train on"),
        ([GOOD, {"query": "a", "response": ""}], "line 2: the column 'response' is empty"),
        ([GOOD, {"messages": "x"}], "line 2: the column 'messages' is a text"),
        ([GOOD, {"query": "a", "response": "{{AUTHOR}}"}], "line 2: has the placeholder"),
    ],
)
def test_rows_that_cannot_be_trained_on(config, rows, says):
    with pytest.raises(ValueError, match=says):
        load_sample_data(config(rows))
    assert any(says in problem.text for problem in sample_file_problems(config(rows)))


def test_a_template_that_is_not_exact(config):
    with pytest.raises(ValueError, match=r"line 1: the chat template does not show exactly what"):
        load_sample_data(config([GOOD], UPPER))


def test_what_a_run_says_of_its_samples(config, capsys):
    load_sample_data(config([GOOD, {"query": "c", "response": "d", "level": 3}]))
    said = capsys.readouterr().out
    assert "rows.jsonl: 2 of 2 rows used" in said
    assert "the column 'level' is not read" in said
    assert "note: what is trained on ends with '<|im_end|>'" in said


def test_texts_need_no_chat_template(config):
    rows = [{"text": "a " * 200}]
    data = load_sample_data(config(rows, UPPER, objective="pretrain"))
    assert len(data.train) == 4
