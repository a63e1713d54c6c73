"""The examples' made-up data: right answers earn all of the reward, and cheap ones next to none."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from rlsys.config.load import load_config, load_config_as
from rlsys.config.method import schema_of
from rlsys.rewards import orms

pytestmark = pytest.mark.processes

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    path = EXAMPLES / name
    spec = importlib.util.spec_from_file_location(f"example_{name.replace('/', '_')}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(path.parent))
        spec.loader.exec_module(module)
    return module


GENERATORS = ["gsm8k/prepare.py", "json_schema/prepare.py", "code/prepare.py"]


@pytest.mark.parametrize("name", [*GENERATORS, "countdown/tasks_3to4.py", "sft/prepare.py"])
def test_made_up_data_repeats_with_its_seed_and_splits_do_not_meet(name):
    generate = load(name).generate
    train, held_out = generate(60, seed=3), generate(40, seed=3, held_out=True)
    assert train == generate(60, seed=3)
    assert train != generate(60, seed=4)
    texts = [row["messages"][0]["content"] for row in train + held_out]
    assert len(texts) == 100
    assert len(set(texts)) == 100


@pytest.mark.parametrize("name", [*GENERATORS, "countdown/tasks_3to4.py"])
def test_files_are_written_without_network(name, tmp_path, capsys):
    load(name).main(["--out", str(tmp_path), "--generate", "--train", "30", "--validation", "7"])
    assert "30" in capsys.readouterr().out
    for split, count in (("train", 30), ("validation", 7)):
        rows = [json.loads(line) for line in (tmp_path / f"{split}.jsonl").open()]
        assert len(rows) == count
        assert len({tuple(row) for row in rows}) == 1
    assert len(list(tmp_path.iterdir())) == 2


def columns(rows, *names):
    return {name: [row[name] for row in rows] for name in names}


def test_word_problems():
    rows = load("gsm8k/prepare.py").generate(50, seed=0)
    accuracy = orms["accuracy"](answer_format="boxed")
    right = [rf"So \boxed{{{row['solution']}}}." for row in rows]
    assert accuracy(right, **columns(rows, "solution")) == [1.0] * 50
    guesses = accuracy([r"\boxed{10}"] * 50, **columns(rows, "solution"))
    assert sum(guesses) < 10
    assert all(int(row["solution"]) > 0 for row in rows)


def test_worked_answers_are_right_and_the_model_has_placeholders(tmp_path):
    module = load("sft/prepare.py")
    module.main(["--out", str(tmp_path), "--train", "30", "--validation", "7"])
    rows = [json.loads(line) for line in (tmp_path / "validation.jsonl").open()]
    accuracy = orms["accuracy"](answer_format="boxed")
    answers = [row["messages"][-1]["content"] for row in rows]
    assert accuracy(answers, **columns(rows, "solution")) == [1.0] * 7
    about = [json.loads(line) for line in (tmp_path / "self_cognition.jsonl").open()]
    assert {row["tag"] for row in about} == {"en", "zh"}
    for row in about:
        assert "{{NAME}}" in row["response"]
        assert "{{AUTHOR}}" in row["response"]
    assert len({(row["query"], row["response"]) for row in about}) == len(about)


def test_pairs_have_a_right_answer_and_one_beside_the_point(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "prepare", load("sft/prepare.py"))  # which pairs.py imports
    module = load("preference/pairs.py")
    module.main(["--out", str(tmp_path), "--train", "30", "--validation", "7"])
    assert "validation has 7 pairs, and 14 answers with a label" in capsys.readouterr().out
    accuracy, prompts = orms["accuracy"](answer_format="boxed"), set()
    for split, count in (("train", 30), ("validation", 7)):
        pairs, answers = (
            [json.loads(line) for line in (tmp_path / f"{split}{kind}.jsonl").open()]
            for kind in ("", "_labels")
        )
        solution = [row["chosen"].partition("\\boxed{")[2].partition("}")[0] for row in pairs]
        for name, reward in (("chosen", 1.0), ("rejected", 0.0)):
            texts = [row[name] for row in pairs]
            assert accuracy(texts, solution=solution) == [reward] * count
            labelled = [row for row in answers if row["label"] == (name == "chosen")]
            assert [row["completion"] for row in labelled] == texts
        prompts |= {row["prompt"] for row in pairs}
    assert len(prompts) == 37


def test_structured_output():
    rows = load("json_schema/prepare.py").generate(50, seed=0)
    fits, match = orms["json_schema"](), orms["json_match"]()
    right = [row["expected"] for row in rows]
    assert fits(right, **columns(rows, "schema")) == [1.0] * 50
    assert match(right, **columns(rows, "expected")) == [1.0] * 50
    assert match(["{}"] * 50, **columns(rows, "expected")) == [0.0] * 50
    # The text holds what is asked for.
    for row in rows:
        name = next(iter(json.loads(row["expected"]).values()))
        assert name in row["messages"][0]["content"]


def test_programming_tasks():
    module = load("code/prepare.py")
    rows = module.generate(40, seed=0)
    code = orms["code"]()
    programs = []
    for row in rows:
        tests = json.loads(row["tests"])
        pairs = zip(tests["inputs"], tests["outputs"], strict=True)
        known = {json.dumps(args): out[0] for args, out in pairs}
        programs.append(
            f"```python\nimport json\ndef {tests['fn_name']}(x):\n"
            f"    return json.loads({json.dumps(known)!r})[json.dumps([x])]\n```"
        )
    assert code(programs, **columns(rows, "tests")) == [1.0] * 40
    constant = [
        f"```python\ndef {json.loads(row['tests'])['fn_name']}(x): return 0\n```" for row in rows
    ]
    assert max(code(constant, **columns(rows, "tests"))) <= 0.5


def test_countdown_of_3_to_4_numbers():
    rows = load("countdown/tasks_3to4.py").generate(50, seed=0)
    assert {len(row["nums"]) for row in rows} == {3, 4}
    assert all(10 <= int(row["response"]) <= 99 for row in rows)
    text = [f"<answer>{'+'.join(map(str, row['nums']))}</answer>" for row in rows]
    sums = [float(sum(row["nums"]) == int(row["response"])) for row in rows]
    assert orms["countdown"]()(text, **columns(rows, "nums", "response")) == sums


@pytest.mark.parametrize(
    "path", sorted(EXAMPLES.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_every_config_is_read(path):
    if "\nreward:" in path.read_text("utf-8"):
        config = load_config(path).config
        assert all(name in orms for name in config.reward.reward_funcs)
    else:
        assert load_config_as(schema_of(path), path).config.data.max_length
